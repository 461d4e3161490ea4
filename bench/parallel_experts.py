"""A Mixture-of-Experts layer: against transformers on one rank, and spread over two.

    python -m bench.parallel experts

On one rank the peer is transformers' Qwen3-Next sparse block with its `grouped_mm` experts and our
weights; outputs and gradients must agree; times are medians of CPU time, taken in turns, which
other work on the machine disturbs little.

On two ranks (gloo, one thread each, every rank its own tokens) dispatch and combine are everything
the layer does because its experts are elsewhere: routing rows to ranks, copying them, the
collectives, waiting for the other rank, and adding up what returns, forward and backward. What
travels while the shared expert computes counts for as long as it is waited for. Their share is of
the layer's forward and backward pass by the clock, the median over repeats of the mean over ranks;
it means something only where nothing else runs. Exit code 1: a ratio or the share is not as
required.
"""

import statistics
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn

from bench.gated_delta import cpu_model
from bench.peers import transformers_block
from bench.ranks import run_on_ranks
from parallel import comm, overlap
from parallel.expert import dispatch
from parallel.expert.shard import shard_experts
from parallel.mesh import Mesh, join_ranks
from pretrain.model.config import MoEConfig
from pretrain.model.kernels import rows
from pretrain.model.moe import MoE

D_MODEL, TOKENS, RANKS, REPEATS = 1024, 8192, 2, 5
CONFIG = MoEConfig(n_experts=16, top_k=4, d_expert=512, d_shared_expert=512)
REQUIRED_RATIO, ALLOWED_SHARE = 1.0, 0.15


def main() -> int:
    torch.set_num_threads(1)
    print(f"{cpu_model()}; torch {torch.__version__}, transformers {transformers.__version__}")
    print(
        f"d_model {D_MODEL}, {CONFIG.n_experts} experts top-{CONFIG.top_k} of {CONFIG.d_expert}, "
        f"shared expert of {CONFIG.d_shared_expert}, {TOKENS} tokens per rank, float32, forward + "
        f"backward, one thread per rank, median of {REPEATS}, seconds\n"
    )
    is_slow = compare_with_transformers()
    return max(is_slow, run_on_ranks(RANKS, "bench.parallel_experts"))


def compare_with_transformers() -> bool:
    """Print the table of one rank; whether we are slower than required."""
    moe = make_moe()
    layers = {"transformers": transformers_block(moe, D_MODEL), "farspan": lambda x: moe(x)[0]}
    x, d_out = random_tokens(0)
    results = [forward_backward(layer, x, d_out) for layer in layers.values()]
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    del results, ours, theirs

    seconds: dict[str, list[float]] = {name: [] for name in layers}
    for _ in range(REPEATS):
        for name, layer in layers.items():
            start = time.process_time()
            forward_backward(layer, x, d_out)
            seconds[name].append(time.process_time() - start)
    theirs_s, ours_s = (statistics.median(s) for s in seconds.values())
    print("| ranks | transformers, grouped_mm | farspan | ratio | required |")
    print("|---:|---:|---:|---:|---:|")
    print(f"| 1 | {theirs_s:.2f} | {ours_s:.2f} | {theirs_s / ours_s:.2f} | {REQUIRED_RATIO} |\n")
    return theirs_s / ours_s < REQUIRED_RATIO


def measure_share() -> bool:
    """On each rank: print the table of two ranks; whether the share is more than allowed."""
    torch.set_num_threads(1)
    device = join_ranks(timedelta(minutes=5))
    moe = make_moe()
    traffic = shard_experts([moe], Mesh.build(device, dp_shard=RANKS, ep=RANKS))
    away = Stopwatch()
    time_dispatch(away)
    x, d_out = random_tokens(dist.get_rank())
    forward_backward(lambda x: moe(x)[0], x, d_out)

    layer_s, away_s = [], []
    for _ in range(REPEATS):
        sent = traffic.bytes.total()
        away.seconds = 0.0
        dist.barrier()
        start = time.perf_counter()
        forward_backward(lambda x: moe(x)[0], x, d_out)
        both = torch.tensor([time.perf_counter() - start, away.seconds], dtype=torch.float64)
        dist.all_reduce(both)
        layer_s.append(both[0].item() / RANKS)
        away_s.append(both[1].item() / RANKS)
    share = statistics.median(a / b for a, b in zip(away_s, layer_s, strict=True))
    if dist.get_rank() == 0:
        print("| ranks | layer | dispatch + combine | MB sent per rank | share | allowed |")
        print("|---:|---:|---:|---:|---:|---:|")
        print(
            f"| {RANKS} | {statistics.median(layer_s):.2f} | {statistics.median(away_s):.2f} "
            f"| {(traffic.bytes.total() - sent) / 1e6:.0f} | {share:.1%} | {ALLOWED_SHARE:.0%} |"
        )
    dist.destroy_process_group()
    return share > ALLOWED_SHARE


class Stopwatch:
    """Adds up the time within functions; one within another counts once."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.depth = 0

    def timed(self, function: Callable[..., Any], sign: int = 1) -> Callable[..., Any]:
        """`function`, its time added; with sign -1 taken off that of the function around it."""

        def timed(*args: Any) -> Any:
            is_outermost = self.depth == 0 or sign < 0
            self.depth += 1
            start = time.perf_counter()
            result = function(*args)
            self.depth -= 1
            if is_outermost:
                self.seconds += sign * (time.perf_counter() - start)
            return result

        return timed


def time_dispatch(watch: Stopwatch) -> None:
    """Let `watch` run within all that dispatches and combines."""
    call = dispatch.AllToAllDispatch.__call__

    def timed_call(
        self: dispatch.AllToAllDispatch, x: Tensor, indices: Tensor, weights: Tensor, experts: Any
    ) -> Callable[[], Tensor]:
        finish = watch.timed(call)(self, x, indices, weights, watch.timed(experts, -1))
        return watch.timed(finish)

    dispatch.AllToAllDispatch.__call__ = timed_call
    for function in (
        overlap._Depart,
        overlap._Arrive,
        comm._AllToAll,
        rows._RepeatRows,
        rows._SumRows,
    ):
        function.backward = staticmethod(watch.timed(function.backward))


def make_moe() -> MoE:
    torch.manual_seed(0)
    moe = MoE(D_MODEL, CONFIG)
    for parameter in moe.parameters():
        nn.init.normal_(parameter, std=0.02)
    return moe


def random_tokens(seed: int) -> tuple[Tensor, Tensor]:
    """Hidden states [1, T, d] and the gradient of the output."""
    generator = torch.Generator().manual_seed(seed)
    x, d_out = torch.randn(2, 1, TOKENS, D_MODEL, generator=generator)
    return x.requires_grad_(), d_out


def forward_backward(
    layer: Callable[[Tensor], Tensor], x: Tensor, d_out: Tensor
) -> tuple[Tensor, Tensor]:
    """The output and the gradient of x; those of the weights are made too."""
    out = layer(x)
    x.grad = None
    out.backward(d_out)
    assert x.grad is not None
    return out.detach(), x.grad


if __name__ == "__main__":
    sys.exit(measure_share())
