"""A step of ring attention against torch's scaled_dot_product_attention, forward + backward."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu_tools import Machine, print_table
from pretrain.model.kernels.backends import Setting, usable_backends
from pretrain.model.kernels.block_attention import block_attention, block_attention_backward


def run(machine: Machine) -> bool:
    """A step of the ring: a block of queries against a block of as many keys."""
    length, heads, kv_heads = (256, 4, 2) if machine.is_smoke else (16384, 16, 2)
    print(f"Attention, {length} queries and keys, {heads} query and {kv_heads} key heads, bf16.\n")
    rows, first_calls = [], []
    for head_dim in (16,) if machine.is_smoke else (128, 256):
        q, d_out = (machine.random(1, heads, length, head_dim) for _ in range(2))
        k, v = (machine.random(1, kv_heads, length, head_dim) for _ in range(2))
        for causal in (True, False):
            setting = Setting.here(machine.device, q.dtype, head_dim)
            backends = [name for name in usable_backends(setting) if name != "reference"]
            seconds = machine.compare(
                {"SDPA": partial(sdpa_step, q, k, v, d_out, causal)}
                | {name: partial(ring_step, q, k, v, d_out, causal, name) for name in backends}
            )
            mask = "causal" if causal else "full"
            first_calls += [
                [str(head_dim), mask, name, *first_call(machine, q, k, v, d_out, causal, name)]
                for name in backends
            ]
            flops = step_flops(heads, length, head_dim, causal)
            rows += [
                [
                    str(head_dim),
                    mask,
                    name,
                    f"{1e3 * seconds[name]:.2f}",
                    f"{flops / seconds[name] / 1e12:.0f}",
                    f"{1e3 * seconds['SDPA']:.2f}",
                    f"{seconds['SDPA'] / seconds[name]:.2f}",
                ]
                for name in backends
            ]
    print_table(["head dim", "mask", "backend", "ms", "TFLOP/s", "SDPA, ms", "ratio"], rows)
    print("A block half as long and odd: its first call, as a document of a new length has one.\n")
    print_table(["head dim", "mask", "backend", "first, ms", "second, ms"], first_calls)
    return True


def first_call(
    machine: Machine,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    d_out: Tensor,
    causal: bool,
    backend: str,
) -> list[str]:
    """Milliseconds of a step at a length not seen before, and of the next one."""
    length = q.shape[2] // 2 - 37
    shorter = [x.detach()[:, :, :length] for x in (q, k, v, d_out)]
    step = partial(ring_step, *shorter, causal, backend)
    return [f"{1e3 * machine.seconds(step):.2f}" for _ in range(2)]


@torch.no_grad()
def ring_step(q: Tensor, k: Tensor, v: Tensor, d_out: Tensor, causal: bool, backend: str) -> None:
    scale = q.shape[-1] ** -0.5
    out, lse = block_attention(q, k, v, causal=causal, scale=scale, backend=backend)
    block_attention_backward(d_out, q, k, v, out, lse, causal=causal, scale=scale, backend=backend)


def sdpa_step(q: Tensor, k: Tensor, v: Tensor, d_out: Tensor, causal: bool) -> None:
    out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    torch.autograd.grad(out, (q, k, v), d_out)


def step_flops(n_heads: int, length: int, head_dim: int, causal: bool) -> float:
    """Two products forward and five backward (arXiv:2307.08691, section 4.1)."""
    return 7.0 * 2 * n_heads * length**2 * head_dim * (0.5 if causal else 1)
