"""`farspan eval --suite long`: what a model makes of its context, by task, length and depth."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.table import Table

from launch.shared import run_shared
from launch.suite import Asked, names_in, plain_table, tell
from pretrain.run_dir import RunDirectory


def evaluate_long(asked: Asked) -> None:
    from pretrain.checkpoint.trained import newest_config
    from pretrain.evals.request import Request, parse_lengths, prepared

    run = RunDirectory(asked.directory)
    trained = newest_config(run)
    options = dict(asked.options)
    lengths = options.pop("lengths", None)
    options["lengths"] = parse_lengths(lengths) if lengths else ()
    if "tasks" in options:
        options["tasks"] = names_in(options["tasks"])
    request = Request(**options)
    prepared(trained, asked.overrides, request.completed(trained).lengths, asked.nproc)
    arguments = json.dumps(asdict(request) | {"overrides": list(asked.overrides)})
    result = run_shared("pretrain.evals.long", (str(run.root), arguments), asked.nproc)
    first = (
        f"step {result['step']:,}, documents of {result['form']}, {result['request']['samples']} "
        f"of each kind, chance {result['chance']:.2%}, layout {result['layout']}"
    )
    tell(asked, result, first, tables_of(result), run.evaluation("long", result["step"]))


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
        table = plain_table(title, [f"{length:,}" for length in lengths])
        for name in rows:
            shown = name if key == "task" else f"{name:.0%}"
            table.add_row(shown, *(f"{found[name, length]:.1%}" for length in lengths))
        tables.append(table)
    if result["loss_by_position"]:
        table = plain_table("tokens before", ["nats per token", "predicted"])
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
