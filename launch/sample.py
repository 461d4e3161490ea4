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
from typing import Any

from pretrain.config import Config
from pretrain.data_config import SAMPLE_SHARDS

PAGES = 120
SEED = 0
VOCAB_SIZE = 2048


def sample_shards() -> Path:
    """The folder of the sample's shards and tokenizer, made on first use.

    It lies in $FARSPAN_CACHE, by default ~/.cache/farspan, in a folder of its own for each version
    of Python and farspan. Of two runs that start at once, one makes it and the other waits.
    """
    cache = cache_folder()
    key = f"{version('farspan')} {platform.python_version()} {PAGES} {SEED} {VOCAB_SIZE}"
    folder = cache / f"sample-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    cache.mkdir(parents=True, exist_ok=True)
    with _locked(folder.with_suffix(".lock")):
        if not folder.exists():
            print(f"making sample shards in {folder}", file=sys.stderr, flush=True)
            _make(folder)
    return folder


def cache_folder() -> Path:
    return Path(os.environ.get("FARSPAN_CACHE") or Path.home() / ".cache" / "farspan")


def with_sample(config: Config) -> Config:
    """A configuration that names the folder of the sample where it says `sample`."""
    data = config.data
    if SAMPLE_SHARDS not in [source.path for source in data.sources()]:
        return config
    shards: Any = str(sample_shards())
    if not isinstance(data.shards, str):
        shards = tuple(
            source.model_copy(update={"path": shards}) if source.path == SAMPLE_SHARDS else source
            for source in data.shards
        )
    return config.model_copy(update={"data": data.model_copy(update={"shards": shards})})


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
