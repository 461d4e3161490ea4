"""Rows far longer than what fits: a step with exact gradients, one segment at a time."""

import gc
import time
from typing import NamedTuple

import torch

from bench.gpu_step import MODEL, Model
from bench.gpu_tools import Machine, print_table
from parallel.recompute import Recompute
from pretrain.metrics.flops import forward_flops
from pretrain.model.config import ModelConfig, MoEConfig

# 1.3 of 5.6 billion weights work on a token: six periods of `MODEL`, which has 0.3 of 1.1.
HYBRID_1B = ModelConfig(vocab_size=32768, n_layers=24, moe=MoEConfig(n_experts=64, top_k=8))


class Run(NamedTuple):
    """What is tried, the shortest row first.

    Attributes:
        lengths: of the row; the first warms up.
        segment: tokens at a time.
    """

    name: str
    config: ModelConfig
    recompute: Recompute
    lengths: tuple[int, ...]
    segment: int
    patience_s: float


RUNS = (
    Run("0.3B of 1.1B", MODEL, "none", (1 << 16, 1 << 18, 1 << 20), 1 << 15, 170.0),
    Run("1.3B of 5.6B", HYBRID_1B, "full", (1 << 15, 1 << 17, 1 << 18, 1 << 19), 1 << 15, 90.0),
)
SMOKE = (Run("smoke", MODEL, "full", (128, 256), 64, 1e9),)


def run(machine: Machine) -> bool:
    """Double the row until memory or patience ends."""
    print(
        "A step of one sequence in segments, exact gradients, AdamW included. FLOP/s: as in "
        "`step`; a step in segments does 4/3 of them, 5/3 with recompute. Predicted: the peak of "
        "the shortest row, and what later segments are handed on top.\n"
    )
    rows = []
    for of_model in SMOKE if machine.is_smoke else RUNS:
        rows += rows_of(machine, of_model)
        gc.collect()
        if machine.device.type == "cuda":
            torch.cuda.empty_cache()
    header = ["active", "recompute", "tokens", "segment", "s", "tokens/s", "TFLOP/s", "peak GB"]
    header.append("predicted")
    print_table(header, rows)
    return bool(rows)


def rows_of(machine: Machine, asked: Run) -> list[list[str]]:
    model = Model(machine, asked.recompute, asked.config, asked.segment)
    known = [asked.name, asked.recompute]
    segment, rows = asked.segment, []
    first: tuple[int, float] | None = None
    last, last_s, began = 1, 0.0, time.perf_counter()
    for length in asked.lengths:
        # Between linear and quadratic.
        expected_s = last_s * (length / last) ** 1.5
        if time.perf_counter() - began + expected_s > asked.patience_s:
            break
        batch = model.batch(length)
        try:
            if first is None:
                model.step(*batch)
            start = time.perf_counter()
            peak = machine.peak_gb(lambda batch=batch: model.step(*batch))
        except torch.OutOfMemoryError:
            rows.append([*known, str(length), str(segment), "out of memory", "", "", "", ""])
            break
        last, last_s = length, time.perf_counter() - start
        first = first or (length, peak)
        predicted = first[1] + handed_gb(model.config, length, first[0], segment)
        flops = 3 * forward_flops(model.config, length) / last_s
        rows.append(
            [
                *known,
                str(length),
                str(segment),
                f"{last_s:.2f}",
                f"{length / last_s:.0f}",
                f"{flops / 1e12:.0f}",
                f"{peak:.1f}",
                f"{predicted:.1f}",
            ]
        )
        print(*rows[-1], flush=True)
    return rows


def handed_gb(config: ModelConfig, length: int, shortest: int, segment: int) -> float:
    """What a row has beyond the shortest: states, and keys and values of attention without a
    window in bf16, their gradients in float32, and those of the last segment on their way.
    """
    kinds, attention, linear = config.layer_kinds(), config.attention, config.linear
    of_token = 2 * attention.n_kv_heads * attention.head_dim
    # Kept, its gradient, joined, stacked, and the gradient of that in float32 and in bf16.
    keys = (length - shortest) * of_token * (kinds.count("softmax") * (2 + 4) + 2 + 2 + 4 + 2)
    of_state = 4 * linear.n_value_heads * linear.key_dim * linear.value_dim
    states = (length - shortest) // segment * of_state * kinds.count("linear")
    return (keys + states) / 1e9
