"""What `farspan data run` is asked for, done here or kept for the jobs that do it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from launch.data_rates import rates_table
from launch.progress import Show

if TYPE_CHECKING:
    from data_pipeline.parts import PartedRun
    from data_pipeline.run import RunResult

DAMAGE_LINES = 10


@dataclass(frozen=True)
class DataRun:
    """The options that say what is made, as they were given: paths as seen from that folder.

    Attributes:
        languages: separated by commas, as in en,de.
        memory: of deduplication, as in 2GB.
    """

    inputs: tuple[str, ...]
    recipe: str
    mode: str | None
    languages: str | None
    classifier: str | None
    tokenizer: str | None
    vocab_size: int
    id_header: str
    crawl_url: str
    memory: str | None

    @staticmethod
    def from_json(tree: Mapping[str, Any]) -> "DataRun":
        """Of the object that `to_json` gives. Raises TypeError and KeyError for another one."""
        return DataRun(**{**tree, "inputs": tuple(tree["inputs"])})

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def parted(self, out: Path) -> "PartedRun":
        """The run whose parts may be done by themselves.

        Raises:
            DataError: no such recipe, or a setting that is not allowed.
        """
        from data_pipeline.parts import PartedRun
        from data_pipeline.recipe import load_recipe

        recipe = load_recipe(self.recipe).override(
            mode=self.mode,  # type: ignore[arg-type]
            languages=None if self.languages is None else tuple(self.languages.split(",")),
            classifier=None if self.classifier is None else Path(self.classifier),
        )
        return PartedRun(
            self.inputs,
            out,
            recipe,
            id_header=self.id_header,
            tokenizer=None if self.tokenizer is None else Path(self.tokenizer),
            vocab_size=self.vocab_size,
            crawl_url=self.crawl_url,
        )

    def memory_bytes(self) -> int | None:
        """What deduplication may hold. Raises DataError."""
        from data_pipeline.dedup.index import parse_memory

        return None if self.memory is None else parse_memory(self.memory)

    def run(self, out: Path, workers: int, engine: str, progress: Show) -> "RunResult":
        """All of it, or what is left of it."""
        from data_pipeline.run import run

        asked = self.parted(out)
        return run(
            asked.inputs,
            out,
            asked.recipe,
            workers=workers,
            engine=engine,
            memory=self.memory_bytes(),
            id_header=asked.id_header,
            tokenizer=asked.tokenizer,
            vocab_size=asked.vocab_size,
            crawl_url=asked.crawl_url,
            progress=progress,
        )


def report(result: "RunResult", out: Path, console: Console) -> None:
    """Print what became of the documents.

    Raises:
        DataError: none is left.
    """
    from data_pipeline.errors import DataError

    def say(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    if not result.is_new:
        say(f"{out} is finished already: same inputs, same options")
    table = Table("stage", "reason")
    table.add_column("documents", justify="right")
    for row in result.funnel:
        table.add_row(row["stage"], row["reason"], str(row["documents"]))
    if result.funnel:
        console.print(table)
    if result.rates:
        console.print(rates_table(result.rates))
    for archive in result.manifest.extra["inputs"]:
        if not archive["documents"]:
            say(f"{archive['path']}: no documents")
    for line in result.damage[:DAMAGE_LINES]:
        say(line)
    if len(result.damage) > DAMAGE_LINES:
        say(f"... and {len(result.damage) - DAMAGE_LINES} more damaged records: {out / 'audit'}")
    manifest = result.manifest
    if not manifest.documents:
        raise DataError(
            f"no document is left to train on: {out / 'audit'} says why of each. Change the recipe "
            "or the inputs, and choose another --out"
        )
    say(
        f"{manifest.documents} documents, {manifest.tokens} tokens in {len(manifest.shards)} "
        f"shards: {out / 'manifest.json'}"
    )
