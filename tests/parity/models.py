"""The models and layouts of the matrix."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from pretrain.layouts import Layout

# Every feature that a layout could get wrong is in one of them.
MODELS = {
    "hybrid-moe": ["model.moe.z_loss=0.001"],
    "softmax-moe": [
        "model.layer_pattern=[softmax]",
        "model.attention.output_gate=false",
        "model.moe.balance=bias",
        "model.moe.d_shared_expert=0",
        "model.moe.renormalise_top_k=false",
    ],
    "linear-moe": [
        "model.layer_pattern=[linear]",
        "model.moe.balance=sequence",
        "model.moe.capacity_factor=1.0",
        "model.zero_centered_norm=false",
    ],
    "tied-moe": ["model.tie_embeddings=true", "model.moe.balance=sequence"],
    "hybrid": ["model.moe.n_experts=0"],
    "softmax": ["model.layer_pattern=[softmax]", "model.moe.n_experts=0"],
    "linear": ["model.layer_pattern=[linear]", "model.moe.n_experts=0"],
    "sliding": [
        "model.layer_pattern=[linear, sliding, softmax]",
        "model.attention.window=20",
        "model.moe.n_experts=0",
    ],
    "tied": ["model.tie_embeddings=true", "model.moe.n_experts=0"],
}
# With rows of more than a chunk, to be cut into segments.
LONG = "data.seq_len=256"
OF_LONG_ROWS = {
    "long-hybrid-moe": ["model.moe.balance=bias", LONG],
    "long-sliding": [*MODELS["sliding"], LONG],
    "long-linear-moe": ["model.layer_pattern=[linear]", LONG],
}
SIZES = [
    "model.vocab_size=512",
    "model.d_model=64",
    "model.n_layers=4",
    "model.layer_pattern=[linear, softmax]",
    "model.d_ff=96",
    "model.attention={n_heads: 4, n_kv_heads: 2, head_dim: 16, rope_base: 10000.0}",
    "model.linear={n_key_heads: 2, n_value_heads: 4, key_dim: 16, value_dim: 16}",
    "model.moe={n_experts: 8, top_k: 2, d_expert: 32, d_shared_expert: 32, aux_loss: 0.01}",
    "data.seq_len=64",
    "train.global_batch=8",
    "train.microbatch=4",
    "optim.clip=0.5",
    # With the usual 1e-8 a weight whose gradient is rounding noise moves by the learning rate.
    "optim.eps=1e-5",
]
SCHEDULES = ("gpipe", "1f1b", "interleaved", "zbv", "dualpipev")


@dataclass(frozen=True)
class Setting:
    """A model, its data, and how they are spread over ranks.

    Attributes:
        model: a name in `MODELS` or `OF_LONG_ROWS`.
        data: `packed` documents, or `whole` rows.
        layout: sizes of axes that are not 1.
        options: further overrides that must change nothing.
    """

    model: str
    data: str
    layout: str = ""
    options: tuple[str, ...] = ()

    def __str__(self) -> str:
        options = [option.rpartition("=")[2] for option in self.options]
        words = " ".join([self.layout, *options, self.model, self.data])
        return words.replace("=", "").replace(" ", "-")

    @property
    def ranks(self) -> int:
        sizes = dict(axis.split("=") for axis in self.layout.split())
        return Layout(**{axis: int(size) for axis, size in sizes.items()}).world_size

    def of_one_rank(self, shards: Path) -> list[str]:
        model = (MODELS | OF_LONG_ROWS)[self.model]
        return [*SIZES, *model, f"data.shards={shards / self.data}"]

    def overrides(self, shards: Path) -> list[str]:
        axes = [f"parallel.{axis}" for axis in self.layout.split()]
        microbatch = 1 if "pp=" in self.layout else 2
        return [*self.of_one_rank(shards), f"train.microbatch={microbatch}", *axes, *self.options]


def schedule(name: str) -> str:
    return f"parallel.pipeline.schedule={name}"


def layouts(ranks: int) -> Iterator[tuple[str, tuple[str, ...]]]:
    """All layouts of `ranks` ranks, a power of 2, with the schedules that suit 4 layers."""
    powers = [2**n for n in range(ranks.bit_length())]
    for pp, replicate, shard, cp, tp, ep in product(powers, repeat=6):
        if pp * replicate * shard * cp * tp != ranks or (shard * cp * tp) % ep:
            continue
        axes = ("pp", "dp_replicate", "dp_shard", "cp", "ep", "tp")
        sizes = dict(zip(axes, (pp, replicate, shard, cp, ep, tp), strict=True))
        layout = " ".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1)
        suitable = {1: (), 2: SCHEDULES, 4: SCHEDULES[:2]}[pp]
        yield from ((layout, (schedule(name),)) for name in suitable)
        if pp == 1:
            yield layout, ()
