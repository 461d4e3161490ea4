"""`farspan eval --suite icl`: what a model learns from examples in its context."""

import json
from dataclasses import asdict
from typing import Any

from rich.table import Table

from launch.shared import run_shared
from launch.suite import Asked, names_in, plain_table, tell
from pretrain.run_dir import RunDirectory


def evaluate_icl(asked: Asked) -> None:
    from data_pipeline.stream import load_tokenizer
    from pretrain.checkpoint.trained import newest_config
    from pretrain.evals.icl_request import IclRequest, example_form, fitted, parse_shots

    run = RunDirectory(asked.directory)
    trained = newest_config(run)
    options = dict(asked.options)
    if "tasks" in options:
        options["tasks"] = names_in(options["tasks"])
    if "shots" in options:
        options["shots"] = parse_shots(options["shots"])
    request = IclRequest(**options)
    _, form = example_form(request.form, load_tokenizer(run.tokenizer))
    fitted(trained, asked.overrides, form, request, asked.nproc)
    arguments = json.dumps(asdict(request) | {"overrides": list(asked.overrides)})
    result = run_shared("pretrain.evals.icl", (str(run.root), arguments), asked.nproc)
    first = (
        f"step {result['step']:,}, prompts of {result['form']}, {request.samples} of each kind, "
        f"layout {result['layout']}"
    )
    tell(asked, result, first, tables_of(result), run.evaluation("icl", result["step"]))


def tables_of(result: dict[str, Any]) -> list[Table]:
    """What was right, and how sure that is."""
    request, cells = result["request"], result["cells"]
    found = {(cell["task"], cell["shots"]): cell for cell in cells}
    columns = [f"{shots} shot{'s' * (shots != 1)}" for shots in request["shots"]]
    right = plain_table("outputs right", ["chance", *columns])
    sure = plain_table("95 % interval", columns)
    for task in request["tasks"]:
        of_task = [found[task, shots] for shots in request["shots"]]
        shares = (f"{cell['accuracy']:.1%}" for cell in of_task)
        right.add_row(task, f"{of_task[0]['chance']:.1%}", *shares)
        sure.add_row(
            task, *(f"{100 * cell['low']:.0f}-{100 * cell['high']:.0f}" for cell in of_task)
        )
    return [right, sure]
