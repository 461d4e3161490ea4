"""`farspan eval --suite lm-eval`: tasks of lm-evaluation-harness, asked of a run's export.

The harness (Gao et al., doi:10.5281/zenodo.10256836) writes the prompts and does the counting;
examples before a question are as in GPT-3 (Brown et al. 2020, arXiv:2005.14165).
"""

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch

from pretrain.checkpoint.export import export_newest
from pretrain.checkpoint.hf import config_to_hf
from pretrain.checkpoint.trained import newest_config
from pretrain.config import Config
from pretrain.errors import UserError
from pretrain.evals.kept import make_room
from pretrain.evals.request import longest_position
from pretrain.run_dir import RunDirectory, write_atomically
from pretrain.scratch import scratch_folder

if TYPE_CHECKING:
    from pretrain.evals.lm_eval_model import ExportedModel
    from pretrain.evals.lm_eval_tasks import LoadedTasks

SUITE = "lm-eval"
# What the harness calls the version of a task whose file has none.
NO_VERSIONS = (None, "Yaml", "N/A")
# Of standard errors that have no formula.
BOOTSTRAPS = 1000
SEED = 0

Progress = Callable[[str, int, int], None]
"""Called with what is asked, the requests that are answered, and all of them."""


@dataclass(frozen=True, kw_only=True)
class HarnessRequest:
    """
    Attributes:
        tasks: names of tasks, groups and tags, `*` standing for anything.
        shots: numbers of examples before a question; each is an evaluation of all tasks.
        tasks_dir: a folder with task files.
        limit: questions of each task; None is all.
        context: tokens that the model sees at most; None is what its positions were trained for.
    """

    tasks: tuple[str, ...]
    shots: tuple[int, ...] = (0,)
    tasks_dir: Path | None = None
    limit: int | None = None
    context: int | None = None


@dataclass(frozen=True, kw_only=True)
class Score:
    """One metric of a task or group, with one number of examples.

    Attributes:
        task: as the harness names it.
        metric, filter: of the harness, as in `acc` and `none`.
        shots: examples before each question.
        value, stderr: None where it is not finite, or not known.
        chance: the accuracy of who guesses among the choices; None where there are none.
        samples: questions.
        version: of the task, as its file says; empty if it does not.
        harness: version of lm-evaluation-harness.
        max_length: tokens that the model saw at most.
        requests, truncated: what the model was asked, and how many contexts lost their beginning.
    """

    task: str
    metric: str
    filter: str
    shots: int
    value: float | None
    stderr: float | None
    chance: float | None
    higher_is_better: bool
    samples: int
    version: str
    harness: str
    max_length: int
    requests: int
    truncated: int


@dataclass(frozen=True)
class HarnessEvaluation:
    """What `RUN/evals/lm-eval-STEP.json` holds."""

    step: int
    rows: tuple[Score, ...]


def evaluate(
    run: RunDirectory,
    request: HarnessRequest,
    progress: Progress = lambda what, done, total: None,
) -> HarnessEvaluation:
    """Ask a run's newest whole checkpoint, and keep the answers beside those of other tasks.

    Raises:
        UserError: the harness is not installed, a task is not there or cannot be loaded, the run
            has no checkpoint, or its model cannot be exported.
    """
    require_harness()
    trained = newest_config(run)
    config_to_hf(trained.model)
    max_length = context_length(trained, request.context)
    make_room(run)
    from pretrain.evals.lm_eval_tasks import load_tasks

    # What the harness prints is not the result.
    with redirect_stdout(sys.stderr):
        loaded = load_tasks(request.tasks, request.tasks_dir)
        for shots in request.shots:
            loaded.prepare(shots)
        step, model = _load_export(run, max_length)
        rows: list[Score] = []
        for shots in request.shots:
            loaded.prepare(shots)
            rows += _ask(model, loaded, shots, request.limit, progress)
    return _keep(run, HarnessEvaluation(step, tuple(rows)))


def require_harness() -> None:
    """Raises UserError: it is not installed."""
    if find_spec("lm_eval") is None:
        raise UserError(
            "--suite lm-eval needs lm-evaluation-harness, which is not installed: "
            "pip install 'farspan[eval]'"
        )


def context_length(config: Config, asked: int | None) -> int:
    """Tokens that the model sees at most: its positions, or the length of its training."""
    limit = longest_position(config)
    if asked is not None and limit is not None and asked > limit:
        raise UserError(
            f"--context {asked}: the run has softmax layers with rotary positions, trained for "
            f"{limit} tokens (data.seq_len, or model.attention.yarn); take {limit} or less"
        )
    return asked or limit or config.data.seq_len


def _load_export(run: RunDirectory, max_length: int) -> tuple[int, "ExportedModel"]:
    from pretrain.evals.lm_eval_model import ExportedModel

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # Beside the checkpoints there is room for one more of them; in /tmp perhaps not.
    with scratch_folder(run.evaluations / "export") as folder:
        step, config = export_newest(run, folder)
        model = ExportedModel(
            folder,
            max_length,
            config.train.microbatch * config.data.seq_len,
            device,
            getattr(torch, config.train.dtype) if device.type == "cuda" else torch.float32,
        )
    return step, model


def _ask(
    model: "ExportedModel",
    loaded: "LoadedTasks",
    shots: int,
    limit: int | None,
    progress: Progress,
) -> Iterator[Score]:
    from lm_eval.evaluator import evaluate as run_harness

    torch.manual_seed(SEED)
    model.progress = lambda what, done, total: progress(f"{what}, {shots}-shot", done, total)
    model.truncated.clear()
    results = run_harness(
        model, loaded.harness, limit=limit, bootstrap_iters=BOOTSTRAPS, log_samples=False
    )
    for name, metrics in results["results"].items():
        yield from _scores(name, metrics, results, loaded, model, shots)


def _scores(
    name: str,
    metrics: Mapping[str, Any],
    results: Mapping[str, Any],
    loaded: "LoadedTasks",
    model: "ExportedModel",
    shots: int,
) -> Iterator[Score]:
    """The rows of a task or group."""
    group = loaded.harness.get("groups", {}).get(name)
    tasks = group.get_all_tasks() if group else [loaded.tasks[name]]
    chance = _chance(tasks)
    for key, value in metrics.items():
        metric, _, chosen = key.partition(",")
        if not chosen or metric.endswith("_stderr"):
            continue
        better = results["higher_is_better"].get(name, {}).get(metric)
        yield Score(
            task=name,
            metric=metric,
            filter=chosen,
            shots=shots,
            value=_finite(value),
            stderr=_finite(metrics.get(f"{metric}_stderr,{chosen}")),
            chance=chance if metric.startswith("acc") else None,
            higher_is_better=better is not False,
            samples=metrics["sample_len"],
            version=_version(results["versions"].get(name)),
            harness=version("lm_eval"),
            max_length=model.max_length,
            requests=sum(len(task.instances) for task in tasks),
            truncated=sum(model.truncated[task.task_name] for task in tasks),
        )


def _version(told: Any) -> str:
    return "" if told in NO_VERSIONS else str(told)


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _chance(tasks: list[Any]) -> float | None:
    """The share of questions that a guess among the choices answers, if all have choices."""
    if any(task.OUTPUT_TYPE != "multiple_choice" for task in tasks):
        return None
    shares = []
    for task in tasks:
        for doc in {instance.doc_id: instance.doc for instance in task.instances}.values():
            right = task.doc_to_target(doc)
            count = len(right) if isinstance(right, list) else 1
            shares.append(count / len(task.doc_to_choice(doc)))
    return fmean(shares)


def _keep(run: RunDirectory, found: HarnessEvaluation) -> HarnessEvaluation:
    """Write the rows down, in place of those of the same tasks and numbers of examples."""
    path = run.evaluation(SUITE, found.step)
    new = {(row.task, row.shots) for row in found.rows}
    before = json.loads(path.read_text())["rows"] if path.exists() else []
    kept = [row for row in before if (row["task"], row["shots"]) not in new]
    tree = {"step": found.step, "rows": kept + [asdict(row) for row in found.rows]}
    write_atomically(path, json.dumps(tree, indent=1) + "\n")
    return found
