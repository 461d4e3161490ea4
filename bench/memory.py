"""What each memory tool saves, and what it costs: one after the other, each on top of those before.

    python -m bench.memory

A training step of a small hybrid with experts on one rank, in float32, of a short row and of a long
one in segments: the most bytes of tensors at a time, as `farspan train --explain-memory` counts
them; those of them that last (weights, gathered weights, gradients, optimizer state); what the
forward pass keeps for the backward pass; and the CPU seconds of a step, without counting, with one
thread.
"""

import tempfile
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from bench.gated_delta import cpu_model
from pretrain.build import build_mesh, build_model, open_store
from pretrain.config import Config, load_config
from pretrain.dry_run.measure import measure
from pretrain.dry_run.step import Step
from pretrain.dry_run.tracker import GATHERED, GRADIENTS, OPTIMIZER, WEIGHTS, StepTracker
from pretrain.layouts import resolve_layout
from pretrain.model.init import initialize

TOKENS = 4096
CPU = torch.device("cpu")
MODEL = [
    "model.vocab_size=8192",
    "model.d_model=256",
    "model.moe={n_experts: 8, top_k: 2, d_expert: 128, d_shared_expert: 128}",
    f"data.seq_len={TOKENS}",
    "train.global_batch=1",
    "train.microbatch=1",
    f"train.loss_chunk={TOKENS}",
    "optim.clip=null",
]
# What is measured, and the settings that are added for it.
TOOLS = {
    "nothing": [],
    "loss in chunks of 512 tokens": ["train.loss_chunk=512"],
    "recompute selective": ["parallel.recompute=selective"],
    "recompute full": ["parallel.recompute=full"],
    "feed-forward tiles of 512": ["parallel.feed_forward_tile=512"],
    "offload to disk": ["parallel.offload=disk"],
    "moments in bfloat16": ["optim.state_dtype=bfloat16"],
    "update in backward": ["optim.in_backward=true"],
}
# The same for a longer row.
LONG = 2 * TOKENS
OF_SEGMENTS = {
    "8 segments, recompute full": [
        f"data.seq_len={LONG}",
        "model.layer_pattern=[softmax]",
        "context.segments=8",
        "train.loss_chunk=512",
        "parallel.recompute=full",
    ],
    "offload to disk": ["parallel.offload=disk"],
}
LASTING = (WEIGHTS, OPTIMIZER, GRADIENTS, GATHERED)


class Row(NamedTuple):
    """Bytes, and seconds."""

    peak: int
    lasting: int
    kept: int
    offloaded: int
    seconds: float


def main() -> None:
    dist.init_process_group(
        "gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=timedelta(minutes=5)
    )
    torch.set_num_threads(1)
    print(f"{cpu_model()}; torch {torch.__version__}, one thread")
    compare(TOKENS, TOOLS)
    compare(LONG, OF_SEGMENTS)
    dist.destroy_process_group()


def compare(tokens: int, tools: Mapping[str, Sequence[str]]) -> None:
    """Measure and print."""
    print(f"\na step on a row of {tokens} tokens, each tool on top of those above\n")
    columns = ("peak", "saved", "lasting", "kept", "elsewhere", "seconds")
    print(f"{'':30}" + "".join(f"{name:>13}" for name in columns))
    settings: list[str] = []
    before = None
    with tempfile.TemporaryDirectory() as folder:
        for tool, added in tools.items():
            settings += added
            disk = [f"parallel.offload_dir={folder}"] if "parallel.offload=disk" in settings else []
            row = run(load_config("tiny-hybrid-moe", [*MODEL, *settings, *disk]))
            saved = "" if before is None else f"{1 - row.peak / before:.1%}"
            sizes = (row.lasting, row.kept, row.offloaded)
            print(
                f"{tool:30}{_mib(row.peak)}{saved:>13}{''.join(map(_mib, sizes))}"
                f"{row.seconds:13.2f}",
                flush=True,
            )
            before = row.peak


def run(config: Config) -> Row:
    measured = measure(config, CPU)
    lasting = sum(measured.parts.get(part, 0) for part in LASTING)
    kept, elsewhere = measured.activations, measured.offloaded
    return Row(measured.peak, lasting, kept, elsewhere, _seconds_of_step(config))


def _seconds_of_step(config: Config) -> float:
    layout = resolve_layout(config, 1)
    mesh = build_mesh(config, layout, CPU)
    parallelised = build_model(config, layout, mesh, CPU, store=open_store(config))
    for stage in parallelised.stages:
        stage.to_empty(device=CPU)
        initialize(stage.model, config.model, config.train.seed, _whole)
    step = Step(config, layout, mesh, parallelised, StepTracker({}))
    step.warm_up()
    began = time.process_time()
    step.backward(1)
    step.update()
    return time.process_time() - began


def _whole(weight: Any) -> tuple[slice, ...]:
    return tuple(slice(0, size) for size in weight.shape)


def _mib(n_bytes: int) -> str:
    return f"{n_bytes / 2**20:9.1f} MiB"


if __name__ == "__main__":
    main()
