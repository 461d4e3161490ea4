"""Every kernel of the model against a reference in float64 on the CPU, forward and backward."""

import traceback
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu_tools import Machine, print_table
from pretrain.model.kernels.attention import documents_attention
from pretrain.model.kernels.backends import Setting, choose_rule, usable_backends
from pretrain.model.kernels.block_attention import block_attention, block_attention_backward
from pretrain.model.kernels.cross_entropy import chunked_cross_entropy
from pretrain.model.kernels.documents import Documents
from pretrain.model.kernels.experts import swiglu_mixture
from pretrain.model.kernels.gated_delta import gated_delta_recurrent, gated_delta_rule
from pretrain.model.kernels.rms_norm import rms_norm
from pretrain.model.kernels.short_convolution import short_convolution
from pretrain.model.kernels.slots import sort_by_expert

# Of |ours - reference| / |reference|, for the output and each gradient.
ALLOWED = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
# Of what is zero by rights, any other value is wrong.
TINY = 1e-30
LENGTH = 200
DOCUMENTS = ((30, 101, 69), (200,))

Compute = Callable[..., Tensor]
# From the inputs and the gradient of the output to the output and the inputs' gradients.
Differentiated = Callable[[list[Tensor], Tensor], list[Tensor]]


class Check(NamedTuple):
    """A kernel, what it should compute, and float64 inputs."""

    name: str
    kernel: Differentiated
    reference: Compute
    inputs: list[Tensor]


def run(machine: Machine) -> bool:
    """Print the table; whether all agree."""
    rows, is_right = [], True
    for dtype, allowed in ALLOWED.items():
        for check in all_checks(machine, dtype):
            try:
                error = f"{(worst := worst_error(check, dtype, machine)):.1e}"
                passed = worst <= allowed
            except Exception:
                traceback.print_exc()
                error, passed = "failed", False
            is_right &= passed
            verdict = "ok" if passed else "**wrong**"
            type_name = str(dtype).removeprefix("torch.")
            rows.append([check.name, type_name, error, f"{allowed:.0e}", verdict])
    print_table(["kernel", "type", "worst error", "allowed", ""], rows)
    return is_right


def worst_error(check: Check, dtype: torch.dtype, machine: Machine) -> float:
    inputs = [x.to(dtype) for x in check.inputs]
    doubles = [x.double().requires_grad_() for x in inputs]
    expected = check.reference(*doubles)
    d_out = torch.randn_like(expected).to(dtype)
    theirs = [expected.detach(), *torch.autograd.grad(expected, doubles, d_out.double())]
    ours = check.kernel(
        [x.to(machine.device).requires_grad_() for x in inputs], d_out.to(machine.device)
    )
    errors = [
        (a.double().cpu() - b).norm() / b.norm().clamp_min(TINY)
        for a, b in zip(ours, theirs, strict=True)
    ]
    # Python's `max` would pass over one that is not a number.
    return float(torch.stack(errors).max())


def all_checks(machine: Machine, dtype: torch.dtype) -> Iterator[Check]:
    torch.manual_seed(0)
    for head_dim in (16,) if machine.is_smoke else (64, 128, 256):
        setting = Setting.here(machine.device, dtype, head_dim)
        for backend in usable_backends(setting):
            yield Check(
                f"attention {backend}, head dimension {head_dim}",
                partial(attention_in_blocks, backend),
                attention_after(LENGTH),
                [*normals((2, 4, LENGTH, head_dim)), *normals(*[(2, 2, 2 * LENGTH, head_dim)] * 2)],
            )
    documents = Documents.from_lengths(DOCUMENTS)
    there = documents.to(machine.device)
    qkv = normals((2, 4, LENGTH, 64), (2, 2, LENGTH, 64), (2, 2, LENGTH, 64))
    windowed = partial(documents_attention, documents=there, scale=0.1, window=37)
    yield Check("attention, documents and window", autograd(windowed), windowed_attention, qkv)

    q, k = (F.normalize(x, dim=-1) for x in normals((2, 2, LENGTH, 64), (2, 2, LENGTH, 64)))
    v, g, beta = normals((2, 4, LENGTH, 64), (2, 4, LENGTH), (2, 4, LENGTH))
    chosen = choose_rule(Setting.here(machine.device, dtype, q.shape[-1]))
    for backend in dict.fromkeys(["torch", chosen]):
        rule = partial(gated_delta_rule, documents=there, backend=backend)
        yield Check(
            f"gated delta rule {backend}, documents",
            autograd(partial(first_of, rule)),
            partial(first_of, partial(gated_delta_recurrent, documents=documents)),
            [q, k, v, -0.1 * F.softplus(g), beta.sigmoid()],
        )
    yield Check("experts", autograd(experts), experts, normals(*EXPERTS_SHAPES))
    idle = partial(experts, first=1, n=N_EXPERTS - 2)
    yield Check("experts, two of them idle", autograd(idle), idle, normals(*EXPERTS_SHAPES))
    yield Check(
        "short convolution",
        autograd(short_convolution),
        lambda x, weight: F.silu(
            F.conv1d(F.pad(x.mT, (3, 0)), weight[:, None], groups=len(weight)).mT
        ),
        normals((2, 2 * LENGTH, 64), (64, 4)),
    )
    yield Check(
        "RMS norm, gate",
        autograd(lambda x, scale, gate: rms_norm(x, scale.float(), 1e-6, gate)),
        lambda x, scale, gate: F.rms_norm(x, scale.shape, scale, 1e-6) * F.silu(gate),
        normals((2, LENGTH, 64), (64,), (2, LENGTH, 64)),
    )
    labels = torch.randint(1000, (LENGTH,))
    yield Check(
        "cross-entropy, chunks",
        autograd(lambda h, w: chunked_cross_entropy(h, w, labels.to(h.device), chunk=64)),
        lambda h, w: F.cross_entropy(h @ w.T, labels, reduction="sum"),
        normals((LENGTH, 64), (1000, 64)),
    )
    x, weights, *of_experts = normals(*EXPERTS_SHAPES)
    # Last: a kernel that does not take it may leave the GPU unusable for this process.
    yield Check("experts, no token", autograd(experts), experts, [x[:0], weights[:0], *of_experts])


def normals(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


def autograd(compute: Compute) -> Differentiated:
    def differentiated(inputs: list[Tensor], d_out: Tensor) -> list[Tensor]:
        out = compute(*inputs)
        return [out.detach(), *torch.autograd.grad(out, inputs, d_out.to(out.dtype))]

    return differentiated


def first_of(compute: Callable[..., tuple[Tensor, Tensor]], *inputs: Tensor) -> Tensor:
    return compute(*inputs)[0]


def attention_in_blocks(backend: str, inputs: list[Tensor], d_out: Tensor) -> list[Tensor]:
    """As a ring does it: a block of earlier keys, the queries' own, merged by their lse."""
    q, k, v = (x.detach() for x in inputs)
    n = q.shape[2]
    options = {"scale": q.shape[-1] ** -0.5, "backend": backend}
    attend = partial(block_attention, **options)
    attend_backward = partial(block_attention_backward, **options)
    earlier, own = ((k[:, :, keys], v[:, :, keys]) for keys in (slice(n), slice(n, 2 * n)))

    out_1, lse_1 = attend(q, *earlier, causal=False)
    out_2, lse_2 = attend(q, *own, causal=True)
    lse = torch.logaddexp(lse_1, lse_2)
    weight = (lse_2 - lse).exp().unsqueeze(-1)
    out = out_1.float().lerp(out_2.float(), weight).to(q.dtype)
    dq_1, dk_1, dv_1 = attend_backward(d_out, q, *earlier, out, lse, causal=False)
    dq_2, dk_2, dv_2 = attend_backward(d_out, q, *own, out, lse, causal=True)
    return [out, dq_1 + dq_2, torch.cat([dk_1, dk_2], 2), torch.cat([dv_1, dv_2], 2)]


def attention_after(earlier: int) -> Compute:
    """Queries that see `earlier` keys, and then theirs causally."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(earlier)
        return F.scaled_dot_product_attention(q, k, v, seen, enable_gqa=True)

    return attend


def windowed_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    same = [torch.block_diag(*(torch.ones(n, n) for n in row)) for row in DOCUMENTS]
    seen = torch.stack(same).tril().triu(-36).bool().unsqueeze(1)
    return F.scaled_dot_product_attention(q, k, v, seen, scale=0.1, enable_gqa=True)


N_EXPERTS = 8
# x, weights of the choices, gate_up, down.
EXPERTS_SHAPES = ((LENGTH, 64), (LENGTH, 2), (N_EXPERTS, 64, 64), (N_EXPERTS, 64, 32))


def experts(
    x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, first: int = 0, n: int = N_EXPERTS
) -> Tensor:
    """With tokens for `n` experts from number `first` on. On a CPU, the reference: another
    implementation than on a GPU.
    """
    token = torch.arange(len(x), device=x.device)
    choices = first + torch.stack([token % n, (3 * token + 1) % n], 1)
    slots = sort_by_expert(choices, N_EXPERTS, choices.numel())
    return swiglu_mixture(x, weights, slots, gate_up, down)
