"""What the report shows of `farspan eval --suite icl`: a column per number of examples."""

import json

from pretrain.metrics.lm_eval import ScoreRow, ScoreTable
from pretrain.metrics.registry import help_of
from pretrain.run_dir import RunDirectory


def read_icl(run: RunDirectory) -> ScoreTable | None:
    """Of the newest checkpoint that was evaluated; None if there is none."""
    files = sorted(run.evaluations.glob("icl-*.json"))
    if not files:
        return None
    tree = json.loads(files[-1].read_text())
    request = tree["request"]
    found = {(cell["task"], cell["shots"]): cell for cell in tree["cells"]}
    rows = []
    for task in request["tasks"]:
        of_task = [found[task, shots] for shots in request["shots"]]
        shares = (
            f"{cell['accuracy']:.1%} [{100 * cell['low']:.0f}, {100 * cell['high']:.0f}]"
            for cell in of_task
        )
        rows.append(ScoreRow(task, (f"{of_task[0]['chance']:.1%}", *shares)))
    columns = ("chance", *(f"{n} shot" if n == 1 else f"{n} shots" for n in request["shots"]))
    notes = [
        f"in brackets the 95 % interval, of {request['samples']:,} prompts of {tree['form']} each",
        *(f"{task}: {told}" for task in request["tasks"] if (told := help_of(f"eval/icl_{task}"))),
    ]
    what = "Accuracy by how many examples of the rule come before."
    suite = "Learned from examples in the context"
    return ScoreTable(suite, tree["step"], "task", columns, tuple(rows), tuple(notes), what)
