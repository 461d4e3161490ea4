"""Render installed modules as pydoc's HTML; run as a script in a process of its own.

    python -P render.py COUNT OUT [MODULE_TO_SKIP]...

Importing arbitrary modules prints, registers hooks and now and then ends the process, so the
caller reads from OUT what was finished, and from its last line which module was being tried.
"""

import contextlib
import importlib
import importlib.metadata
import json
import os
import pkgutil
import pydoc
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ACT_ON_IMPORT = "antigravity idlelib this tkinter turtle turtledemo"
TABLES_OF_DATA = "coreweave_evaluations dateparser_data encodings tzdata"
HUGE_PAGES = "google pyarrow pydantic pydantic_core sympy"
SLOW_IMPORTS = "daft dateparser functorch huggingface_hub safetensors torchgen transformers wandb"
INTERNAL = "lib2to3 pip sys test"
SKIPPED = frozenset(
    f"{ACT_ON_IMPORT} {TABLES_OF_DATA} {HUGE_PAGES} {SLOW_IMPORTS} {INTERNAL}".split()
)
SELF = "farspan"
NOT_DOCUMENTATION = {"__main__", "conftest", "test", "tests"}

ADDRESS = re.compile(r"\b(?:0x[0-9a-f]{6,16}|[0-9a-f]{12,16})\b")
MIN_HTML, MAX_HTML = 3_000, 250_000


def module_names(skip: set[str]) -> Iterator[str]:
    """Names of importable modules: the standard library first, packages after, each sorted."""
    packages = importlib.metadata.packages_distributions()
    installed = [name for name, owners in packages.items() if SELF not in owners]
    for top in [*sorted(sys.stdlib_module_names), *sorted(installed)]:
        if top.isidentifier() and top not in SKIPPED:
            yield from _with_submodules(top, skip)


def _with_submodules(name: str, skip: set[str]) -> Iterator[str]:
    last = name.rpartition(".")[2]
    if last.startswith("_") or last in NOT_DOCUMENTATION or name in skip:
        return
    yield name
    path = getattr(sys.modules.get(name), "__path__", [])
    for module in sorted(pkgutil.iter_modules(path), key=lambda module: module.name):
        yield from _with_submodules(f"{name}.{module.name}", skip)


def render(name: str) -> str | None:
    """The page of a module, or None if it cannot be imported, or is very short or long.

    An installed package's own page would repeat the modules it re-exports, at great length.
    """
    try:
        module = importlib.import_module(name)
        if hasattr(module, "__path__") and name.partition(".")[0] not in sys.stdlib_module_names:
            return None
        html = pydoc.HTMLDoc()
        page = html.page(name, html.document(module, name))
    except (Exception, SystemExit):
        return None
    page = ADDRESS.sub("0x7f0000000000", page)
    return page if MIN_HTML <= len(page) <= MAX_HTML else None


def main() -> None:
    count, out, skip = int(sys.argv[1]), Path(sys.argv[2]), set(sys.argv[3:])
    with out.open("w") as file, Path(os.devnull).open("w") as nowhere:
        with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            for name in module_names(skip):
                file.write(json.dumps({"trying": name}) + "\n")
                file.flush()
                page = render(name)
                if page is not None:
                    file.write(json.dumps({"name": name, "html": page}) + "\n")
                    count -= 1
                if count == 0:
                    break
        file.write(json.dumps({"finished": True}) + "\n")
    os._exit(0)  # past the exit hooks of everything imported


if __name__ == "__main__":
    main()
