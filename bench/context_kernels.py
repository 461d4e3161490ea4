"""Two ranks against one: attention, the gated delta net and its parts at 16k tokens.

    python -m bench.context_parallel kernels

Forward and backward of the same tokens, whole on one rank, and shared by two (gloo), one thread
each. The times are CPU seconds, of two ranks those of the slower one, medians of interleaved
repeats. Waiting for the other rank is no CPU time, so the column "clock" has the ratio by the
clock, which means something only where nothing else runs. Outputs must agree. Packed documents have
lengths from a Pareto distribution, as a crawl's have. Exit code 1: a ratio is below what is
required.
"""

import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from bench.context_traffic import pareto_lengths
from bench.gated_delta import cpu_model
from bench.ranks import run_on_ranks
from parallel.comm import Communicator
from parallel.context.attention import ContextAttention
from parallel.context.convolution import ContextConvolution
from parallel.context.documents import SplitDocuments
from parallel.context.linear import ContextScan
from parallel.layout import RowLayout, split_row
from parallel.mesh import join_ranks
from pretrain.model.config import LinearAttentionConfig, ModelConfig
from pretrain.model.gated_delta import GatedDeltaNet
from pretrain.model.kernels.attention import documents_attention
from pretrain.model.kernels.documents import Documents
from pretrain.model.kernels.gated_delta import gated_delta_rule

RANKS, TOKENS, REPEATS = 2, 16_384, 7
HEADS, KEY_HEADS, HEAD_DIM, D_MODEL = 8, 2, 64, 512
PARETO_SHAPE = 1.1
REQUIRED = 1.8
LINEAR = LinearAttentionConfig(HEADS, HEADS, HEAD_DIM, HEAD_DIM)

Run = Callable[..., Tensor]


@dataclass
class Kernel:
    """What is measured.

    Attributes:
        inputs: whole, with the tokens along `dim`.
        one: on all tokens.
        two: on this rank's.
    """

    name: str
    inputs: list[Tensor]
    dim: int
    one: Run
    two: Run


def main() -> int:
    print(f"{cpu_model()}; torch {torch.__version__}")
    print(
        f"{RANKS} ranks, {TOKENS} tokens, float32, forward + backward, one thread per rank, median "
        f"of {REPEATS}, CPU seconds\n"
    )
    return run_on_ranks(RANKS, "bench.context_kernels", "rank")


def run_rank() -> int:
    torch.set_num_threads(1)
    join_ranks(timedelta(minutes=10))
    group = dist.group.WORLD
    assert group is not None
    comm = Communicator(group, "cp")
    if comm.rank == 0:
        print("| kernel | documents | one rank | two ranks | ratio | required | clock |")
        print("|---|---|---:|---:|---:|---:|---:|", flush=True)
    is_slow = False
    packed = pareto_lengths(np.random.default_rng(0), TOKENS, PARETO_SHAPE)
    for documents, lengths in {"one": [TOKENS], "packed": packed}.items():
        layout = split_row(lengths, RANKS)
        for kernel in kernels(layout, comm):
            ratio, row = measure(kernel, layout, comm)
            is_slow |= ratio < REQUIRED
            if comm.rank == 0:
                print(f"| {kernel.name} | {documents} | {row} |", flush=True)
    dist.barrier()
    sys.stdout.flush()
    os._exit(int(is_slow))


def kernels(layout: RowLayout, comm: Communicator) -> list[Kernel]:
    whole = Documents.from_lengths([layout.lengths])
    part = SplitDocuments.of_rank([layout], comm.rank)
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(1, *shape, generator=generator)

    ring, scan, scale = ContextAttention(comm), ContextScan(comm), HEAD_DIM**-0.5
    q, k, v = (normal(heads, TOKENS, HEAD_DIM) for heads in (HEADS, KEY_HEADS, KEY_HEADS))
    of_rule = [F.normalize(normal(HEADS, TOKENS, HEAD_DIM), dim=-1) for _ in range(2)]
    of_rule.append(normal(HEADS, TOKENS, HEAD_DIM))
    of_rule += [-0.1 * F.softplus(normal(HEADS, TOKENS)), normal(HEADS, TOKENS).sigmoid()]
    one_net, two_net = gated_delta_nets(comm)
    return [
        Kernel(
            "ring attention",
            [q, k, v],
            2,
            lambda *x: documents_attention(*x, whole, scale=scale),
            lambda *x: ring(*x, part, scale=scale, window=None),
        ),
        Kernel(
            "gated delta rule",
            of_rule,
            2,
            lambda *x: gated_delta_rule(*x, documents=whole)[0],
            lambda *x: scan(*x, documents=part)[0],
        ),
        Kernel(
            "gated delta net",
            [normal(TOKENS, D_MODEL)],
            1,
            lambda x: one_net(x, whole),
            lambda x: two_net(x, part),
        ),
    ]


def gated_delta_nets(comm: Communicator) -> tuple[GatedDeltaNet, GatedDeltaNet]:
    """The same layer twice, the second for two ranks."""
    nets = []
    for _ in range(2):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            net = GatedDeltaNet(ModelConfig(d_model=D_MODEL, linear=LINEAR))
            for weight in net.parameters():
                torch.nn.init.normal_(weight, std=0.02)
        nets.append(net)
    nets[1].convolve, nets[1].scan = ContextConvolution(comm), ContextScan(comm)
    return nets[0], nets[1]


def measure(kernel: Kernel, layout: RowLayout, comm: Communicator) -> tuple[float, str]:
    """The ratio of CPU times, and a row of the table."""
    tokens = torch.from_numpy(layout.tokens_of(comm.rank))
    parts = [x.index_select(kernel.dim, tokens).requires_grad_() for x in kernel.inputs]
    inputs = [x.requires_grad_() for x in kernel.inputs]
    whole, d_whole, _ = forward_backward(kernel.one, inputs, None)
    d_part = d_whole.index_select(kernel.dim, tokens)
    part, _, _ = forward_backward(kernel.two, parts, d_part)
    torch.testing.assert_close(
        part,
        whole.index_select(kernel.dim, tokens),
        rtol=1e-3,
        atol=1e-5 * float(whole.abs().max()),
    )
    one, two = [], []
    for _ in range(REPEATS):
        if comm.rank == 0:
            one.append(forward_backward(kernel.one, inputs, d_whole)[2])
        dist.barrier()
        two.append(forward_backward(kernel.two, parts, d_part)[2])
    of_ranks: list[Any] = [None] * comm.size
    dist.all_gather_object(of_ranks, (medians(one) if one else None, medians(two)))
    cpu, clock = of_ranks[0][0]
    slowest = [max(times[kind] for _, times in of_ranks) for kind in range(2)]
    ratio = cpu / slowest[0]
    row = f"{cpu:.3f} | {slowest[0]:.3f} | {ratio:.2f} | {REQUIRED} | {clock / slowest[1]:.2f}"
    return ratio, row


def forward_backward(
    run: Run, inputs: list[Tensor], d_out: Tensor | None
) -> tuple[Tensor, Tensor, tuple[float, float]]:
    """The output, its gradient, and the seconds of CPU and clock that both passes took."""
    cpu, clock = time.process_time(), time.perf_counter()
    out = run(*inputs)
    if d_out is None:
        d_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    out.backward(d_out)
    for x in inputs:
        x.grad = None
    seconds = time.process_time() - cpu, time.perf_counter() - clock
    return out.detach(), d_out, seconds


def medians(times: list[tuple[float, float]]) -> tuple[float, float]:
    cpu, clock = zip(*times, strict=True)
    return statistics.median(cpu), statistics.median(clock)


if __name__ == "__main__":
    sys.exit(run_rank() if sys.argv[1:] == ["rank"] else main())
