"""The gated delta rule, forward and backward, against the PyTorch fallback of transformers.

    python -m bench.gated_delta

As shipped, the fallback's backward is quadratic in the length: its loop over chunks reads and
writes slices `x[:, :, i]`, and autograd makes a tensor of the whole length for each. The peer here
is the fallback with that mended: `x.unbind(2)` before the loop, `torch.stack` of the outputs after
it. Both sides run in turns in one process on one thread; the times are medians of CPU time, which
other work on the machine disturbs little. Exit code 1: a ratio is below what is required.
"""

import inspect
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from torch import Tensor
from torch.nn import functional as F
from transformers.models.qwen3_next import modeling_qwen3_next

from pretrain.model.kernels.gated_delta import gated_delta_rule

HEADS, HEAD_DIM = 8, 64
REQUIRED_RATIO = {8192: 1.3, 32768: 1.9}
REPEATS = 5

GatedDeltaRule = Callable[..., tuple[Tensor, Tensor | None]]


def main() -> int:
    torch.set_num_threads(1)
    rules = {"transformers": transformers_rule(mended_fallback()), "farspan": gated_delta_rule}
    print(f"{cpu_model()}; torch {torch.__version__}, transformers {transformers.__version__}")
    print(f"H={HEADS}, D={HEAD_DIM}, float32, one thread; median of {REPEATS}, CPU seconds\n")
    print("| tokens | transformers, mended | farspan | ratio | required |")
    print("|---:|---:|---:|---:|---:|")
    slow = False
    for length, required in REQUIRED_RATIO.items():
        seconds = measure(rules, random_inputs(length))
        ratio = seconds["transformers"] / seconds["farspan"]
        slow |= ratio < required
        times = " | ".join(f"{seconds[name]:.3f}" for name in rules)
        print(f"| {length} | {times} | {ratio:.2f} | {required} |", flush=True)
    return 1 if slow else 0


def measure(rules: dict[str, GatedDeltaRule], inputs: list[Tensor]) -> dict[str, float]:
    """Median CPU seconds of each rule; the first round warms up and checks that all agree."""
    results = [forward_backward(rule, inputs) for rule in rules.values()]
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    del results, ours, theirs

    seconds: dict[str, list[float]] = {name: [] for name in rules}
    for _ in range(REPEATS):
        for name, rule in rules.items():
            start = time.process_time()
            forward_backward(rule, inputs)
            seconds[name].append(time.process_time() - start)
    return {name: statistics.median(s) for name, s in seconds.items()}


def forward_backward(rule: GatedDeltaRule, inputs: list[Tensor]) -> list[Tensor]:
    """The output and the gradients of its sum."""
    out, _ = rule(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, torch.ones_like(out))]


def random_inputs(length: int) -> list[Tensor]:
    """q, k, v, g and beta of one row."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(1, HEADS, length, *shape, generator=generator)

    q, k = (F.normalize(normal(HEAD_DIM), dim=-1) for _ in range(2))
    g = -0.1 * F.softplus(normal())
    return [x.requires_grad_() for x in (q, k, normal(HEAD_DIM), g, normal().sigmoid())]


def transformers_rule(chunk_rule: GatedDeltaRule) -> GatedDeltaRule:
    """With our axes, [B, H, T, ...] for transformers' [B, T, H, ...].

    Its model repeats key heads before it calls the rule.
    """

    def rule(
        q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        q, k = (x.repeat_interleave(v.shape[1] // x.shape[1], dim=1) for x in (q, k))
        out, state = chunk_rule(*(x.transpose(1, 2) for x in (q, k, v, g, beta)))
        return out.transpose(1, 2), state

    return rule


def mended_fallback() -> GatedDeltaRule:
    """transformers' `torch_chunk_gated_delta_rule` with a backward that is linear in the length."""
    name = "torch_chunk_gated_delta_rule"
    source = inspect.getsource(inspect.unwrap(getattr(modeling_qwen3_next, name)))
    source = source[source.index("def ") :]
    chunked = ("query", "key", "new_values", "k_cumdecay", "intra_chunk_attn", "chunk_decay")
    names = ", ".join(chunked)
    loop = "    for i in range(num_chunks):\n"
    edits = {
        **{f" {x}[:, :, i]": f" {x}[i]" for x in chunked},
        loop: f"    {names} = (x.unbind(2) for x in ({names}))\n{loop}",
        "core_attn_out = torch.zeros_like(new_values)": "core_attn_out = []",
        "core_attn_out[:, :, i] = ": "core_attn_out += ",
        "inter_chunk_attn + intra_chunk_attn[i] @ v_new": (
            "[inter_chunk_attn + intra_chunk_attn[i] @ v_new]"
        ),
        "core_attn_out.reshape(": "torch.stack(core_attn_out, 2).reshape(",
    }
    for old, new in edits.items():
        if old not in source:
            sys.exit(f"transformers {transformers.__version__}: {name} has no {old.strip()!r} now")
        source = source.replace(old, new)
    namespace = dict(vars(modeling_qwen3_next))
    exec(source, namespace)
    return namespace[name]


def cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores" if names else platform.processor()


if __name__ == "__main__":
    sys.exit(main())
