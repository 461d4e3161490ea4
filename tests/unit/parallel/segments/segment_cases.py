"""The gradient of rows in segments against that of whole rows, in float64; run by test_segments.py.

Argument: the file for what rank 0 found: the largest error of each case, by what it shows.
"""

import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from datetime import timedelta
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.apply import Parallelised, Spread, apply
from parallel.context import blocks
from parallel.context.documents import SplitDocuments
from parallel.fsdp import owned_region
from parallel.layout import split_row
from parallel.mesh import Mesh, join_ranks
from parallel.offload import Offload, Store
from parallel.recompute import Recompute
from parallel.segments.documents import SegmentDocuments, cut_apart, cut_rows, tokens_of
from parallel.segments.lanes import LaneMemory
from parallel.segments.memory import SegmentMemory
from parallel.stage import Objective
from pretrain.model.config import (
    AttentionConfig,
    LayerKind,
    LinearAttentionConfig,
    ModelConfig,
    MoEConfig,
)
from pretrain.model.init import initialize
from pretrain.model.kernels.cross_entropy import IGNORED, chunked_cross_entropy
from pretrain.model.transformer import Transformer

T, V = 96, 50
ROWS: dict[str, list[list[int]]] = {
    "whole": [[T], [T]],
    "packed": [[5, 70, 21], [24, 1, 2, 69]],
    "at borders": [[23, 25, 48], [12, 12, 72]],
    "one goes on": [[T], [24, 24, 24, 24]],
}
RECOMPUTE: tuple[Recompute, ...] = ("selective", "full")
KINDS: dict[str, tuple[LayerKind, ...]] = {
    "linear": ("linear",),
    "sliding": ("sliding",),
    "softmax": ("softmax",),
    "hybrid": ("linear", "sliding", "softmax"),
}


def model_config(kinds: tuple[LayerKind, ...]) -> ModelConfig:
    return ModelConfig(
        vocab_size=V,
        d_model=16,
        n_layers=3,
        layer_pattern=kinds,
        attention=AttentionConfig(n_heads=2, n_kv_heads=2, head_dim=8, window=9, rope_fraction=0.5),
        linear=LinearAttentionConfig(n_key_heads=2, n_value_heads=2, key_dim=8, value_dim=8),
        moe=MoEConfig(n_experts=4, top_k=2, d_expert=8, d_shared_expert=8),
        init_std=0.3,
    )


def auxiliary_loss(out: Any) -> Tensor:
    total: Tensor = 1e-2 * out.balance.sum() + 1e-3 * out.z.sum()
    return total / (2 * T)


OBJECTIVE = Objective(
    partial(chunked_cross_entropy, chunk=32), auxiliary_loss, lambda out: out.balance.detach()
)


class Model:
    """A model in float64, spread over all ranks."""

    def __init__(
        self,
        kinds: tuple[LayerKind, ...],
        in_segments: bool,
        recompute: Recompute = "none",
        microbatch: int = 2,
        store: Store | None = None,
        **axes: int,
    ) -> None:
        config = model_config(kinds)
        device = torch.device("cpu")
        self.mesh = Mesh.build(device, **axes)
        with torch.device("meta"):
            model = Transformer(config).double()
        how = Spread(
            torch.float64,
            recompute=[recompute],
            store=store,
            microbatch=microbatch,
            in_segments=in_segments,
        )
        self.spread: Parallelised = apply({0: model}, OBJECTIVE, self.mesh, how, device)
        stage = self.spread.stages[0]
        stage.to_empty(device=device)
        initialize(stage.model, config, seed=0, region=owned_region)
        for number, layer in stage.model.layers.items():
            share = torch.arange(1.0, 5.0).roll(int(number))
            layer.moe.frequencies.copy_(share / share.sum())

    def gradients(
        self, tokens: Tensor, labels: Tensor, documents: Sequence[Any]
    ) -> dict[str, Tensor]:
        """Whole gradients of the weights, and the loss."""
        self.spread.forward_backward(tokens, labels, documents, int(2 * T))
        loss = torch.as_tensor(self.spread.stages[0].cross_entropy).clone()
        dist.all_reduce(loss)
        found = {"loss": loss / self.mesh.tp.size()}
        for name, weight in self.spread.weights.named_parameters():
            assert weight.grad is not None
            found[name] = weight.grad.full_tensor()  # type: ignore[attr-defined]
            weight.grad = None
        return found


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    tokens, labels = torch.randint(V, (2, 2, T), generator=generator)
    labels[:, ::7] = IGNORED
    return tokens, labels


def whole(rows: Sequence[Sequence[int]], mesh: Mesh) -> tuple[Tensor, Tensor, list[Any]]:
    """This rank's part of the batch, in one piece."""
    rank, ranks = mesh.cp.get_local_rank(), mesh.cp.size()
    layouts = [split_row(row, ranks) for row in rows]
    mine = torch.stack([torch.from_numpy(layout.tokens_of(rank)) for layout in layouts])
    tokens, labels = (x.gather(1, mine) for x in batch())
    return tokens, labels, [SplitDocuments.of_rank(layouts, rank)]


def in_segments(
    rows: Sequence[Sequence[int]], segments: int, reach: int, mesh: Mesh
) -> tuple[Tensor, Tensor, list[list[SegmentDocuments]]]:
    """The same in segments."""
    rank, ranks = mesh.cp.get_local_rank(), mesh.cp.size()
    cut = cut_rows(rows, segments, SegmentMemory(segments, reach), rank, ranks)
    tokens, labels = (x.gather(1, tokens_of(cut)) for x in batch())
    return tokens, labels, [cut]


def halves(row: Sequence[int]) -> tuple[tuple[list[int], list[int]], bool]:
    """The documents of the halves of a row, and whether the second begins in the middle of one."""
    parts = cut_apart(row, T // 2)
    n_first = [*accumulate(parts)].index(T // 2) + 1
    return (parts[:n_first], parts[n_first:]), T // 2 not in accumulate(row)


def in_lanes(
    model: "Model", rows: Sequence[Sequence[int]], segments: int, microbatch: int
) -> dict[str, Tensor]:
    """The sum of the gradients of two batches, of the first and the second halves of rows."""
    rank, ranks, lanes = model.mesh.cp.get_local_rank(), model.mesh.cp.size(), LaneMemory(len(rows))
    goes_on = [halves(row)[1] for row in rows]
    total: dict[str, Tensor] = {}
    for half in range(2):
        of_half = [halves(row)[0][half] for row in rows]
        lanes.begin(goes_on if half else [False] * len(rows))
        cuts = []
        for first in range(0, len(rows), microbatch):
            here = slice(first, first + microbatch)
            memory = SegmentMemory(segments, lanes=lanes, rows=here)
            cuts.append(cut_rows(of_half[here], segments, memory, rank, ranks))
        mine = torch.cat([tokens_of(cut) for cut in cuts])
        tokens, labels = (x.chunk(2, dim=1)[half].gather(1, mine) for x in batch())
        for name, gradient in model.gradients(tokens, labels, cuts).items():
            total[name] = total.get(name, torch.zeros(())) + gradient
        lanes.end(of_half, goes_on if not half else [False] * len(rows))
    return total


def error(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    return max(
        float((ours[name] - theirs[name]).norm() / theirs[name].norm().clamp_min(1e-30))
        for name in theirs
    )


def alone() -> Iterator[tuple[str, float]]:
    """Each kind of layer and of rows, on one rank."""
    for kind, kinds in KINDS.items():
        reference, model = Model(kinds, False), Model(kinds, True)
        for rows_name, rows in ROWS.items():
            expected = reference.gradients(*whole(rows, reference.mesh))
            for segments in (2, 4, 8):
                found = model.gradients(*in_segments(rows, segments, segments, model.mesh))
                yield f"{kind}, {rows_name}, {segments}", error(found, expected)
    expected = reference.gradients(*whole(ROWS["whole"], reference.mesh))
    blocks.RECURRING_TOKENS, usual = 8, blocks.RECURRING_TOKENS
    found = model.gradients(*in_segments(ROWS["whole"], 4, 4, model.mesh))
    blocks.RECURRING_TOKENS = usual
    yield "blocks that recur", error(found, expected)
    expected = reference.gradients(*whole(ROWS["packed"], reference.mesh))
    for mode in RECOMPUTE:
        recomputing = Model(KINDS["hybrid"], True, mode)
        found = recomputing.gradients(*in_segments(ROWS["packed"], 4, 4, model.mesh))
        yield f"recompute {mode}", error(found, expected)
    with tempfile.TemporaryDirectory() as folder:
        store = Offload("disk", Path(folder)).open()
        for mode in ("none", "full"):
            store.most = 0
            offloading = Model(KINDS["hybrid"], True, mode, store=store)
            found = offloading.gradients(*in_segments(ROWS["packed"], 4, 4, model.mesh))
            yield f"offload, recompute {mode}", error(found, expected)
            # Keys and values of all segments but the last; handles are gone with the step.
            keys = 2 * 3 * 2 * 2 * (T // 4) * 8 * 8
            assert store.most >= keys, (store.most, keys)
            assert store.used == 0


def cut_between_groups() -> Iterator[tuple[str, float]]:
    """The gradient of groups of two segments."""
    reference, model = Model(KINDS["hybrid"], False), Model(KINDS["hybrid"], True)
    for name, rows in {
        "apart": [[10, 38, 48], [T // 2, 20, 28]],
        "over": [[T], [40, 56]],
    }.items():
        expected = reference.gradients(*whole(rows, reference.mesh))
        found = model.gradients(*in_segments(rows, 4, 2, model.mesh))
        yield f"gradient, {name}", error(found, expected)
        loss = {"loss": expected["loss"]}
        yield f"loss, {name}", error(found, loss)


def over_lanes(**axes: int) -> Iterator[tuple[str, float]]:
    """Rows that go on where those of the batch before have ended; no gradient goes back to them."""
    kinds: tuple[LayerKind, ...] = ("linear", "sliding")
    reference = Model(kinds, True, **axes)
    for microbatch, segments in ((1, 2), (2, 1)):
        model = Model(kinds, True, "full", microbatch=microbatch, **axes)
        for name, rows in ROWS.items():
            expected = reference.gradients(*in_segments(rows, 2, 1, reference.mesh))
            found = in_lanes(model, rows, segments, microbatch)
            yield f"{axes}, {name}, {segments}", error(found, expected)


def begin_anew() -> Iterator[tuple[str, float]]:
    """Layers without a window see their own row alone."""
    reference, model = Model(KINDS["softmax"], False), Model(KINDS["softmax"], True)
    for name, rows in ROWS.items():
        apart = [[n for half in halves(row)[0] for n in half] for row in rows]
        expected = reference.gradients(*whole(apart, reference.mesh))
        yield name, error(in_lanes(model, rows, 2, 2), expected)


def together() -> Iterator[tuple[str, float]]:
    """Layouts of four ranks."""
    for axes in ({"cp": 2, "tp": 2}, {"cp": 4, "ep": 2}):
        reference = Model(KINDS["hybrid"], False, **axes)
        model = Model(KINDS["hybrid"], True, "full", **axes)
        for name, rows in ROWS.items():
            expected = reference.gradients(*whole(rows, reference.mesh))
            found = model.gradients(*in_segments(rows, 4, 4, model.mesh))
            yield f"{axes}, {name}", error(found, expected)


def main() -> None:
    join_ranks(timedelta(minutes=10))
    torch.set_default_dtype(torch.float64)
    if dist.get_world_size() == 1:
        errors = {
            "exact": dict(alone()),
            "cut": dict(cut_between_groups()),
            "lanes": dict(over_lanes()),
            "anew": dict(begin_anew()),
        }
    else:
        errors = {"exact": dict(together()), "lanes": dict(over_lanes(cp=2, tp=2))}
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(errors))
    dist.barrier()


if __name__ == "__main__":
    main()
