"""Shards that are cut before they are tokenised hold what one after another would."""

import os
import signal
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from data_pipeline.engine import Native
from data_pipeline.shards import Manifest, TokenReader, load_manifest, write_shards
from data_pipeline.shards.planned import (
    bytes_of_tokens,
    plan_shards,
    write_planned_shards,
)
from data_pipeline.tokenize import load_tokenizer, train_tokenizer
from tests.files import contents

FILES = [Path(name) for name in "abc"]
TEXTS = [f"text {i} " * (i % 7) for i in range(60)]


@given(
    st.lists(st.lists(st.lists(st.integers(0, 9), max_size=6), max_size=3), max_size=3),
    st.integers(1, 30),
)
def test_a_shard_ends_with_the_document_that_fills_it(
    sizes: list[list[list[int]]], limit: int
) -> None:
    files = FILES[: len(sizes)]
    of_file = dict(zip(files, sizes, strict=True))

    def read_sizes(file: Path) -> Iterator[NDArray[np.int64]]:
        return (np.array(some, np.int64) for some in of_file[file])

    expected: list[list[tuple[Path, int]]] = [[]]
    size = 0
    for file in files:
        for row, document in enumerate(chain(*of_file[file])):
            expected[-1].append((file, row))
            size += document
            if size >= limit:
                expected.append([])
                size = 0
    plans = plan_shards(files, read_sizes, limit)
    assert [
        [(rows.file, row) for rows in plan.rows for row in range(rows.start, rows.stop)]
        for plan in plans
    ] == [shard for shard in expected if shard]
    assert [plan.number for plan in plans] == list(range(len(plans)))
    assert [plan.first for plan in plans] == [
        sum(plan.documents for plan in plans[:i]) for i in range(len(plans))
    ]


def read(file: Path, start: int, stop: int) -> Iterator[tuple[str, str]]:
    """Documents of a file whose name says which ones they are."""
    first = int(file.name)
    for number in range(first + start, first + stop):
        yield f"id-{number}", TEXTS[number]


def read_sizes(file: Path) -> Iterator[NDArray[np.int64]]:
    first = int(file.name)
    yield np.array([len(text) for text in TEXTS[first : first + 20]])


def read_and_die_once(file: Path, start: int, stop: int) -> Iterator[tuple[str, str]]:
    mark = file.parent / "died"
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    yield from read(file, start, stop)


class Folder:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.tokenizer = root / "bpe.json"
        train_tokenizer(TEXTS, 300, self.tokenizer)
        self.plans = plan_shards([root / "0", root / "20", root / "40"], read_sizes, 200)

    def write(self, name: str, reading: object = read, workers: int = 2) -> list[int]:
        """Write the shards; how many were finished, each time that was told."""
        finished: list[int] = []
        write_planned_shards(
            self.plans,
            reading,  # type: ignore[arg-type]
            self.tokenizer,
            self.root / name,
            self.root / f"work-{name}",
            Native(workers),
            extra={"a": 1},
            progress=finished.append,
        )
        return finished


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def tokens(manifest: Manifest) -> list[list[int]]:
    reader = TokenReader(manifest)
    return [
        reader.read(document, 0, reader.lengths[document]).tolist()
        for document in range(manifest.documents)
    ]


def test_the_documents_are_those_of_shards_written_in_a_row(folder: Folder) -> None:
    finished = folder.write("planned")
    assert finished == [*range(len(folder.plans) + 1), len(folder.plans)]
    assert len(folder.plans) > 5
    assert any(len(plan.rows) > 1 for plan in folder.plans)
    pairs = ((f"id-{number}", text) for number, text in enumerate(TEXTS))
    write_shards(pairs, folder.tokenizer, folder.root / "whole", extra={"a": 1})
    planned, whole = (load_manifest(folder.root / name) for name in ("planned", "whole"))
    assert tokens(planned) == tokens(whole)
    assert planned.unigram_entropy == whole.unigram_entropy
    assert [shard.documents for shard in planned.shards] == [p.documents for p in folder.plans]


def test_workers_and_deaths_change_no_byte(folder: Folder) -> None:
    folder.write("one", workers=1)
    folder.write("many", workers=3)
    folder.write("died", reading=read_and_die_once)
    assert (folder.root / "died").exists()
    assert contents(folder.root / "many") == contents(folder.root / "one")
    assert contents(folder.root / "died") == contents(folder.root / "one")


@pytest.mark.parametrize("is_damaged", [False, True])
def test_shards_that_are_listed_are_kept_where_they_are_whole(
    folder: Folder, is_damaged: bool
) -> None:
    class StoppedError(Exception):
        pass

    def stop(finished: int) -> None:
        if finished == 3:
            raise StoppedError

    folder.write("whole")
    out, work = folder.root / "out", folder.root / "work-out"
    with pytest.raises(StoppedError):
        write_planned_shards(
            folder.plans,
            read,
            folder.tokenizer,
            out,
            work,
            Native(1),
            extra={"a": 1},
            progress=stop,
        )
    second = out / "shards" / "shard-00001.tar"
    if is_damaged:
        for stage in work.iterdir():
            for file in stage.iterdir():
                file.unlink()
            stage.rmdir()
        content = second.read_bytes()
        second.write_bytes(content[:-1] + b"!")
    assert folder.write("out")[0] == (1 if is_damaged else 3)
    assert contents(out) == contents(folder.root / "whole")


def test_bytes_of_tokens_are_measured_on_the_first_texts(folder: Folder) -> None:
    coder = load_tokenizer(folder.tokenizer)
    count = sum(len(coder.encode(text)) + 1 for text in TEXTS)
    size = sum(len(text) for text in TEXTS)
    assert bytes_of_tokens(1000, iter(TEXTS), folder.tokenizer) == 1000 * size // count
    assert bytes_of_tokens(1000, iter([]), folder.tokenizer) == 1000
