"""The shards that `data.shards: sample` stands for: made on this machine, once."""

import fcntl
import hashlib
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

PAGES = 120
SEED = 0
VOCAB_SIZE = 2048


def sample_shards() -> Path:
    """The folder of the sample's shards and tokenizer, made on first use.

    It lies in $FARSPAN_CACHE, by default ~/.cache/farspan, in a folder of its own for each version
    of Python and farspan. Of two runs that start at once, one makes it and the other waits.
    """
    cache = Path(os.environ.get("FARSPAN_CACHE") or Path.home() / ".cache" / "farspan")
    key = f"{version('farspan')} {platform.python_version()} {PAGES} {SEED} {VOCAB_SIZE}"
    folder = cache / f"sample-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    cache.mkdir(parents=True, exist_ok=True)
    with _locked(folder.with_suffix(".lock")):
        if not folder.exists():
            print(f"making sample shards in {folder}", file=sys.stderr, flush=True)
            _make(folder)
    return folder


def _make(folder: Path) -> None:
    from data_pipeline.recipe import load_recipe
    from data_pipeline.run import run
    from data_pipeline.sample import make_sample_crawl

    aside = folder.with_suffix(".making")
    shutil.rmtree(aside, ignore_errors=True)
    make_sample_crawl(aside / "crawl", pages=PAGES, files=1, seed=SEED)
    archives = [str(aside / "crawl")]
    run(archives, aside / "data", load_recipe("demo"), vocab_size=VOCAB_SIZE)
    (aside / "data").rename(folder)
    shutil.rmtree(aside)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
