"""The W&B dashboard of farspan's runs, as code: sections of panels over registered metrics."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.wandb_sync import connect
from pretrain.errors import TrainingError, UserError
from pretrain.metrics.registry import METRICS

NAME = "farspan"
# What W&B calls the saved view; a second push replaces it.
VIEW = "nw-farspan-v"
LONG_TASKS = tuple(
    f"eval/{task}"
    for task in ("needle", "multi_key", "multi_value", "variable_tracking", "overwrite")
)
COLUMNS, WIDTH, HEIGHT = 3, 8, 6


@dataclass(frozen=True)
class Panel:
    """A chart over train/step.

    Attributes:
        metrics: their names in the registry, of one unit. A list such as moe/load is a heat map of
            its histogram; of a mapping such as perf/sent_bytes_by_axis, or a list by position, each
            number is a line.
    """

    title: str
    metrics: tuple[str, ...]
    log_y: bool = False
    is_mapping: bool = False


SECTIONS: dict[str, tuple[Panel, ...]] = {
    "Training health": (
        Panel("Loss", ("train/loss",)),
        Panel("Gradient norm, before clipping", ("train/grad_norm",), log_y=True),
        Panel("Learning rate", ("train/lr",)),
        Panel("Update / weight", ("train/update_ratio",), log_y=True),
        Panel("Weight norm", ("train/weight_norm",)),
        Panel("Tokens trained on", ("train/tokens",)),
        Panel("Gradient norm by layer", ("train/grad_norm_by_layer",)),
        Panel("Update / weight by layer", ("train/update_ratio_by_layer",)),
        Panel("Weight norm by layer", ("train/weight_norm_by_layer",)),
    ),
    "MoE": (
        Panel("Expert load", ("moe/load",)),
        Panel("How much busier the busiest expert is", ("moe/max_violation",), log_y=True),
        Panel("Experts without a token", ("moe/dead_experts",)),
        Panel("Router entropy", ("moe/router_entropy",)),
        Panel("Dropped token-slots", ("moe/dropped",)),
        Panel("Balance loss", ("train/aux_loss",)),
        Panel("Router z-loss", ("train/z_loss",), log_y=True),
        Panel("Range of the selection bias", ("moe/selection_bias_range",)),
    ),
    "Long context": (
        Panel("Length of a row", ("train/seq_len",), log_y=True),
        Panel("Loss, which falls where more context helps", ("train/loss",)),
        Panel("Loss by tokens before", ("train/loss_by_position",), is_mapping=True),
        Panel("Tokens by tokens before", ("train/loss_tokens_by_position",), is_mapping=True),
        Panel("Peak memory", ("perf/memory_peak",)),
        Panel("Time of a step", ("perf/step_s",), log_y=True),
    ),
    "Performance": (
        Panel("Throughput", ("perf/tokens_per_s",)),
        Panel("Throughput per device", ("perf/tokens_per_s_per_device",)),
        Panel("Utilization of the hardware", ("perf/mfu", "perf/hfu")),
        Panel("FLOPs per device", ("perf/tflops_per_device",)),
        Panel("Time of a step", ("perf/step_s",), log_y=True),
        Panel("Bytes that rank 0 sends", ("perf/sent_bytes",)),
        Panel("The same by axis", ("perf/sent_bytes_by_axis",), is_mapping=True),
        Panel("Communication that nothing hides", ("perf/exposed_communication_s",)),
        Panel("The same / step", ("perf/exposed_communication_share",)),
        Panel("Pipeline bubble", ("perf/pipeline_bubble", "perf/pipeline_bubble_predicted")),
        Panel("Memory", ("perf/memory_allocated", "perf/memory_reserved", "perf/memory_peak")),
    ),
    "Data": (
        Panel("Share of the step that waits for data", ("perf/data_wait_share",)),
        Panel("Wait for data", ("perf/data_wait_s",), log_y=True),
        Panel("Tokens with a loss", ("train/loss_tokens",)),
        Panel("Loss by source", ("train/loss_by_source",), is_mapping=True),
        Panel("Tokens with a loss by source", ("train/loss_tokens_by_source",), is_mapping=True),
    ),
    "Reliability": (
        Panel("Share of the time in steps that stand", ("perf/goodput", "perf/ettr")),
        Panel("Time lost by cause", ("perf/lost_s",), is_mapping=True),
        Panel("Time in steps that stand", ("perf/productive_s",)),
        Panel("Batches skipped by the guard", ("guard/skipped",)),
        Panel("Rollbacks", ("guard/rollbacks",)),
        Panel("Slowest rank", ("perf/slowest_rank",)),
        Panel("Slowest rank / median", ("perf/slowest_over_median",)),
        Panel("Stall of a checkpoint", ("perf/checkpoint_stall_s",)),
        Panel("Stall of an evaluation", ("perf/evaluation_s",)),
    ),
    "Evaluation": (
        Panel("Loss on held-out text", ("eval/heldout_loss",), is_mapping=True),
        Panel("Perplexity of held-out text", ("eval/heldout_perplexity",), True, is_mapping=True),
        Panel("Loss by tokens before", ("eval/loss_by_position",), is_mapping=True),
        *(
            Panel(name.removeprefix("eval/").replace("_", " "), (name,), is_mapping=True)
            for name in METRICS
            if name.startswith("eval/icl_") or name in LONG_TASKS
        ),
        Panel("Tasks of lm-evaluation-harness", ("eval/lm_eval",), is_mapping=True),
    ),
}


def workspace_of(entity: str, project: str) -> Any:
    """The dashboard as a wandb_workspaces.Workspace; needs neither a network nor a key."""
    import wandb_workspaces.workspaces as ws

    sections = [
        ws.Section(
            name=name,
            is_open=True,
            panels=[_chart(name, number, panel) for number, panel in enumerate(panels)],
        )
        for name, panels in SECTIONS.items()
    ]
    settings = ws.WorkspaceSettings(x_axis="train/step")
    workspace = ws.Workspace(
        entity=entity, project=project, name=NAME, sections=sections, settings=settings
    )
    workspace._internal_name = VIEW
    workspace._internal_runset_id = "runs"
    return workspace


def _chart(section: str, number: int, panel: Panel) -> Any:
    import wandb_workspaces.reports.v2 as wr

    row, column = divmod(number, COLUMNS)
    chart = wr.LinePlot(
        title=panel.title,
        x="train/step",
        y=[] if panel.is_mapping else list(panel.metrics),
        metric_regex=f"{panel.metrics[0]}/.*" if panel.is_mapping else None,
        title_y=METRICS[panel.metrics[0]].unit,
        log_y=panel.log_y or None,
        layout=wr.Layout(x=column * WIDTH, y=row * HEIGHT, w=WIDTH, h=HEIGHT),
    )
    # W&B's own would be drawn at random: an export would differ each time.
    chart._id = f"{section} {number}".lower().replace(" ", "-")
    return chart


def export_dashboard(entity: str, project: str, out: Path | None) -> None:
    """Write the dashboard as the JSON that W&B's server takes.

    Args:
        out: a file, None for stdout.
    """
    model = workspace_of(entity, project)._to_model()
    text = model.model_dump_json(by_alias=True, exclude_none=True, indent=1) + "\n"
    if out is None:
        print(text, end="")
        return
    try:
        out.write_text(text)
    except OSError as error:
        raise UserError(
            f"{out} cannot be written: {error.strerror}; choose another --out"
        ) from None


def push_dashboard(entity: str | None, project: str) -> None:
    """Make the dashboard a saved view of a project, or bring it up to date.

    Args:
        entity: None: what the account has as its default.

    Raises:
        UserError: no key, no such project.
        TrainingError: the server does not answer.
    """
    import wandb

    api = connect()
    workspace = workspace_of(entity or api.default_entity, project)
    try:
        workspace._internal_id = _id_of_view(workspace.entity, project)
        workspace.save()
    except wandb.errors.Error as error:
        raise TrainingError(f"W&B does not take the dashboard: {error}") from error
    print(workspace.url)


def _id_of_view(entity: str, project: str) -> str:
    """Of the dashboard that is there already; an empty string, for a new one, if there is none.

    Raises UserError: no such project.
    """
    from wandb_workspaces.workspaces import internal

    try:
        return str(internal.get_view_dict(entity, project, NAME)["id"])
    except ValueError as error:
        if str(error).startswith("Project"):
            raise UserError(
                f"{entity} has no project {project!r} at W&B: train with wandb.mode=online, or "
                "`farspan wandb sync RUN`, and it is made"
            ) from None
        return ""
