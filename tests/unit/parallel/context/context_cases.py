"""Kernels under context parallelism against whole rows, in float64; run by test_context.py.

Argument: the file for what rank 0 found: the largest error of each case, and bytes sent.
"""

import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from parallel.comm import Communicator
from parallel.context.attention import ContextAttention
from parallel.context.convolution import ContextConvolution
from parallel.context.documents import SplitDocuments
from parallel.context.linear import ContextScan
from parallel.layout import RowLayout, split_row
from parallel.mesh import join_ranks
from pretrain.model.kernels import gated_delta_forms
from pretrain.model.kernels.attention import documents_attention
from pretrain.model.kernels.documents import Documents
from pretrain.model.kernels.gated_delta import gated_delta_rule
from pretrain.model.kernels.short_convolution import short_convolution

T, H, H_KV, D, E = 48, 4, 2, 8, 6
SCALE = 0.3
ROWS: dict[str, list[list[int]]] = {
    "whole": [[T], [T]],
    "one token first": [[1, T - 1], [T]],
    "several": [[3, 10, 20, 15], [1, 1, 40, 6]],
    "at borders": [[24, 24], [12, 36]],
    "many": [[5] * 9 + [3], [1] * T],
}
# Of several chunks, and more segments than one in a block.
LONG_ROWS = {
    "long": [[1800], [1800]],
    "long and packed": [[30, 900, 140, 730], [1, 1, 1300, 498]],
}
SETTINGS = settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=40,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


class Split:
    """A batch as one rank sees it."""

    def __init__(self, rows: Sequence[Sequence[int]], comm: Communicator) -> None:
        self.comm = comm
        self.whole = Documents.from_lengths(rows)
        self.layouts: list[RowLayout] = [split_row(row, comm.size) for row in rows]
        self.documents = SplitDocuments.of_rank(self.layouts, comm.rank)

    def part(self, x: Tensor, dim: int) -> Tensor:
        """This rank's tokens of x [B, ...], which lie along `dim`."""
        rows = zip(x, self.layouts, strict=True)
        tokens = (torch.from_numpy(layout.tokens_of(self.comm.rank)) for layout in self.layouts)
        return torch.stack(
            [
                row.index_select(dim - 1, of_row)
                for (row, _), of_row in zip(rows, tokens, strict=True)
            ]
        )

    def error(
        self,
        whole: Callable[..., Any],
        split: Callable[..., Any],
        sharded: list[Tensor],
        common: list[Tensor],
        dim: int,
    ) -> float:
        """The largest relative error of outputs and gradients.

        Both functions take the sharded and then the common tensors. They return a sharded output,
        and perhaps further ones that are equal on all ranks.
        """
        generator = torch.Generator().manual_seed(3)
        inputs = [x.clone().requires_grad_() for x in (*sharded, *common)]
        outputs = as_list(whole(*inputs))
        grads = [torch.randn(y.shape, generator=generator, dtype=y.dtype) for y in outputs]
        gradients = torch.autograd.grad(outputs, inputs, grads)
        n = len(sharded)
        expected = [self.part(x, dim) for x in (outputs[0], *gradients[:n])]
        expected += [*outputs[1:], *gradients[n:]]

        local = [self.part(x, dim).requires_grad_() for x in sharded]
        local += [x.clone().requires_grad_() for x in common]
        ours = as_list(split(*local))
        d_ours = torch.autograd.grad(ours, local, [self.part(grads[0], dim), *grads[1:]])
        found = [ours[0], *d_ours[:n], *ours[1:], *d_ours[n:]]
        return max(map(relative, found, expected))


def as_list(outputs: Any) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def relative(ours: Tensor, expected: Tensor) -> float:
    error, norm = (ours - expected).detach().norm(), expected.detach().norm()
    # NaN is wrong, too.
    return float(error / norm.clamp_min(1e-3)) if error == error else float("inf")


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape) + seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def attention_error(split: Split, attention: ContextAttention, window: int | None) -> float:
    heads = random(2, H, T, D), random(2, H_KV, T, D), random(2, H_KV, T, D, seed=1)
    return split.error(
        lambda q, k, v: documents_attention(q, k, v, split.whole, scale=SCALE, window=window),
        lambda q, k, v: attention(q, k, v, split.documents, scale=SCALE, window=window),
        list(heads),
        [],
        dim=2,
    )


def scan_error(split: Split, has_initial_state: bool) -> float:
    T = split.whole.position.shape[1]
    q, k = (F.normalize(random(2, 2, T, D, seed=seed), dim=-1) for seed in range(2))
    g = -0.02 * F.softplus(random(2, H, T))
    sharded = [q, k, random(2, H, T, E), g, random(2, H, T, seed=1).sigmoid()]
    common = [random(2, H, D, E)] if has_initial_state else []
    scan = ContextScan(split.comm)

    def whole(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, *state: Tensor) -> Any:
        initial = state[0] if state else None
        return gated_delta_rule(
            q, k, v, g, beta, documents=split.whole, initial_state=initial, chunk_size=8
        )

    def sharded_scan(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, *s: Tensor) -> Any:
        initial = s[0] if s else None
        return scan(q, k, v, g, beta, documents=split.documents, initial_state=initial)

    return split.error(whole, sharded_scan, sharded, common, dim=2)


def convolution_error(split: Split, width: int) -> float:
    convolve = ContextConvolution(split.comm)
    weight = random(5, width)
    sums: list[float] = []

    def sharded(x: Tensor) -> Tensor:
        own = weight.clone().requires_grad_()
        y = convolve(x, own, split.documents)
        grad = split.part(random(2, T, 5, seed=2), 1)
        d_weight = torch.autograd.grad(y, own, grad, retain_graph=True)[0]
        dist.all_reduce(d_weight)
        whole = weight.clone().requires_grad_()
        of_whole = short_convolution(random(2, T, 5), whole, split.whole)
        sums.append(
            relative(d_weight, torch.autograd.grad(of_whole, whole, random(2, T, 5, seed=2))[0])
        )
        return y

    error = split.error(
        lambda x: short_convolution(x, weight, split.whole), sharded, [random(2, T, 5)], [], dim=1
    )
    return max(error, *sums)


def attentions(comm: Communicator) -> dict[str, ContextAttention]:
    """Each way to share attention that these ranks allow."""
    ways = {"ring": ContextAttention(comm)}
    for heads in (2, 4):
        if comm.size % heads == 0:
            axes = {"ring": comm.size // heads, "ulysses": heads}
            mesh = init_device_mesh("cpu", tuple(axes.values()), mesh_dim_names=tuple(axes))
            ring, ulysses = (Communicator(mesh.get_group(axis), axis) for axis in axes)
            ways["ulysses" if ring.size == 1 else "two levels"] = ContextAttention(ring, ulysses)
    return ways


def errors_of(rows: Sequence[Sequence[int]], ways: dict[str, ContextAttention], comm: Any) -> Any:
    """Case -> error, of every kernel."""
    split = Split(rows, comm)
    found = {}
    for name, attention in ways.items():
        found[name] = attention_error(split, attention, None)
        for window in (1, 2, 7, 20, T + 5):
            error = attention_error(split, attention, window)
            key = f"{name}, window"
            found[key] = max(found.get(key, 0.0), error)
    found["scan"] = scan_error(split, has_initial_state=False)
    found["scan from a state"] = scan_error(split, has_initial_state=True)
    found["convolution"] = max(convolution_error(split, width) for width in (2, 4, 6))
    return found


@st.composite
def lengths(draw: st.DrawFn, ranks: int) -> list[int]:
    """Of one row: tokens, blocks of zigzag and one more or less, and what no rank can hold."""
    block, share, room = T // (2 * ranks), T // ranks, T
    sizes = st.sampled_from(
        [1, 2, block - 1, block, block + 1, share - 1, share, share + 1, share + block, T]
    )
    row = []
    while room:
        row.append(min(room, max(1, draw(sizes))))
        room -= row[-1]
    return row


def drawn_errors(ways: dict[str, ContextAttention], comm: Communicator) -> dict[str, float]:
    """The largest errors for drawn documents; every rank draws the same."""
    worst: dict[str, float] = {}

    @SETTINGS
    @given(st.tuples(lengths(comm.size), lengths(comm.size)))
    def draw(rows: tuple[list[int], list[int]]) -> None:
        for case, error in errors_of(rows, ways, comm).items():
            worst[case] = max(worst.get(case, 0.0), error)

    draw()
    return worst


def bytes_sent(comm: Communicator, length: int) -> dict[str, int]:
    """Forward and backward of each kernel on a row of one document, in float32."""
    sent = {}
    layout = split_row([length], comm.size)
    documents = SplitDocuments.of_rank([layout], comm.rank)
    t = length // comm.size
    q, k, v = (torch.randn(1, heads, t, D, requires_grad=True) for heads in (H, H_KV, H_KV))
    values = torch.randn(1, H, t, E, requires_grad=True)
    g, beta = -torch.rand(1, H, t), torch.rand(1, H, t)
    x, weight = torch.randn(1, t, 5, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    attention = ContextAttention(comm)
    for name, run in {
        "ring": lambda: attention(q, k, v, documents, scale=SCALE, window=None),
        "window": lambda: attention(q, k, v, documents, scale=SCALE, window=5),
        "scan": lambda: ContextScan(comm)(k, k, values, g, beta, documents=documents)[0],
        "convolution": lambda: ContextConvolution(comm)(x, weight, documents),
    }.items():
        before = comm.bytes.total()
        run().sum().backward()
        sent[name] = comm.bytes.total() - before
    return sent


def main() -> None:
    join_ranks(timedelta(minutes=2))
    group = dist.group.WORLD
    assert group is not None
    comm = Communicator(group, "cp")
    gated_delta_forms.CPU_SEGMENT = 128
    ways = attentions(comm)
    errors = {
        f"{case}: {name}": error
        for name, rows in ROWS.items()
        for case, error in errors_of(rows, ways, comm).items()
    }
    errors |= {f"{case}: drawn": error for case, error in drawn_errors(ways, comm).items()}
    for name, rows in LONG_ROWS.items():
        split = Split(rows, comm)
        errors[f"scan: {name}"] = scan_error(split, has_initial_state=False)
        errors[f"scan from a state: {name}"] = scan_error(split, has_initial_state=True)
    of_ranks: list[Any] = [None] * comm.size
    dist.all_gather_object(of_ranks, (errors, {n: bytes_sent(comm, n) for n in (48, 96)}))
    if comm.rank == 0:
        torch.save(of_ranks, sys.argv[1])
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
