"""`farspan eval --suite long`: what a model makes of its context, by task, length and depth."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from launch.shared import run_shared
from pretrain.errors import UserError
from pretrain.run_dir import RunDirectory

SUITES = ("long",)


def evaluate_long(
    directory: Path,
    suite: str,
    lengths: str | None,
    tasks: str | None,
    nproc: int,
    overrides: Sequence[str],
    as_json: bool,
    **asked: Any,
) -> None:
    """Ask the newest checkpoint of a run, print the answers, and keep them in its directory.

    Args:
        lengths: as `parse_lengths` reads them; None is the length of the training.
        tasks: names with commas between them; None is all, an empty string none.
        asked: other fields of `Request`.
    """
    if suite not in SUITES:
        raise UserError(f"--suite {suite} is not known; allowed: {', '.join(SUITES)}")
    from pretrain.checkpoint.trained import newest_config
    from pretrain.evals.request import Request, parse_lengths, prepared

    run = RunDirectory(directory)
    trained = newest_config(run)
    asked["lengths"] = parse_lengths(lengths) if lengths else ()
    if tasks is not None:
        asked["tasks"] = tuple(filter(None, map(str.strip, tasks.split(","))))
    request = Request(**asked)
    prepared(trained, overrides, request.completed(trained).lengths, nproc)
    arguments = json.dumps(asdict(request) | {"overrides": list(overrides)})
    result = run_shared("pretrain.evals.long", (str(run.root), arguments), nproc)
    if as_json:
        print(json.dumps(result))
        return
    console = Console(highlight=False, soft_wrap=True, markup=False)
    console.print(
        f"step {result['step']:,}, documents of {result['form']}, {result['request']['samples']} "
        f"of each kind, chance {result['chance']:.2%}, layout {result['layout']}"
    )
    for table in tables_of(result):
        console.print()
        console.print(table)
    console.print(f"\n{run.evaluation(suite, result['step'])}")


def tables_of(result: dict[str, Any]) -> list[Table]:
    lengths, cells = result["request"]["lengths"], result["cells"]
    tables = []
    by_depth = [cell for cell in cells if cell["depth"] is not None]
    for title, key, some in (
        ("questions answered", "task", _by_task(cells)),
        ("needle at depth", "depth", by_depth),
    ):
        found = {(cell[key], cell["length"]): cell["accuracy"] for cell in some}
        rows = list(dict.fromkeys(name for name, _ in found))
        if not rows:
            continue
        table = _table(title, [f"{length:,}" for length in lengths])
        for name in rows:
            shown = name if key == "task" else f"{name:.0%}"
            table.add_row(shown, *(f"{found[name, length]:.1%}" for length in lengths))
        tables.append(table)
    if result["loss_by_position"]:
        table = _table("tokens before", ["nats per token", "predicted"])
        for bucket in result["loss_by_position"]:
            seen = f"{bucket['first']:,} to {bucket['last']:,}"
            table.add_row(seen, f"{bucket['loss']:.4f}", f"{bucket['tokens']:,}")
        tables.append(table)
    return tables


def _by_task(cells: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """All depths of a needle together."""
    together: dict[tuple[str, int], dict[str, Any]] = {}
    for cell in cells:
        known = together.setdefault(
            (cell["task"], cell["length"]), {**cell, "questions": 0, "right": 0}
        )
        for name in ("questions", "right"):
            known[name] += cell[name]
        known["accuracy"] = known["right"] / known["questions"]
    return list(together.values())


def _table(first: str, columns: Sequence[str]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column(first, no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    return table
