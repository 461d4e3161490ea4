"""How fast the stages of a data run were, as a table."""

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from launch.durations import duration_text


def rates_table(totals: Sequence[dict[str, Any]]) -> Table:
    """
    Args:
        totals: rows of `data_pipeline.rates`, one of each stage.
    """
    table = Table("stage")
    for name in ("documents", "a second", "by worker", "MB/s in", "out", "time", "CPU", "starts"):
        table.add_column(name, justify="right")
    for row in totals:
        table.add_row(
            row["data/stage"],
            _number(row.get("data/documents"), 0),
            _number(row.get("data/documents_per_s"), 1),
            _number(row.get("data/documents_per_s_per_worker"), 1),
            _number(row.get("data/mb_in_per_s"), 2),
            _number(row.get("data/mb_out_per_s"), 2),
            duration_text(row["data/wall_s"]),
            duration_text(row["data/cpu_s"]),
            str(row["data/attempts"]),
        )
    return table


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:,.{digits}f}"
