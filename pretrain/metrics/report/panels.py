"""Which charts the report has, in which sections and in which order."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Lines:
    """Metrics over the steps, in one chart; of a metric that is a mapping, each of its parts.

    Attributes:
        from_zero: the axis begins at zero.
        is_noisy: smoothing helps to read it.
        is_wide: it has the width of the page.
    """

    title: str
    metrics: tuple[str, ...]
    from_zero: bool = False
    is_noisy: bool = True
    is_wide: bool = False


@dataclass(frozen=True)
class Map:
    """A metric that is a list, as a heat map over the steps.

    Attributes:
        rows: what the list runs over: `layers` or `positions`.
    """

    title: str
    metric: str
    rows: str


@dataclass(frozen=True)
class Loads:
    """The load of each expert, a heat map for each layer."""

    title: str = "Expert load"
    metric: str = "moe/load"


Panel = Lines | Map | Loads


@dataclass(frozen=True)
class Section:
    """
    Attributes:
        fragments: what stands below its charts, by the ids of the elements.
    """

    title: str
    panels: Sequence[Panel] = ()
    fragments: Sequence[str] = ()


SECTIONS = (
    Section(
        "Training",
        (
            Lines("Loss", ("train/loss",), is_wide=True),
            Lines("Learning rate", ("train/lr",), from_zero=True, is_noisy=False),
            Lines("Gradient norm", ("train/grad_norm",), from_zero=True),
            Lines("Change of the weights", ("train/update_ratio",), from_zero=True),
            Lines("Norm of the weights", ("train/weight_norm",), is_noisy=False),
            Map("Gradient norm by layer", "train/grad_norm_by_layer", "layers"),
            Map("Change of the weights by layer", "train/update_ratio_by_layer", "layers"),
            Map("Norm of the weights by layer", "train/weight_norm_by_layer", "layers"),
        ),
    ),
    Section(
        "Experts",
        (
            Lines("Balance loss", ("train/aux_loss",)),
            Lines("Busiest expert", ("moe/max_violation",), from_zero=True),
            Lines("Router entropy", ("moe/router_entropy",), from_zero=True),
            Lines("Router logits", ("train/z_loss",), from_zero=True),
            Lines("Experts without a token", ("moe/dead_experts",), from_zero=True),
            Lines("Dropped tokens", ("moe/dropped",), from_zero=True),
            Lines("Selection bias", ("moe/selection_bias_range",), from_zero=True),
            Loads(),
        ),
    ),
    Section(
        "Long context",
        (
            Map("Loss by position", "train/loss_by_position", "positions"),
            Lines("Tokens per sequence", ("train/seq_len",), from_zero=True, is_noisy=False),
        ),
        ("long",),
    ),
    Section(
        "Performance",
        (
            Lines("Throughput", ("perf/tokens_per_s",), from_zero=True),
            Lines("Throughput of a device", ("perf/tokens_per_s_per_device",), from_zero=True),
            Lines("FLOPs utilization", ("perf/mfu", "perf/hfu"), from_zero=True),
            Lines("Model FLOPs of a device", ("perf/tflops_per_device",), from_zero=True),
            Lines("Time of a step", ("perf/step_s",), from_zero=True),
            Lines(
                "Time that training waits",
                (
                    "perf/data_wait_s",
                    "perf/exposed_communication_s",
                    "perf/checkpoint_stall_s",
                    "perf/evaluation_s",
                ),
                from_zero=True,
            ),
            Lines(
                "Share of a step that waits",
                ("perf/data_wait_share", "perf/exposed_communication_share"),
                from_zero=True,
            ),
            Lines(
                "Pipeline bubble",
                ("perf/pipeline_bubble", "perf/pipeline_bubble_predicted"),
                from_zero=True,
            ),
            Lines("Sent bytes by axis", ("perf/sent_bytes_by_axis",), from_zero=True),
            Lines("Sent bytes", ("perf/sent_bytes",), from_zero=True),
            Lines(
                "Memory",
                ("perf/memory_peak", "perf/memory_reserved", "perf/memory_allocated"),
                from_zero=True,
                is_noisy=False,
            ),
            Lines("Slowest rank over the median", ("perf/slowest_over_median",)),
            Lines("Slowest rank", ("perf/slowest_rank",), from_zero=True, is_noisy=False),
        ),
    ),
    Section(
        "Data",
        (
            Lines("Loss by source", ("train/loss_by_source",)),
            Lines(
                "Tokens with a label by source", ("train/loss_tokens_by_source",), from_zero=True
            ),
            Lines("Tokens with a label", ("train/loss_tokens",), from_zero=True),
            Lines("Tokens trained on", ("train/tokens",), from_zero=True, is_noisy=False),
        ),
        ("funnel",),
    ),
    Section(
        "Reliability",
        (
            Lines("Goodput", ("perf/goodput", "perf/ettr"), from_zero=True, is_noisy=False),
            Lines(
                "Batches skipped, and rollbacks",
                ("guard/skipped", "guard/rollbacks"),
                from_zero=True,
                is_noisy=False,
            ),
            Lines("Time lost", ("perf/lost_s",), from_zero=True, is_noisy=False),
            Lines("Productive time", ("perf/productive_s",), from_zero=True, is_noisy=False),
        ),
        ("lost-time", "events", "attempts"),
    ),
    Section(
        "Evaluation",
        (
            Lines("Held-out loss", ("eval/heldout_loss",), is_noisy=False),
            Lines("Held-out perplexity", ("eval/heldout_perplexity",), is_noisy=False),
        ),
        ("evaluations",),
    ),
    Section("Configuration", fragments=("settings",)),
)
# The horizontal axis.
STEP = "train/step"
