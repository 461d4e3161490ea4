"""What the suites of `farspan eval` have in common."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Asked:
    """What a suite is asked for.

    Attributes:
        directory: of the run.
        overrides: `key=value` of its configuration.
        options: those of the suite that were given, by their names in Python.
    """

    directory: Path
    nproc: int
    overrides: Sequence[str]
    as_json: bool
    options: Mapping[str, Any]


def names_in(text: str) -> tuple[str, ...]:
    """Names with commas between them, each once; an empty text has none."""
    return tuple(dict.fromkeys(filter(None, map(str.strip, text.split(",")))))


def plain_table(first: str, columns: Sequence[str]) -> Table:
    """Without lines; numbers stand to the right."""
    table = Table(box=None, pad_edge=False)
    table.add_column(first, no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def tell(
    asked: Asked, result: Mapping[str, Any], first: str, tables: Iterable[Table], kept: Path
) -> None:
    """Print a line, tables, and where all of it is kept; or the result as JSON."""
    if asked.as_json:
        print(json.dumps(result))
        return
    console = Console(highlight=False, soft_wrap=True, markup=False)
    console.print(first)
    for table in tables:
        console.print()
        console.print(table)
    console.print(f"\n{kept}")
