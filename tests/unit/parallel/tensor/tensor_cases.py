"""Models whose layers are shared out over ranks; run on N ranks by test_tensor.py.

Arguments: the folder for results. Each rank computes the whole model itself, too.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from parallel.comm import Communicator, Pending
from parallel.fsdp import owned_region
from parallel.mesh import join_ranks
from parallel.recompute import Recompute, recompute_layers
from parallel.tensor.shard import shard_layers
from parallel.tensor.vocabulary import ShardedCrossEntropy, shard_vocabulary
from pretrain.model.config import AttentionConfig, LinearAttentionConfig, ModelConfig, MoEConfig
from pretrain.model.init import initialize
from pretrain.model.kernels.cross_entropy import IGNORED, chunked_cross_entropy
from pretrain.model.kernels.documents import Documents
from pretrain.model.transformer import Transformer

SEED = 5
TOKENS = 16
SOFTMAX = ModelConfig(
    vocab_size=24,
    d_model=16,
    n_layers=1,
    layer_pattern=("softmax",),
    d_ff=12,
    attention=AttentionConfig(n_heads=4, n_kv_heads=4, head_dim=8, rope_fraction=0.5),
    linear=LinearAttentionConfig(n_key_heads=4, n_value_heads=8, key_dim=4, value_dim=6),
    moe=MoEConfig(n_experts=0),
    init_std=0.3,
)
LINEAR = replace(SOFTMAX, layer_pattern=("linear",))
MOE = MoEConfig(n_experts=4, top_k=2, d_expert=8, d_shared_expert=8)
CONFIGS = {
    "softmax": SOFTMAX,
    "softmax-2-kv-heads": replace(SOFTMAX, attention=replace(SOFTMAX.attention, n_kv_heads=2)),
    "softmax-1-kv-head-no-gate": replace(
        SOFTMAX, attention=replace(SOFTMAX.attention, n_kv_heads=1, output_gate=False)
    ),
    "linear": LINEAR,
    "linear-2-key-heads": replace(LINEAR, linear=replace(LINEAR.linear, n_key_heads=2)),
    "linear-1-key-head": replace(LINEAR, linear=replace(LINEAR.linear, n_key_heads=1)),
    "experts": replace(SOFTMAX, moe=MOE),
    "hybrid-tied": replace(
        SOFTMAX, n_layers=2, layer_pattern=("linear", "softmax"), moe=MOE, tie_embeddings=True
    ),
}


@dataclass(frozen=True)
class Batch:
    tokens: Tensor
    labels: Tensor
    documents: Documents


def make_batch(rows: int, packed: bool) -> Batch:
    generator = torch.Generator().manual_seed(SEED)
    tokens, labels = torch.randint(0, 24, (2, rows, TOKENS), generator=generator)
    labels[0, 3] = IGNORED
    lengths = [[7, 2, 7], [12, 4]] if packed else [[TOKENS]] * 2
    return Batch(tokens, labels, Documents.from_lengths(lengths[:rows]))


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def build(config: ModelConfig, comm: Communicator | None) -> Transformer:
    """The whole model, or this rank's share of it."""
    if comm is None:
        return fill(build_on_meta(config), config)
    mesh = init_device_mesh("cpu", (comm.size,), mesh_dim_names=("tp",))
    return fill(build_on_meta(config, mesh, comm), config)


def build_on_meta(
    config: ModelConfig, mesh: DeviceMesh | None = None, comm: Communicator | None = None
) -> Transformer:
    with torch.device("meta"), default_dtype(torch.float64):
        model = Transformer(config)
    if mesh is not None and comm is not None:
        shard_vocabulary(model, mesh, comm)
        shard_layers(model.layers.values(), mesh, comm)
    return model


def fill(model: Transformer, config: ModelConfig) -> Transformer:
    model.to_empty(device="cpu")
    initialize(model, config, SEED, owned_region)
    for name, buffer in model.named_buffers():
        buffer.fill_(1 / config.moe.n_experts if name.endswith("frequencies") else 0)
    return model


def train(model: Transformer, batch: Batch, comm: Communicator | None) -> dict[str, Tensor]:
    """Loss, final hidden state and the gradients of all weights, whole."""
    cross_entropy: Callable[..., Tensor] = partial(chunked_cross_entropy, chunk=5)
    head = cross_entropy if comm is None else ShardedCrossEntropy(cross_entropy, comm)
    hidden_states = []

    def output(hidden: Tensor, weight: Tensor) -> Tensor:
        hidden_states.append(hidden.detach())
        return head(hidden, weight, batch.labels)

    out = model(batch.tokens, batch.documents, output)
    (out.value + out.balance.sum() + out.z.sum()).backward()
    hidden = hidden_states[0]
    gradients = {name: weight.grad for name, weight in model.named_parameters()}
    if comm is not None:
        hidden = comm.all_gather(hidden, 1)
        gradients = {name: whole(gradient, comm) for name, gradient in gradients.items()}
    return {"loss": out.value.detach(), "hidden": hidden, **gradients}


def whole(gradient: Tensor, comm: Communicator) -> Tensor:
    """A sharded gradient, or the sum of the ranks' parts of one that is not sharded."""
    if isinstance(gradient, DTensor) and "tp" in gradient.device_mesh.mesh_dim_names:
        return gradient.full_tensor()
    gradient = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
    dist.all_reduce(gradient, group=comm.group)
    return gradient


def worst_error(
    config: ModelConfig, batch: Batch, comm: Communicator, recompute: Recompute = "none"
) -> tuple[float, str]:
    expected = train(build(config, None), batch, None)
    model = build(config, comm)
    recompute_layers(model.layers, [recompute])
    ours = train(model, batch, comm)
    assert ours.keys() == expected.keys()
    return max((relative_error(ours[name], expected[name]), name) for name in expected)


def relative_error(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


class WithoutSum(Communicator):
    """Each rank keeps its own part of what should be the sum over ranks."""

    def start_reduce_scatter(self, x: Tensor, dim: int) -> Pending:
        out = x.chunk(self.size, dim)[self.rank].contiguous()
        return Pending(self, "reduce_scatter", None, x, out)


class WrongOrder(Communicator):
    """The parts of the sequence come in the order of another rank."""

    def start_all_gather(self, x: Tensor, dim: int) -> Pending:
        pending = super().start_all_gather(x, dim)
        return replace(pending, out=pending.wait().roll(x.shape[dim], dim), work=None, arrange=None)


def worst_error_with_fsdp(folder: Path) -> tuple[float, str]:
    """Of weights that tp 2 and FSDP shard along the same dimension, into parts that differ.

    Their gradients, and what a checkpoint of them gives a model that is not sharded.
    """
    heads = replace(LINEAR.linear, n_key_heads=2, n_value_heads=6)
    config = replace(LINEAR, vocab_size=26, linear=heads)
    batch = make_batch(2, True)
    axes = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("fsdp", "tp"))
    comm = Communicator(axes["tp"].get_group(), "tp")
    model = build_on_meta(config, axes["tp"], comm)
    fully_shard(model, mesh=axes["fsdp"])
    fill(model, config)
    ours = train(model, batch, comm)
    dcp.save({"model": model.state_dict()}, checkpoint_id=folder)
    loaded = build(config, None)
    for weight in loaded.parameters():
        weight.detach().zero_()
    dcp.load({"model": loaded.state_dict()}, checkpoint_id=folder)

    reference = build(config, None)
    expected = train(reference, batch, None)
    errors = [(relative_error(ours[name], expected[name]), name) for name in expected]
    for (name, weight), copy in zip(reference.named_parameters(), loaded.parameters(), strict=True):
        errors.append((float(not torch.equal(weight, copy)), f"checkpoint of {name}"))
    return max(errors)


@dataclass(frozen=True)
class Noted(Pending):
    """Notes when it is waited for."""

    events: list[str] = field(default_factory=list)

    def wait(self) -> Tensor:
        self.events.append("wait")
        return super().wait()


class Noting(Communicator):
    """Notes when reductions start and when they are waited for."""

    def __init__(self, group: dist.ProcessGroup, axis: str) -> None:
        super().__init__(group, axis)
        self.events: list[str] = []

    def start_reduce_scatter(self, x: Tensor, dim: int) -> Pending:
        self.events.append("start")
        return Noted(**vars(super().start_reduce_scatter(x, dim)), events=self.events)


def events_of_backward(group: dist.ProcessGroup) -> list[str]:
    """What happens in the backward pass of a SwiGLU, after that of its last projection."""
    comm = Noting(group, "tp")
    model = build(SOFTMAX, comm)
    mlp = model.layers["0"].mlp
    out = mlp(torch.randn(1, 4, SOFTMAX.d_model, dtype=torch.float64, requires_grad=True))
    comm.events.clear()
    for name, weight in mlp.named_parameters():
        weight.register_hook(lambda _, name=name: comm.events.append(name))
    out.sum().backward()
    return comm.events


def main() -> None:
    join_ranks(timedelta(seconds=60))
    group = dist.group.WORLD
    folder = Path(sys.argv[1])
    results = {}
    for name, config in CONFIGS.items():
        for rows, packed in ((1, False), (2, True)):
            error = worst_error(config, make_batch(rows, packed), Communicator(group, "tp"))
            results[f"{name}-{'packed' if packed else 'whole'}"] = error
    for recompute in ("selective", "full"):
        batch, comm = make_batch(2, True), Communicator(group, "tp")
        results[recompute] = worst_error(CONFIGS["hybrid-tied"], batch, comm, recompute)
    for broken in (WithoutSum, WrongOrder):
        results[broken.__name__] = worst_error(SOFTMAX, make_batch(2, True), broken(group, "tp"))
    results["fsdp"] = worst_error_with_fsdp(folder / "checkpoint")
    events = events_of_backward(group)
    if dist.get_rank() == 0:
        torch.save({"errors": results, "events": events}, folder / "results.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
