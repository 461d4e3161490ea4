"""A MoE layer with its experts spread over all ranks; run on N ranks by test_expert.py.

Each case runs on every rank as a whole and with its experts and tokens spread, and compares the
output, the router's sums and all gradients.
"""

import copy
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from parallel.comm import Communicator
from parallel.expert.dispatch import AllToAllDispatch
from parallel.expert.sequence import split_rows
from parallel.expert.shard import shard_experts
from parallel.mesh import Mesh, join_ranks
from parallel.recompute import Recompute, recompute_layers
from pretrain.model.config import MoEConfig
from pretrain.model.kernels.documents import Documents
from pretrain.model.moe import MoE, Routing

D_MODEL, N_EXPERTS = 16, 8
BATCH, LENGTH = 4, 12

Split = Callable[[Tensor], Tensor]


def make_moe(**settings: Any) -> MoE:
    torch.manual_seed(0)
    defaults = {"n_experts": N_EXPERTS, "top_k": 3, "d_expert": 8, "d_shared_expert": 12}
    moe = MoE(D_MODEL, MoEConfig(**defaults | settings))
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    moe.frequencies.copy_(torch.rand(N_EXPERTS).softmax(-1))
    return moe


def run(moe: MoE, x: Tensor, d_out: Tensor) -> tuple[Tensor, Routing, Tensor]:
    """The output, what the router tells, and the gradient of x."""
    x = x.clone().requires_grad_()
    out, routing = moe(x, Documents.whole_rows(BATCH, LENGTH))
    loss = (out * d_out).sum() + 0.3 * routing.balance + 0.1 * routing.z
    loss.backward()
    assert x.grad is not None
    return out.detach(), Routing(*(part.detach() for part in routing)), x.grad


def compare(name: str, moe: MoE, spread: MoE, split: Split, tolerance: float) -> None:
    x, d_out = torch.randn(2, BATCH, LENGTH, D_MODEL, dtype=moe.router.weight.dtype)
    out, routing, d_x = run(moe, x, d_out)
    part_out, part_routing, d_part = run(spread, split(x), split(d_out))

    check(f"{name}: output", part_out, split(out), tolerance)
    check(f"{name}: gradient of x", d_part, split(d_x), tolerance)
    for field, mine, whole in zip(Routing._fields, part_routing, routing, strict=True):
        dist.all_reduce(mine)
        check(f"{name}: {field}", mine, whole, tolerance)
    for parameter, mine, whole in gradients(spread, moe):
        check(f"{name}: gradient of {parameter}", mine, whole, tolerance)


def gradients(spread: MoE, moe: MoE) -> Iterator[tuple[str, Tensor, Tensor]]:
    for (name, mine), whole in zip(spread.named_parameters(), moe.parameters(), strict=True):
        assert mine.grad is not None
        assert whole.grad is not None
        if isinstance(mine.grad, DTensor):
            yield name, mine.grad.full_tensor(), whole.grad
        else:
            yield name, dist_sum(mine.grad), whole.grad


def dist_sum(x: Tensor) -> Tensor:
    dist.all_reduce(x)
    return x


def check(what: str, ours: Tensor, reference: Tensor, tolerance: float) -> None:
    assert ours.shape == reference.shape, f"{what}: {ours.shape} for {reference.shape}"
    error = (ours.double() - reference.double()).norm().item()
    allowed = tolerance * reference.double().norm().item()
    assert error <= allowed, f"{what}: off by {error}, allowed are {allowed}"


def rows_of_rank(x: Tensor) -> Tensor:
    return x.tensor_split(dist.get_world_size())[dist.get_rank()]


def part_of_rows(x: Tensor) -> Tensor:
    return x.tensor_split(dist.get_world_size(), dim=1)[dist.get_rank()]


def only_rank_0(x: Tensor) -> Tensor:
    return x if dist.get_rank() == 0 else x[:0]


CASES: dict[str, tuple[dict[str, Any], Split]] = {
    "previous step's frequencies": ({}, rows_of_rank),
    "one expert for a token": ({"top_k": 1, "d_shared_expert": 0}, rows_of_rank),
    "no renormalisation": ({"renormalise_top_k": False}, rows_of_rank),
    "a rank without tokens": ({}, only_rank_0),
    "frequencies of the sequence": ({"balance": "sequence"}, rows_of_rank),
    "frequencies of a split sequence": ({"balance": "sequence"}, part_of_rows),
    "capacity": ({"capacity_factor": 1.0}, rows_of_rank),
    "capacity of a split sequence": ({"capacity_factor": 1.0}, part_of_rows),
    "selection bias": ({"balance": "bias"}, rows_of_rank),
}


def check_route(comm: Communicator) -> None:
    """Each token leaves once for each rank it goes to, and its rows find it again."""
    torch.manual_seed(0)
    indices = torch.randint(-1, N_EXPERTS, (20, 5))
    route = AllToAllDispatch(comm, N_EXPERTS).route(indices)
    ranks = torch.where(indices < 0, -1, indices // (N_EXPERTS // comm.size))
    wanted = [sorted({int(rank) for rank in row if rank >= 0}) for row in ranks]
    assert route.sent == [sum(rank in row for row in wanted) for rank in range(comm.size)]
    for token, row in enumerate(wanted):
        (leaving,) = (route.copies.token == token).nonzero(as_tuple=True)
        returning = route.copies.rows[token]
        assert len(leaving) == len(row)
        assert torch.equal(returning[returning < len(route.copies.token)], leaving)


def main() -> None:
    device = join_ranks(timedelta(seconds=60))
    mesh = Mesh.build(device, dp_shard=dist.get_world_size(), ep=dist.get_world_size())
    comm = Communicator(dist.group.WORLD, "tp")

    def compare_case(
        name: str,
        settings: dict[str, Any],
        split: Split,
        *,
        dtype: torch.dtype = torch.float64,
        tolerance: float = 1e-12,
        recompute: Recompute = "none",
    ) -> None:
        moe = make_moe(**settings).to(dtype)
        if settings.get("balance") == "bias":
            # All choose the first experts: the last rank's have nothing to do.
            moe.selection_bias[:3] = 2
        spread = copy.deepcopy(moe)
        shard_experts([spread], mesh)
        if split is part_of_rows:
            split_rows([spread], tp=comm, cp=None)
        recompute_layers({"0": spread}, [recompute])
        compare(name, moe, spread, split, tolerance)

    check_route(comm)
    for name, (settings, split) in CASES.items():
        compare_case(name, settings, split)
    modes: list[Recompute] = ["selective", "full"]
    for mode in modes:
        compare_case(mode, {"capacity_factor": 1.0}, part_of_rows, recompute=mode)
    compare_case("fp32", {}, rows_of_rank, dtype=torch.float32, tolerance=1e-6)
    compare_case("bf16", {}, rows_of_rank, dtype=torch.bfloat16, tolerance=2e-2)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
