"""Rows far longer than what fits: a step with exact gradients, one segment at a time."""

import gc
import math
import time
from functools import partial
from typing import Any, NamedTuple

import torch

from bench.gpu_step import MODEL, Model
from bench.gpu_tools import Machine, print_table
from parallel.recompute import Recompute
from pretrain.metrics.flops import forward_flops
from pretrain.model.config import AttentionConfig, LinearAttentionConfig, ModelConfig, MoEConfig

# That of the recipe hybrid-1b-1m: 1.1 of 4.5 billion weights work on a token.
HYBRID_1B = ModelConfig(
    vocab_size=151936,
    d_model=1536,
    n_layers=24,
    attention=AttentionConfig(12, 2, 128, rope_base=6e8, rope_fraction=0.5),
    linear=LinearAttentionConfig(12, 24, 128, 128),
    moe=MoEConfig(n_experts=64, top_k=8, d_expert=512, d_shared_expert=512),
)
# What a step with recompute takes in units of its first pass, which leaves out the last segment:
# forward, twice, and backward, of attention two and a half times as long or more. What takes longer
# than is allowed is lost.
STEP_TO_FIRST_PASS = 6.5


class Run(NamedTuple):
    """What is tried, the shortest row first.

    Attributes:
        lengths: of the row; the first warms up.
        segment: tokens at a time.
        patience_s: for all lengths.
    """

    name: str
    config: ModelConfig
    recompute: Recompute
    lengths: tuple[int, ...]
    segment: int
    patience_s: float


DOUBLED = Run("0.3B of 1.1B", MODEL, "none", (1 << 16, 1 << 18, 1 << 20), 1 << 15, 170.0)
# Three quarters of the row where a whole one would take too long.
MILLION = Run("1.1B of 4.5B", HYBRID_1B, "full", (1 << 16, 1 << 20, 3 << 18), 1 << 15, 520.0)
SMOKE = Run("smoke", MODEL, "full", (128, 256), 64, 1e9)


class TooLongError(Exception):
    """A step would outlast patience."""


def doubled(machine: Machine) -> bool:
    """Lengthen the row until memory or patience ends."""
    return run(machine, DOUBLED)


def million(machine: Machine) -> bool:
    """A step of the recipe hybrid-1b-1m."""
    return run(machine, MILLION)


def run(machine: Machine, asked: Run) -> bool:
    print(
        "A step of one sequence in segments, exact gradients, AdamW included. FLOP/s: as in "
        "`step`; a step in segments does 4/3 of them, 5/3 with recompute. Predicted: the peak of "
        "the shortest row, and what later segments are handed on top. Gradient: its norm, before "
        "clipping.\n"
    )
    rows = rows_of(machine, SMOKE if machine.is_smoke else asked)
    gc.collect()
    if machine.device.type == "cuda":
        torch.cuda.empty_cache()
    header = ["active", "recompute", "tokens", "segment", "s", "tokens/s", "TFLOP/s", "peak GB"]
    print_table([*header, "predicted", "gradient"], rows)
    return bool(rows) and all(math.isfinite(float(row[-1] or 0)) for row in rows)


def rows_of(machine: Machine, asked: Run) -> list[list[str]]:
    end = time.perf_counter() + asked.patience_s
    model = Model(machine, asked.recompute, asked.config, asked.segment)
    known = [asked.name, asked.recompute]
    rows: list[list[str]] = []
    first: tuple[int, float] | None = None
    for length in asked.lengths:
        batch = model.batch(length)
        if first is None:
            model.step(*batch)
        progress = Progress(machine, model, length // asked.segment, end)
        try:
            peak = machine.peak_gb(partial(model.step, *batch))
        except TooLongError as error:
            print(f"{length} tokens: {error}", flush=True)
            continue
        except torch.OutOfMemoryError:
            rows.append([*known, str(length), str(asked.segment), "out of memory", *[""] * 5])
            break
        finally:
            progress.close()
        seconds = progress.seconds()
        first = first or (length, peak)
        predicted = first[1] + handed_gb(model.config, length, first[0], asked.segment)
        flops = 3 * forward_flops(model.config, length) / seconds
        rows.append(
            [
                *known,
                str(length),
                str(asked.segment),
                f"{seconds:.2f}",
                f"{length / seconds:.0f}",
                f"{flops / 1e12:.0f}",
                f"{peak:.1f}",
                f"{predicted:.1f}",
                f"{float(model.gradient_norm):.3g}",
            ]
        )
        print(*rows[-1], flush=True)
        if length == max(asked.lengths):
            break
    return rows


class Progress:
    """Prints where a step is, so that one that is cut off tells how far it came.

    Args:
        segments: of the row.
        end: by `time.perf_counter`; a step that will not be done by then ends with TooLongError
            after its first pass.
    """

    def __init__(self, machine: Machine, model: Model, segments: int, end: float) -> None:
        self.machine, self.segments, self.end = machine, segments, end
        self.begun = 0
        self.start = time.perf_counter()
        stage = model.parallelised.stages[0]
        self._hook = stage.register_forward_pre_hook(self._begin)

    def seconds(self) -> float:
        """Since the step began."""
        self.machine.synchronize()
        return time.perf_counter() - self.start

    def close(self) -> None:
        self._hook.remove()

    def _begin(self, stage: Any, arguments: Any) -> None:
        first_pass, now = self.segments - 1, self.seconds()
        if self.begun % 4 == 3 or self.begun == first_pass:
            of_pass = f"{self.begun} of {first_pass} segments forward"
            if self.begun >= first_pass:
                of_pass = f"{self.begun - first_pass} of {self.segments} segments back"
            print(f"{self.segments} segments: {of_pass} after {now:.1f} s", flush=True)
        if self.begun == first_pass and self.start + STEP_TO_FIRST_PASS * now > self.end:
            raise TooLongError(f"a first pass of {now:.1f} s leaves no time for the second")
        self.begun += 1


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
