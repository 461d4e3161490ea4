"""`farspan eval --suite lm-eval`: tasks of lm-evaluation-harness, by number of examples."""

import json
from dataclasses import asdict

from rich.console import Console

from launch.progress import show_progress
from launch.suite import Asked, names_in, plain_table
from pretrain.errors import UserError
from pretrain.run_dir import RunDirectory

WIDTH = 200


def evaluate_lm_eval(asked: Asked) -> None:
    from pretrain.evals.lm_eval import SUITE, HarnessRequest, evaluate
    from pretrain.metrics.lm_eval import score_table

    _refuse_layout(asked)
    options = dict(asked.options)
    options["tasks"] = names_in(options.get("tasks", ""))
    if not options["tasks"]:
        raise UserError("--suite lm-eval needs --tasks, as in --tasks arc_easy,hellaswag")
    if "num_fewshot" in options:
        options["shots"] = parse_shots(options.pop("num_fewshot"))
    run = RunDirectory(asked.directory)
    with show_progress(Console(stderr=True)) as show:
        result = evaluate(run, HarnessRequest(**options), show)
    if asked.as_json:
        print(json.dumps(asdict(result)))
        return
    table = score_table(asdict(result))
    # A terminal that is too narrow wraps lines; rich would cut numbers.
    console = Console(highlight=False, soft_wrap=True, markup=False, width=WIDTH)
    console.print(f"step {table.step:,}, lm-evaluation-harness\n")
    printed = plain_table(table.title, table.columns)
    for row in table.rows:
        printed.add_row(row.label, *row.cells)
    console.print(printed)
    for note in table.notes:
        console.print(f"\n{note}")
    console.print(f"\n{run.evaluation(SUITE, table.step)}")


def parse_shots(text: str) -> tuple[int, ...]:
    """`0,1,5`, in increasing order. Raises UserError."""
    names = names_in(text)
    if not names or not all(name.isascii() and name.isdigit() for name in names):
        raise UserError(
            f"--num-fewshot {text}: must be numbers of examples before a question, as in 0,1,5"
        )
    return tuple(sorted({int(name) for name in names}))


def _refuse_layout(asked: Asked) -> None:
    what = asked.overrides[0] if asked.overrides else f"--nproc {asked.nproc}"
    if asked.overrides or asked.nproc > 1:
        raise UserError(
            f"{what}: --suite lm-eval asks the exported model, in one process; for more of them "
            "run `farspan export`, and lm-eval on the folder with a server such as vLLM"
        )
