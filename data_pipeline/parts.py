"""A data run in parts, done by processes of many machines that share its folder.

    clean 1/N ... N/N  ->  deduplicate  ->  write shards 1/N ... N/N  ->  finish

Each step may be repeated, and does what is left of it, and `data_pipeline.run.run` does the rest at
any time. A file is checked against its hash by each step that reads it.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from data_pipeline.clean import Piece, is_cleaned
from data_pipeline.crawl import CRAWL_URL, Source, identify
from data_pipeline.dedup import check_memory
from data_pipeline.dedup.outputs import CLUSTERS
from data_pipeline.engine import Native
from data_pipeline.errors import DataError, file_errors
from data_pipeline.kept import read_texts
from data_pipeline.rates import RATES, timed
from data_pipeline.recipe import Recipe
from data_pipeline.run import (
    DOCUMENTS,
    TOKENIZER,
    Progress,
    Resources,
    RunResult,
    asked_for,
    clean,
    deduplicate_pieces,
    finished,
    identity_file,
    no_progress,
    piece_of,
    plan_of,
    planned_shards,
    plans_of,
    refuse_changed,
    shards_of,
    train_tokenizer_on,
    write_out,
)
from data_pipeline.run_folder import UNKNOWN, check_plan, exclusive, record_plan, shared
from data_pipeline.shards.planned import load_plans, write_planned_shard
from data_pipeline.stage import damage_of, is_made


@dataclass(frozen=True)
class Part:
    """Of archives or shards the ones number, number + of, number + 2 of, ..., from 1 on."""

    number: int
    of: int

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

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
            return state_of(self.out, len(sources))

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
                    asked = (self.recipe, self.id_header, Native(workers), progress)
                    clean(mine, pieces, meter, *asked, part=str(part))
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
                pieces = self._cleaned(sources, is_cleaned)
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
            self._require_plans()
            plans = load_plans(self._plans, self._work / "dedup" / DOCUMENTS)
            mine = [plans[number] for number in part.among(len(plans))]
            files = {f"{DOCUMENTS}/{rows.file.name}" for plan in mine for rows in plan.rows}
            self._require_sound(self._work / "dedup", files)
            folder = shards_of(self._work)
            tasks = [
                (plan, folder / plan.name, self._tokenizer, read_texts)
                for plan in mine
                if not is_made(folder / plan.name)
            ]
            done = len(mine) - len(tasks)
            progress("shards", done, len(mine))
            if not tasks:
                return len(mine)
            with timed(
                self._work / RATES,
                "shards",
                workers=workers,
                part=str(part),
            ) as attempt:
                attempt.count(items=len(tasks), share=0)
                for written, _ in enumerate(
                    Native(workers).do_each(write_planned_shard, tasks, self.out), 1
                ):
                    progress("shards", done + written, len(mine))
                    attempt.count(share=written / len(tasks))
            return len(mine)

    def finish(self, workers: int = 1, progress: Progress = no_progress) -> RunResult:
        """Write the audit, put the shards in place, and end the run.

        Archives are not read again: what a part has recorded of one is what was cleaned.

        Raises:
            DataError: an archive is not cleaned yet or the documents not deduplicated, too.
        """
        with file_errors():
            sources, plan = self._asked_for()
            with exclusive(self.out):
                record_plan(self.out, plan | {"inputs": self._identities(sources)})
                if (self.out / "manifest.json").exists():
                    return finished(self.out)
                pieces = self._cleaned(sources, _has_sound_audit)
                self._require_plans()
                self._require_sound(self._work / "dedup", {CLUSTERS})
                resources = Resources(workers)
                return write_out(
                    pieces, self._tokenizer, self.out, self.recipe, resources, progress
                )

    def _cleaned(self, sources: Sequence[Source], is_sound: Callable[[Piece], bool]) -> list[Piece]:
        """The cleaned forms of all archives. Raises DataError where one is missing or damaged."""
        pieces = [piece_of(self._work, number) for number in range(len(sources))]
        with ThreadPoolExecutor() as pool:
            are_sound = list(pool.map(is_sound, pieces))
        if missing := [
            source.name for source, ok in zip(sources, are_sound, strict=True) if not ok
        ]:
            raise DataError(
                f"{self.out}: {len(missing)} of {len(sources)} archives are not cleaned, the first "
                f"of them {missing[0]}: clean these first"
            )
        return pieces

    def _identities(self, sources: Sequence[Source]) -> dict[str, Any]:
        """Which contents the parts have cleaned; unknown where a run of one process has."""
        paths = [identity_file(self._work, number) for number in range(len(sources))]
        return {
            source.name: json.loads(path.read_text()) if path.exists() else UNKNOWN
            for source, path in zip(sources, paths, strict=True)
        }

    def _require_plans(self) -> None:
        """Refuse to go on before deduplication, or behind one that has left damaged plans."""
        if not self._plans.exists():
            raise DataError(
                f"{self.out}: its documents are not deduplicated yet, so that nobody knows its "
                "shards: do this first"
            )
        self._require_sound(self._plans.parent)
        if self.tokenizer is None:
            self._require_sound(self._tokenizer.parent)

    def _require_sound(self, stage: Path, files: set[str] | None = None) -> None:
        """Refuse a stage of deduplication if one of these files of it, or any, is damaged."""
        if damage := damage_of(stage, files):
            # Deduplication looks at all its files, and makes anew what is damaged.
            shutil.rmtree(self._plans.parent, ignore_errors=True)
            raise DataError(f"{damage}; deduplicate again, which mends it")

    @property
    def _tokenizer(self) -> Path:
        return self.tokenizer or self._work / "tokenizer" / TOKENIZER

    @property
    def _work(self) -> Path:
        return self.out / "work"

    @property
    def _plans(self) -> Path:
        return plans_of(self._work)

    def _asked_for(self) -> tuple[list[Source], dict[str, Any]]:
        """The archives, and the plan of the run, which leaves open what their contents are."""
        sources, vocab_size = asked_for(
            self.inputs, self.crawl_url, self.tokenizer, self.vocab_size
        )
        identities = dict.fromkeys([source.name for source in sources], UNKNOWN)
        plan = plan_of(identities, self.recipe, self.id_header, self.tokenizer, vocab_size)
        return sources, plan


def state_of(out: Path, archives: int) -> State:
    """How far a run of so many archives is, by the files in its folder."""
    work = out / "work"
    pieces, written = _names(piece_of(work, 0).folder.parent), _written(work)
    # Looked at last: a run that ends meanwhile removes what the others are told by.
    is_ended = (out / "manifest.json").exists()
    names = [piece_of(work, number).folder.name for number in range(archives)]
    return State(
        cleaned=tuple(is_ended or name in pieces for name in names),
        written=() if is_ended else written,
        is_finished=is_ended and not work.exists(),
    )


def _written(work: Path) -> tuple[bool, ...] | None:
    file = plans_of(work)
    try:
        if damage_of(file.parent):
            return None
        plans = load_plans(file, Path())
    except FileNotFoundError:  # removed since
        return None
    made = _names(shards_of(work))
    return tuple(plan.name in made for plan in plans)


def _has_sound_audit(piece: Piece) -> bool:
    """Whether what is left to be read of a cleaned archive is whole; else it is removed."""
    damage = damage_of(piece.folder, [file.name for file in _read_at_the_end(piece)])
    return damage is None or is_cleaned(piece)


def _read_at_the_end(piece: Piece) -> tuple[Path, ...]:
    return piece.audit, piece.examples, piece.summary


def _names(folder: Path) -> set[str]:
    try:
        return {path.name for path in folder.iterdir()}
    except FileNotFoundError:
        return set()


def _record_identity(source: Source, path: Path) -> None:
    refuse_changed(source, path)
    aside = path.with_name(f".{path.name}.{uuid4().hex}")
    aside.write_text(json.dumps(source.identity))
    aside.rename(path)
