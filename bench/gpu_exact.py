"""The gradients of a row that is recomputed, offloaded or cut into segments, against those of the
row as it is.
"""

import tempfile
import traceback
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from bench.gpu_step import SMOKE_MODEL, Model
from bench.gpu_tools import Machine, print_table
from parallel.fsdp import local_tensor
from parallel.offload import Offload, Where
from parallel.recompute import Recompute
from pretrain.model.config import AttentionConfig, LinearAttentionConfig, ModelConfig, MoEConfig

PATTERN = ("linear", "softmax", "sliding", "linear")
# All tokens go to all experts: a choice that rounding turns would be a difference of its own.
MODEL = ModelConfig(
    vocab_size=4096,
    d_model=1024,
    n_layers=8,
    layer_pattern=PATTERN,
    attention=AttentionConfig(8, 2, 128, window=1024),
    linear=LinearAttentionConfig(4, 8, 128, 128),
    moe=MoEConfig(n_experts=4, top_k=4),
)
# Of |ours - theirs| / |theirs|, the worst weight. bfloat16 is for what is computed by no other
# kernels, and has its rounding twice.
ALLOWED = {torch.float32: 1e-3, torch.bfloat16: 1e-1}
SEGMENTS = 4
# What is offloaded in the second takes the places of the first.
STEPS = 2


class Way(NamedTuple):
    """How a row is computed."""

    segments: int = 1
    recompute: Recompute = "none"
    offload: Where | None = None

    def __str__(self) -> str:
        parts = [f"{self.segments} segments"] if self.segments > 1 else []
        parts += [f"recompute {self.recompute}"] if self.recompute != "none" else []
        parts += [f"offload to {self.offload}"] if self.offload else []
        return ", ".join(parts)


WAYS = (
    Way(1, "full"),
    Way(1, "selective", "host"),
    Way(SEGMENTS),
    Way(SEGMENTS, "none", "host"),
    Way(SEGMENTS, "full", "host"),
    Way(SEGMENTS, "full", "disk"),
)


def run(machine: Machine) -> bool:
    """Print the table; whether all agree."""
    rows, is_right = [], True
    for dtype, allowed in ALLOWED.items():
        type_name = str(dtype).removeprefix("torch.")
        try:
            errors = all_errors(machine, dtype)
        except Exception:
            traceback.print_exc()
            rows.append(["", type_name, "failed", "", "", "**wrong**"])
            is_right = False
            continue
        for way, (worst, offloaded) in errors.items():
            passed = worst <= allowed
            is_right &= passed
            numbers = [f"{worst:.1e}", f"{allowed:.0e}", f"{offloaded / 2**20:.1f}"]
            rows.append([str(way), type_name, *numbers, "ok" if passed else "**wrong**"])
    print_table(["a row", "type", "worst error", "allowed", "offloaded, MiB", ""], rows)
    return is_right


def all_errors(machine: Machine, dtype: torch.dtype) -> dict[Way, tuple[float, int]]:
    """Of the weight that is worst, NaN if any is; and the most bytes that were offloaded."""
    expected, _ = gradients(machine, Way(), dtype)
    errors = {}
    for way in WAYS:
        found, offloaded = gradients(machine, way, dtype)
        of_weights = [(found[name] - x).norm() / x.norm() for name, x in expected.items()]
        errors[way] = float(torch.stack(of_weights).max()), offloaded
    return errors


def gradients(machine: Machine, way: Way, dtype: torch.dtype) -> tuple[dict[str, Tensor], int]:
    """Of each weight, float32 on the CPU; the most bytes that were offloaded."""
    config, length = (SMOKE_MODEL, 256) if machine.is_smoke else (MODEL, 16384)
    with tempfile.TemporaryDirectory() as folder:
        store = Offload(way.offload, Path(folder)).open() if way.offload else None
        segment = length // way.segments if way.segments > 1 else None
        model = Model(machine, way.recompute, config, segment, dtype, store)
        torch.manual_seed(0)
        tokens, labels, documents = model.batch(length)
        for _ in range(STEPS):
            model.optimizer.zero_grad()
            model.parallelised.forward_backward(tokens, labels, [documents], length)
        found = {
            name: local_tensor(weight.grad).float().cpu()
            for name, weight in model.parallelised.weights.named_parameters()
            if weight.grad is not None
        }
        return found, store.most if store else 0
