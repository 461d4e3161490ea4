"""Ask a finished run what became of a document, and look at the texts behind its decisions."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_pipeline import ledger
from data_pipeline.clean import judge
from data_pipeline.crawl import Reject, read_document
from data_pipeline.errors import DataError
from data_pipeline.examples import source_of
from data_pipeline.extract import CRASHED, TOO_SLOW, ExtractError, extract_text
from data_pipeline.funnel import read_funnel
from data_pipeline.rates import read_totals
from data_pipeline.recipe import Recipe
from data_pipeline.run_folder import PLAN

NAME_FILES = ("url_blocklist", "word_blocklist", "gpt3", "decontamination")
SAMPLE_SEED = 20_140_916
Row = dict[str, Any]


@dataclass(frozen=True)
class Look:
    """What a person sees of a document.

    Attributes:
        text: what the decision was about: the text that was kept or dropped, the source of a page
            without text or that no parser bears, nothing of a record that is no page.
        problem: why the archive does not give it any more.
    """

    text: str = ""
    problem: str | None = None


class Audit:
    """The audit of the run in a folder: a row of `ledger.SCHEMA` for each document."""

    def __init__(self, folder: Path) -> None:
        """
        Raises:
            DataError: no finished run is there.
        """
        self.folder = folder
        self._files = sorted((folder / "audit").glob("*.parquet"))
        if not (folder / "manifest.json").is_file() or not self._files:
            raise DataError(f"{folder} {_why_no_audit(folder)}")
        self._plan = json.loads((folder / PLAN).read_text())
        # A plan holds no files, only their hashes: what was kept was not dropped by any of them.
        other = {"description": ""} | dict.fromkeys(NAME_FILES)
        self._recipe = Recipe.model_validate(self._plan["recipe"] | other)

    def funnel(self) -> list[Row]:
        """Documents by stage and reason."""
        return ledger.funnel(ledger.tally(self.folder / "audit", sizes=()))

    def document(self, id: str) -> list[Row]:
        """The rows of a document, one for each record that has its id."""
        return list(self._rows(pc.field("id") == id))

    def duplicates(self, id: str) -> list[Row]:
        """The rows of the documents that were dropped because they repeat this one."""
        return list(self._rows(pc.field("twin") == id))

    def with_reason(self, reason: str) -> Iterator[Row]:
        """The rows of the documents that were dropped, or kept, for a reason.

        Raises:
            DataError: there are none.
        """
        self._require(reason)
        return self._rows(pc.field("reason") == reason)

    def rates(self) -> list[Row]:
        """How fast each stage was, see `data_pipeline.rates`; nothing where that is not known."""
        return read_totals(self.folder)

    def examples(self, reason: str | None = None) -> list[Row]:
        """Examples of each reason, or of one, as the run has kept them; see `Examples.of`.

        Raises:
            DataError: there are none.
        """
        if reason is not None:
            self._require(reason)
        steps = read_funnel(self.folder)
        outcomes = [(step["step"], one) for step in steps for one in step["dropped"]]
        outcomes.append((steps[-1]["step"], {"reason": ledger.KEPT, **steps[-1]["kept"]}))
        return [
            {"step": step, "reason": outcome["reason"], **example}
            for step, outcome in outcomes
            for example in outcome["examples"]
            if reason in (None, outcome["reason"])
        ]

    def _require(self, reason: str) -> None:
        found = {row["reason"] for row in self.funnel()}
        if reason not in found:
            raise DataError(
                f"no document of {self.folder} has the reason {reason!r}; there are: "
                + ", ".join(sorted(found))
            )

    def sample(self, stage: str, reason: str, size: int) -> list[Row]:
        """Rows drawn at random, the same ones each time."""
        wanted = (pc.field("stage") == stage) & (pc.field("reason") == reason)
        counts = [pq.read_table(f, columns=[], filters=wanted).num_rows for f in self._files]
        total = sum(counts)
        chosen = np.random.default_rng(SAMPLE_SEED).choice(total, min(size, total), replace=False)
        ends = np.cumsum(counts)
        rows: list[Row] = []
        for file, end, count in zip(self._files, ends, counts, strict=True):
            places = np.sort(chosen[(chosen >= end - count) & (chosen < end)]) - (end - count)
            if len(places):
                rows += pq.read_table(file, filters=wanted).take(places).to_pylist()
        return rows

    def look(self, row: Row) -> Look:
        """Read a document again where its archive has it."""
        try:
            document = read_document(row["file"], row["offset"], self._plan["id_header"])
        except (DataError, OSError) as error:
            return Look(problem=str(error))
        if document is None or (isinstance(document, Reject) and row["stage"] != "crawl"):
            return Look(
                problem=f"{row['file']} has no document at byte {row['offset']}: it has changed, "
                "or all of it is one gzip member, of which only the first record is found again"
            )
        if isinstance(document, Reject):
            return Look()
        if row["reason"] in (TOO_SLOW, CRASHED):
            return Look(source_of(document))
        try:
            text = extract_text(document, self._recipe.extract.mode)
        except ExtractError as error:
            return Look() if error.reason == "binary" else Look(source_of(document))
        return Look(judge(document, self._recipe).kept or text)

    def _rows(self, wanted: pc.Expression) -> Iterator[Row]:
        for file in self._files:
            yield from pq.read_table(file, filters=wanted).to_pylist()


def _why_no_audit(folder: Path) -> str:
    if (folder / "manifest.json").is_file():
        return "has shards, and no audit, which `farspan data run` alone makes; name its --out"
    if (folder / PLAN).is_file():
        return "is not finished: the same command continues it"
    return "holds no run; name the --out of `farspan data run`"
