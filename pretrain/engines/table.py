"""What each engine can do, as docs/engines.md has it: asked of the checks that refuse it."""

from dataclasses import dataclass

from pretrain.config import load_config
from pretrain.engines.choice import check_engine
from pretrain.errors import UserError
from pretrain.layouts import resolve_layout

ENGINES = ("native", "megatron", "deepspeed")
RECIPE = "tiny-hybrid-moe"
RANKS = 4
SOFTMAX_ONLY = "model.layer_pattern=[softmax]"


@dataclass(frozen=True)
class Probe:
    """Something to ask of every engine.

    Attributes:
        settings: that differ from `RECIPE`, and show in the table.
        besides: settings that it needs, and that do not.
    """

    title: str
    settings: tuple[str, ...]
    besides: tuple[str, ...] = ()


PROBES = (
    Probe("ranks with other rows", ("parallel.dp_shard=4",)),
    Probe("replicas of sharded weights", ("parallel.dp_replicate=2",)),
    Probe("tensor and sequence parallel", ("parallel.tp=2", "parallel.ep=2")),
    Probe("the same, experts in parts", ("parallel.tp=2",)),
    Probe("expert parallel", ("parallel.ep=2",)),
    Probe("pipeline", ("parallel.pp=2",)),
    Probe("stages by turns", ("parallel.pp=2", "parallel.pipeline.schedule=interleaved")),
    Probe("without bubbles", ("parallel.pp=2", "parallel.pipeline.schedule=zbv")),
    Probe("stages of unequal size", ("parallel.pp=2", "parallel.pipeline.layers_per_stage=[1,3]")),
    Probe("context parallel, hybrid model", ("parallel.cp=2",)),
    Probe("Ulysses, softmax layers", ("parallel.cp=2", "parallel.ulysses=2"), (SOFTMAX_ONLY,)),
    Probe("Ulysses, hybrid model", ("parallel.cp=2", "parallel.ulysses=2")),
    Probe("Ulysses inside a ring", ("parallel.cp=4", "parallel.ulysses=2"), (SOFTMAX_ONLY,)),
    Probe("rows in segments", ("context.segments=2",)),
    Probe("rows that go on in the next step", ("context.lane_rows=2", "context.carry=true")),
    Probe("balanced by a selection bias", ("model.moe.balance=bias",)),
    Probe("balanced by sequence", ("model.moe.balance=sequence",)),
    Probe("experts of limited capacity", ("model.moe.capacity_factor=1.5",)),
    Probe("bf16", ("train.dtype=bfloat16",)),
    Probe("recomputation", ("parallel.recompute=full",)),
    Probe("of parts of layers", ("parallel.recompute=selective",)),
    Probe("feed-forward in tiles", ("parallel.feed_forward_tile=64",)),
    Probe("activations elsewhere", ("parallel.offload=host",), ("parallel.recompute=full",)),
    Probe("ZeRO 1, 2", ("parallel.zero.stage=1",)),
    Probe("optimizer in host memory", ("parallel.zero.offload_optimizer=true",)),
    Probe("weights in host memory", ("parallel.zero.offload_parameters=true",)),
    Probe("moments in bf16", ("optim.state_dtype=bfloat16",)),
    Probe("updates in the backward pass", ("optim.in_backward=true",), ("optim.clip=null",)),
    Probe("DeepEP", ("parallel.dispatcher=deepep",), ("parallel.ep=2",)),
    Probe("held-out text", ("eval.every=10", "eval.sources=sample")),
)


def table() -> str:
    """Markdown: a line for each probe, "yes" or why not for each engine."""
    lines = [
        f"| | settings | {' | '.join(ENGINES)} |",
        f"|---|---|{'---|' * len(ENGINES)}",
    ]
    for probe in PROBES:
        settings = " ".join(f"`{setting}`" for setting in probe.settings)
        answers = " | ".join(answer(engine, probe) for engine in ENGINES)
        lines.append(f"| {probe.title} | {settings} | {answers} |")
    return "\n".join(lines) + "\n"


def answer(engine: str, probe: Probe) -> str:
    """ "yes", or why `engine` refuses a model of `RECIPE` on `RANKS` ranks."""
    # What farspan itself does not know is a mistake in a probe, and no answer.
    config = load_config(RECIPE, [*probe.settings, *probe.besides, f"train.engine={engine}"])
    layout = resolve_layout(config, RANKS)
    try:
        check_engine(config, layout)
    except UserError as error:
        reasons = dict.fromkeys(map(gist, problems(str(error))))
        return f"no: {' and '.join(reasons)}"
    return "yes"


def problems(refusal: str) -> list[str]:
    """The problems that a refusal lists, or the one that it is."""
    listed = [line.removeprefix("- ") for line in refusal.splitlines() if line.startswith("- ")]
    return listed or [refusal]


def gist(problem: str) -> str:
    """Why, without the setting and what to set instead."""
    setting, _, why = problem.partition(": ")
    return (why or setting).partition(";")[0]


if __name__ == "__main__":
    print(table(), end="")
