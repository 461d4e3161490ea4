"""Shards of texts that lie in files, cut before they are tokenised, each one written by a task.

What a shard holds follows from the texts alone. Tasks end in any order, and shards are listed in
theirs, so that training can follow a run on a cluster, too.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain, takewhile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.engine import Engine
from data_pipeline.shards import writer
from data_pipeline.shards.manifest import Manifest, Shard
from data_pipeline.stage import is_made, make_stage
from data_pipeline.tokenize import load_tokenizer

# So many bytes of texts say how many a token takes.
SAMPLE_BYTES = 1 << 18
# Shards are listed so many at a time, of as many times more that are listed already: all of them
# stand in every list.
LISTED_FOR_ONE = 64
OCCURRENCES = "occurrences.npy"
SHARD = "shard.json"

Read = Callable[[Path, int, int], Iterator[tuple[str, str]]]
"""Yields the id and the text of each document of a file from one row to before another."""


@dataclass(frozen=True)
class Rows:
    """Documents of a file, from `start` on, and before `stop`."""

    file: Path
    start: int
    stop: int


@dataclass(frozen=True)
class Plan:
    """A shard that is to be written.

    Attributes:
        first: the number of its first document among those of all shards.
    """

    number: int
    first: int
    rows: tuple[Rows, ...]

    @property
    def name(self) -> str:
        return f"shard-{self.number:05d}"

    @property
    def documents(self) -> int:
        return sum(rows.stop - rows.start for rows in self.rows)


def plan_shards(
    files: Sequence[Path],
    read_sizes: Callable[[Path], Iterator[NDArray[np.int64]]],
    bytes_per_shard: int,
) -> list[Plan]:
    """Cut the documents of the files, in order, where a shard has `bytes_per_shard` at least.

    Args:
        read_sizes: yields the bytes of the documents of a file, some at a time.
    """
    plans: list[Plan] = []
    rows: list[Rows] = []
    size = documents = 0

    def close() -> None:
        nonlocal size, documents
        plans.append(Plan(len(plans), documents, tuple(rows)))
        documents += plans[-1].documents
        rows.clear()
        size = 0

    for file in files:
        start = row = 0
        for sizes in read_sizes(file):
            totals = np.concatenate([[0], np.cumsum(sizes)])
            at = 0
            while (last := _first_with(totals, totals[at] + bytes_per_shard - size)) <= len(sizes):
                rows.append(Rows(file, start, row + last))
                close()
                start, at = row + last, last
            size += int(totals[-1] - totals[at])
            row += len(sizes)
        if start < row:
            rows.append(Rows(file, start, row))
    if rows:
        close()
    return plans


def save_plans(plans: Sequence[Plan], path: Path) -> None:
    """Write a file from which `load_plans` has the plans, wherever the folder of the texts is."""
    listed = [[(rows.file.name, rows.start, rows.stop) for rows in plan.rows] for plan in plans]
    path.write_text(json.dumps(listed))


def load_plans(path: Path, folder: Path) -> list[Plan]:
    """
    Args:
        folder: where the files of the texts lie.
    """
    plans: list[Plan] = []
    documents = 0
    for number, listed in enumerate(json.loads(path.read_text())):
        rows = tuple(Rows(folder / name, start, stop) for name, start, stop in listed)
        plans.append(Plan(number, documents, rows))
        documents += plans[-1].documents
    return plans


def _first_with(totals: NDArray[np.int64], total: int) -> int:
    return int(np.searchsorted(totals, total))


def bytes_of_tokens(tokens: int, texts: Iterator[str], tokenizer: Path) -> int:
    """How many bytes of texts have about so many tokens, if the others are like the first ones."""
    coder = load_tokenizer(tokenizer)
    read = counted = 0
    for text in texts:
        read += len(text.encode())
        counted += len(coder.encode(text)) + 1
        if read >= SAMPLE_BYTES:
            break
    return tokens * max(read, 1) // max(counted, 1)


def write_planned_shards(
    plans: Sequence[Plan],
    read: Read,
    tokenizer: Path,
    out: Path,
    work: Path,
    engine: Engine,
    *,
    extra: dict[str, Any],
    progress: Callable[[int], None],
) -> Manifest:
    """Tokenise texts into shards under `out`; equal plans give equal bytes on any engine.

    Shards are listed, and kept after a kill, as `write_shards` says.

    Args:
        work: gets a stage for each shard (`data_pipeline.stage`); it may be removed afterwards.
        progress: called with how many shards are finished.
    """
    manifest, before = writer.begin(tokenizer, out, extra)
    shards = _kept(plans, before, out)
    occurrences = np.zeros(manifest.vocab_size, np.int64)
    for plan, shard in zip(plans, shards, strict=False):
        occurrences += _occurrences(manifest, shard, work / plan.name)
    manifest = writer.list_shards(manifest, out, tuple(shards), occurrences)
    left = plans[len(shards) :]
    with ThreadPoolExecutor() as pool:
        are_made = pool.map(is_made, [work / plan.name for plan in left])
        tasks = [
            (plan, work / plan.name, tokenizer, read)
            for plan, made in zip(left, are_made, strict=True)
            if not made
        ]
    done = len(plans) - len(tasks)
    progress(done)
    for finished in chain((1 for _ in engine.do_each(write_planned_shard, tasks, out)), [0]):
        if tasks and not finished:
            os.listdir(work)  # file systems of many nodes remember what does not exist
        while len(shards) < len(plans) and (stage := work / plans[len(shards)].name).exists():
            shards.append(_put_in_place(stage, out))
            occurrences += _occurrences(manifest, shards[-1], stage)
        if len(shards) - len(manifest.shards) > len(manifest.shards) // LISTED_FOR_ONE:
            manifest = writer.list_shards(manifest, out, tuple(shards), occurrences)
        done += finished
        progress(done)
    assert len(shards) == len(plans), "every task leaves a stage"
    manifest = writer.list_shards(manifest, out, tuple(shards), occurrences)
    return writer.finish(manifest, out)


def write_planned_shard(plan: Plan, folder: Path, tokenizer: Path, read: Read) -> None:
    """Make `folder` a stage with the files of a shard, its line of the manifest, and its counts."""
    # Other tasks have the other processors.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    make_stage(folder, lambda aside: _write(plan, aside, tokenizer, read))


def _write(plan: Plan, folder: Path, tokenizer: Path, read: Read) -> None:
    coder = load_tokenizer(tokenizer)
    dtype = writer.token_dtype(coder.vocab_size)
    occurrences = np.zeros(coder.vocab_size, np.int64)
    shard = writer.ShardWriter(folder, plan.number)
    texts = chain.from_iterable(read(rows.file, rows.start, rows.stop) for rows in plan.rows)
    for number, (name, ids) in enumerate(writer.encode(texts, coder), plan.first):
        tokens: NDArray[Any] = np.array(ids, dtype)
        shard.add(number, name, tokens)
        occurrences += np.bincount(tokens, minlength=coder.vocab_size)
    (folder / SHARD).write_text(json.dumps(asdict(shard.close())))
    np.save(folder / OCCURRENCES, occurrences)


def _kept(plans: Sequence[Plan], before: Manifest | None, out: Path) -> list[Shard]:
    """Those of the shards listed before that are whole, up to the first that is not."""
    listed = before.shards if before else ()
    with ThreadPoolExecutor() as pool:
        are_whole = pool.map(partial(writer.is_whole, out), listed)
        are_planned = (
            plan.documents == shard.documents and is_whole
            for plan, shard, is_whole in zip(plans, listed, are_whole, strict=False)
        )
        return [shard for shard, _ in zip(listed, takewhile(bool, are_planned), strict=False)]


def _occurrences(manifest: Manifest, shard: Shard, stage: Path) -> NDArray[np.int64]:
    """How often a shard has each token; where its stage does not say so, it is read."""
    with suppress(OSError, ValueError):
        counts: NDArray[np.int64] = np.load(stage / OCCURRENCES)
        if len(counts) == manifest.vocab_size and counts.sum() == shard.tokens:
            return counts
    return writer.count_tokens(replace(manifest, shards=(shard,)))


def _put_in_place(stage: Path, out: Path) -> Shard:
    """Give the files of a shard their names; the stage keeps them, too, until it is removed."""
    for path in sorted(stage.glob("shard-*")):
        aside = out / "shards" / f".{path.name}"
        aside.unlink(missing_ok=True)
        aside.hardlink_to(path)
        aside.rename(out / "shards" / path.name)
    return Shard(**json.loads((stage / SHARD).read_text()))
