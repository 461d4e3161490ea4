"""A data run in parts, done by processes of many machines that share its folder.

    clean 1/N ... N/N  ->  deduplicate  ->  write shards 1/N ... N/N  ->  `data_pipeline.run.run`

Each step may be repeated, and does what is left of it. The last one checks all, and ends the run.
"""

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from data_pipeline.crawl import CRAWL_URL, Source, identify
from data_pipeline.dedup import check_memory
from data_pipeline.engine import Native
from data_pipeline.errors import DataError, file_errors
from data_pipeline.kept import read_texts
from data_pipeline.recipe import Recipe
from data_pipeline.run import (
    PLANS,
    TOKENIZER,
    Progress,
    Resources,
    asked_for,
    clean,
    deduplicate_pieces,
    identity_file,
    no_progress,
    piece_of,
    plan_of,
    planned_shards,
    refuse_changed,
    shards_of,
    train_tokenizer_on,
)
from data_pipeline.run_folder import UNKNOWN, check_plan, exclusive, record_plan, shared
from data_pipeline.shards.planned import load_plans, write_planned_shard
from data_pipeline.stage import is_made


@dataclass(frozen=True)
class Part:
    """Of archives or shards the ones number, number + of, number + 2 of, ..., from 1 on."""

    number: int
    of: int

    def among(self, count: int) -> range:
        """Those of so many, from 0 on."""
        return range(self.number - 1, count, self.of)


@dataclass(frozen=True)
class State:
    """How far a run has come, by the files that are there; their hashes have not been looked at.

    Attributes:
        cleaned: whether each archive is, in the order in which parts take them.
        written: whether each shard is; None before deduplication has said how many there are.
        is_finished: everything is done.
    """

    cleaned: tuple[bool, ...]
    written: tuple[bool, ...] | None
    is_finished: bool

    @property
    def stages(self) -> int:
        """How many are finished."""
        return sum(self.cleaned) + sum(self.written or ()) + (self.written is not None)


@dataclass(frozen=True)
class PartedRun:
    """A run that is done in parts; its attributes are the arguments of `run`.

    All methods raise DataError where that does.
    """

    inputs: Sequence[str]
    out: Path
    recipe: Recipe
    id_header: str = "WARC-Record-ID"
    tokenizer: Path | None = None
    vocab_size: int = 8192
    crawl_url: str = CRAWL_URL

    def state(self) -> State:
        """How far it is; nothing is changed. Other inputs or options than before are refused."""
        with file_errors():
            sources, plan = self._asked_for()
            check_plan(self.out, plan)
            is_ended = (self.out / "manifest.json").exists()
            pieces = _names(piece_of(self._work, 0).folder.parent)
            names = [piece_of(self._work, number).folder.name for number in range(len(sources))]
            return State(
                cleaned=tuple(is_ended or name in pieces for name in names),
                written=() if is_ended else self._written(),
                is_finished=is_ended and not self._work.exists(),
            )

    def clean(self, part: Part, workers: int = 1, progress: Progress = no_progress) -> int:
        """Clean a part of the archives, at a time with others; return how many it has."""
        with file_errors():
            sources, plan = self._asked_for()
            numbers = part.among(len(sources))
            with shared(self.out):
                record_plan(self.out, plan)
                if not (self.out / "manifest.json").exists():
                    # The content of the other parts is not looked at here.
                    mine = identify(
                        [sources[number] for number in numbers],
                        lambda done, total: progress("inputs", done, total),
                    )
                    (self._work / "identities").mkdir(parents=True, exist_ok=True)
                    for number, source in zip(numbers, mine, strict=True):
                        _record_identity(source, identity_file(self._work, number))
                    pieces = [piece_of(self._work, number) for number in numbers]
                    meter = self._work / f"meter-{part.number}-{part.of}"
                    engine = Native(workers)
                    clean(mine, pieces, meter, self.recipe, self.id_header, engine, progress)
            return len(numbers)

    def deduplicate(
        self, workers: int = 1, memory: int | None = None, progress: Progress = no_progress
    ) -> int:
        """Deduplicate what all parts have cleaned, and train the tokenizer unless one is given.

        Returns:
            Into how many shards the documents go that are kept.

        Raises:
            DataError: an archive is not cleaned yet, or its cleaned form is damaged, too.
        """
        with file_errors():
            check_memory(memory, self.recipe.dedup.exact)
            sources, plan = self._asked_for()
            with exclusive(self.out):
                record_plan(self.out, plan)
                if (self.out / "manifest.json").exists():
                    return 0
                pieces = [piece_of(self._work, number) for number in range(len(sources))]
                with ThreadPoolExecutor() as pool:
                    are_made = list(pool.map(is_made, [piece.folder for piece in pieces]))
                missing = [number for number, made in enumerate(are_made) if not made]
                if missing:
                    raise DataError(
                        f"{self.out}: {len(missing)} of {len(sources)} archives are not cleaned, "
                        f"the first of them {sources[missing[0]].name}: clean these first"
                    )
                resources = Resources(workers, memory=memory)
                documents = deduplicate_pieces(pieces, self._work, self.recipe, resources, progress)
                tokenizer = self.tokenizer or train_tokenizer_on(
                    documents, self._work, self.vocab_size, progress
                )
                return len(planned_shards(documents, tokenizer, self._work))

    def write_shards(self, part: Part, workers: int = 1, progress: Progress = no_progress) -> int:
        """Tokenise a part of the shards, at a time with others; return how many it has.

        Raises:
            DataError: the documents are not deduplicated yet, too.
        """
        with file_errors(), shared(self.out):
            record_plan(self.out, self._asked_for()[1])
            if (self.out / "manifest.json").exists():
                return 0
            if not self._plans.exists():
                raise DataError(
                    f"{self.out}: its documents are not deduplicated yet, so that nobody knows its "
                    "shards: do this first"
                )
            plans = load_plans(self._plans, self._work / "dedup" / "documents")
            mine = [plans[number] for number in part.among(len(plans))]
            tokenizer = self.tokenizer or self._work / "tokenizer" / TOKENIZER
            folder = shards_of(self._work)
            tasks = [
                (plan, folder / plan.name, tokenizer, read_texts)
                for plan in mine
                if not is_made(folder / plan.name)
            ]
            done = len(mine) - len(tasks)
            progress("shards", done, len(mine))
            for _ in Native(workers).do_each(write_planned_shard, tasks, self.out):
                done += 1
                progress("shards", done, len(mine))
            return len(mine)

    @property
    def _work(self) -> Path:
        return self.out / "work"

    @property
    def _plans(self) -> Path:
        return self._work / "plans" / PLANS

    def _asked_for(self) -> tuple[list[Source], dict[str, Any]]:
        """The archives, and the plan of the run, which leaves open what their contents are."""
        sources, vocab_size = asked_for(
            self.inputs, self.crawl_url, self.tokenizer, self.vocab_size
        )
        identities = dict.fromkeys([source.name for source in sources], UNKNOWN)
        plan = plan_of(identities, self.recipe, self.id_header, self.tokenizer, vocab_size)
        return sources, plan

    def _written(self) -> tuple[bool, ...] | None:
        if not self._plans.exists():
            return None
        plans = load_plans(self._plans, Path())
        made = _names(shards_of(self._work))
        return tuple(plan.name in made for plan in plans)


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def _record_identity(source: Source, path: Path) -> None:
    refuse_changed(source, path)
    aside = path.with_name(f".{path.name}.{uuid4().hex}")
    aside.write_text(json.dumps(source.identity))
    aside.rename(path)
