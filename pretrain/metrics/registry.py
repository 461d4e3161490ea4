"""Every number a run reports: its name, unit, formula and meaning, in one table.

`python -m pretrain.metrics.registry` writes the table to docs/metrics.md.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path


@dataclass(frozen=True)
class Metric:
    """A number logged at a step.

    Attributes:
        name: `group/name`, the key in metrics.jsonl, W&B and the report.
        unit: what one of it is; "1" for a plain ratio.
        formula: how it is computed from what the step saw.
        help: what it tells the person who watches the run.
    """

    name: str
    unit: str
    formula: str
    help: str


QUESTIONS = "questions with each token of the answer likeliest, given those before it / questions"

METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric(
            "train/step",
            "steps",
            "optimizer steps finished, the first is 1",
            "The horizontal axis of every chart; each logged step stands once in metrics.jsonl.",
        ),
        Metric(
            "train/loss",
            "nats/token",
            "sum of -ln p(token) over the loss tokens of the global batch / their global count",
            "Cross-entropy alone, without the balance loss. It should fall below the unigram "
            "entropy of the tokens within the first steps.",
        ),
        Metric(
            "train/aux_loss",
            "1",
            "mean over expert layers of E * sum_e f_e P_e",
            "Balance loss; the gradient is that of train/loss + model.moe.aux_loss * this + "
            "model.moe.z_loss * train/z_loss. f_e are the expert frequencies of the previous step "
            "(of each sequence with model.moe.balance=sequence), P_e this step's mean router "
            "probabilities. 1 is balanced, E is everything to one expert. With "
            "model.moe.balance=bias it is measured only, and has no gradient.",
        ),
        Metric(
            "train/z_loss",
            "1",
            "mean over tokens and expert layers of logsumexp(router logits)^2",
            "How large the routers' logits are; model.moe.z_loss keeps it from growing.",
        ),
        Metric(
            "train/tokens",
            "tokens",
            "tokens trained on since step 0, over all ranks",
            "Cumulative, across restarts.",
        ),
        Metric(
            "train/seq_len",
            "tokens",
            "data.seq_len",
            "Changes where a phase of the run sets another one.",
        ),
        Metric(
            "train/grad_norm",
            "1",
            "L2 norm of the gradient of all parameters, before clipping",
            "Spikes come before divergence; compare it with optim.clip.",
        ),
        Metric(
            "train/lr",
            "1",
            "learning rate of this step's update",
            "The schedule as it was applied.",
        ),
        Metric(
            "guard/skipped",
            "batches",
            "global batches of this attempt that left the weights as they were",
            "For a loss or a gradient that was not finite, or after a spike; the ledger and "
            "`farspan audit` name each of them, and why.",
        ),
        Metric(
            "guard/rollbacks",
            "1",
            "how often this attempt has gone back to a checkpoint because of a spike",
            "Rows of the steps that were undone are no longer there.",
        ),
        Metric(
            "perf/tokens_per_s",
            "tokens/s",
            "tokens of the global batch / perf/step_s",
            "Throughput of the whole run, not of one rank.",
        ),
        Metric(
            "perf/step_s",
            "s",
            "wall-clock time of the step, waiting for data included",
            "A step that stands out is a slow rank or a stalled loader. Checkpoints are not in it.",
        ),
        Metric(
            "perf/data_wait_s",
            "s",
            "part of perf/step_s spent waiting for the next batch",
            "Near zero unless the loader is the bottleneck.",
        ),
        Metric(
            "perf/slowest_rank",
            "rank",
            "argmax over ranks of the time per step outside of collectives, since the last report",
            "The rank that waits least for the others, and so keeps them waiting. From heartbeats, "
            "every 10 s and 5 steps at least; on GPUs unless TORCH_NCCL_ENABLE_TIMING=0.",
        ),
        Metric(
            "perf/slowest_over_median",
            "1",
            "the time of perf/slowest_rank / the median over ranks",
            "1 is even. Above 1.25 for the same rank in three reports in a row, the log warns, and "
            "names its host. Stages of a pipeline may differ by their layers.",
        ),
        Metric(
            "moe/load",
            "share",
            "token-slots sent to the expert / token-slots of the layer, as [layers][experts]",
            "Each layer's shares add up to 1; balanced routing gives every expert 1 / E.",
        ),
        Metric(
            "moe/max_violation",
            "1",
            "max over layers of (max_e load_e * E - 1)",
            "How much busier than balanced the busiest expert is: 0 is perfect, 1 is twice its "
            "share.",
        ),
        Metric(
            "moe/dead_experts",
            "experts",
            "experts with no token in this step, over all layers",
            "Experts that stay dead are parameters that are not trained.",
        ),
        Metric(
            "moe/dropped",
            "share",
            "token-slots over their expert's capacity / token-slots, over all layers",
            "0 without model.moe.capacity_factor; a token whose slots are all dropped passes the "
            "experts unchanged.",
        ),
        Metric(
            "eval/needle",
            "share",
            QUESTIONS,
            "One value that stands once in the document, by how much comes before it. This and "
            "those below are of `farspan eval --suite long`, in RUN/evals, not in metrics.jsonl.",
        ),
        Metric(
            "eval/multi_key",
            "share",
            QUESTIONS,
            "Each of several keys has a value; to mix them up is wrong.",
        ),
        Metric(
            "eval/multi_value",
            "share",
            QUESTIONS,
            "All values of a key, in their order.",
        ),
        Metric(
            "eval/variable_tracking",
            "share",
            QUESTIONS,
            "All variables of a chain of copies, from the value that its first one got.",
        ),
        Metric(
            "eval/overwrite",
            "share",
            QUESTIONS,
            "The last of several values that were written for a key.",
        ),
        Metric(
            "eval/loss_by_position",
            "nats/token",
            "mean of -ln p(token) over tokens predicted from 2^n to 2^(n+1) - 1 others",
            "It falls as far as more context helps; where it rises, the context is too long.",
        ),
    )
}


def check_names(names: Iterable[str]) -> None:
    """Raise ValueError for a name that is not registered, with the nearest one that is."""
    for name in names:
        if name not in METRICS:
            nearest = get_close_matches(name, METRICS, n=1, cutoff=0)
            raise ValueError(
                f"metric {name!r} is not registered (nearest: {nearest[0]!r}); "
                "add it to METRICS in pretrain/metrics/registry.py"
            )


def as_markdown() -> str:
    """The table as the page docs/metrics.md."""
    rows = [
        f"| `{metric.name}` | {metric.unit} | {metric.formula} | {metric.help} |"
        for metric in METRICS.values()
    ]
    return "\n".join(
        [
            "# Metrics",
            "",
            "Made from `pretrain/metrics/registry.py` by `python -m pretrain.metrics.registry`.",
            "",
            "One row of `metrics.jsonl` is a JSON object with some of these names. A value that is",
            'not finite is one of the strings `"NaN"`, `"Infinity"` and `"-Infinity"`, so that',
            "every row is valid JSON.",
            "",
            "| name | unit | formula | what it tells |",
            "| --- | --- | --- | --- |",
            *rows,
            "",
        ]
    )


if __name__ == "__main__":
    page = Path(__file__).resolve().parents[2] / "docs" / "metrics.md"
    page.write_text(as_markdown())
