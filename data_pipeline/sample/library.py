"""The installed modules' documentation pages, rendered in a process of its own."""

import json
import os
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from data_pipeline.errors import DataError

RENDERER = Path(__file__).with_name("render.py")
SECONDS_FOR_ONE_MODULE = 60
SECONDS_PER_PAGE = 0.5


@dataclass(frozen=True)
class LibraryPage:
    """A module's name and pydoc's HTML for it."""

    name: str
    html: str


def library_pages(count: int) -> list[LibraryPage]:
    """The first `count` documentation pages of this installation, always the same ones.

    A module that ends or hangs the process which imports it is skipped.

    Raises:
        DataError: the installation has fewer pages.
    """
    skip: list[str] = []
    while True:
        pages, culprit = _render(count, skip)
        if culprit is None:
            break
        skip.append(culprit)
    if len(pages) < count:
        raise DataError(f"{count} sample pages asked for; the installed modules give {len(pages)}")
    return pages


def _environment() -> dict[str, str]:
    """Only what Python needs: pydoc prints defaults, and one of them is the whole environment."""
    needed = ("PYTHONPATH", "LD_LIBRARY_PATH")
    passed = {name: os.environ[name] for name in needed if name in os.environ}
    return {**passed, "PYTHONHASHSEED": "0", "PYTHONWARNINGS": "ignore", "LC_ALL": "C.UTF-8"}


def _render(count: int, skip: list[str]) -> tuple[list[LibraryPage], str | None]:
    """Pages, and the module on which the renderer died, if it did."""
    with TemporaryDirectory() as folder:
        out = Path(folder) / "pages.jsonl"
        command = [sys.executable, "-P", str(RENDERER), str(count), str(out), *skip]
        with suppress(subprocess.TimeoutExpired):
            subprocess.run(
                command,
                cwd="/",
                env=_environment(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=SECONDS_FOR_ONE_MODULE + SECONDS_PER_PAGE * count,
                check=False,
            )
        lines = [json.loads(line) for line in out.read_text().splitlines()]
    pages = [LibraryPage(line["name"], line["html"]) for line in lines if "html" in line]
    tried = next(line["trying"] for line in reversed(lines) if "trying" in line)
    return pages, None if "finished" in lines[-1] else tried
