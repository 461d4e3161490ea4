"""Each part is written once, the bytes are shared, the index of thousands of ranks is small."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.checkpoint.index import Chunk, Index, StoredTensor
from pretrain.checkpoint.plan import PackedParts, Part, merge, share_out

MATRIX = StoredTensor("matrix", "F32", (4, 6))
VECTOR = StoredTensor("vector", "BF16", (3,))
SCALAR = StoredTensor("scalar", "I64", ())


def index_of(ranks: list[list[Part]]) -> tuple[Index, Index]:
    """What is held, and what of it is written."""
    files = [f"rank-{rank}" for rank in range(len(ranks))]
    held = merge([PackedParts.of(parts) for parts in ranks], files)
    return held, held.only(share_out(held))


def grid(tensor: StoredTensor, rows: int, columns: int) -> list[Part]:
    """A matrix in equal pieces."""
    height, width = tensor.shape[0] // rows, tensor.shape[1] // columns
    return [
        Part(tensor, (row * height, column * width), (height, width))
        for row in range(rows)
        for column in range(columns)
    ]


def whole(tensor: StoredTensor) -> Part:
    return Part(tensor, (0,) * len(tensor.shape), tensor.shape)


def test_parts_lie_one_after_the_other_in_the_file_of_the_rank_that_writes_them() -> None:
    quarters = grid(MATRIX, 2, 2)
    _, written = index_of([[whole(SCALAR), *quarters[:3]], [quarters[3], whole(VECTOR)], []])
    assert written.chunks("matrix", (1, 2), (2, 1)) == [
        Chunk("rank-0", 8, "F32", (0, 0), (2, 3)),
        Chunk("rank-0", 8 + 48, "F32", (2, 0), (2, 3)),
    ]
    assert written.chunks("matrix", (3, 5), (1, 1)) == [
        Chunk("rank-1", 0, "F32", (2, 3), (2, 3)),
    ]
    assert written.chunks("vector", (0,), (3,)) == [Chunk("rank-1", 24, "BF16", (0,), (3,))]
    assert written.chunks("scalar", (), ()) == [Chunk("rank-0", 0, "I64", (), ())]
    assert written.chunks("matrix", (4, 0), (0, 6)) == []


@settings(deadline=None)
@given(st.data())
def test_each_part_is_written_once_whoever_holds_copies_of_it(data: st.DataObject) -> None:
    ranks: list[list[Part]] = [[] for _ in range(data.draw(st.integers(1, 5)))]
    everyone = st.lists(st.sampled_from(range(len(ranks))), min_size=1, unique=True)
    parts = [*grid(MATRIX, 2, 3), whole(VECTOR), whole(SCALAR)]
    for part in parts:
        for rank in data.draw(everyone):
            ranks[rank].append(part)
    held, written = index_of(ranks)
    rows = zip(written.tensor, written.file, written.offsets.tolist(), strict=True)
    found = []
    for tensor, file, offsets in rows:
        stored = written.tensors[tensor]
        place = tuple(offsets[: len(stored.shape)])
        found.append((stored.name, place))
        assert place in [part.offsets for part in ranks[file] if part.tensor == stored]
    assert sorted(found) == sorted((part.tensor.name, part.offsets) for part in parts)
    again = Index.from_bytes(written.to_bytes())
    assert again.tensors == held.tensors
    for part in parts:
        of_part = part.tensor.name, part.offsets, part.sizes
        assert again.chunks(*of_part) == written.chunks(*of_part)
        assert len(again.chunks(*of_part)) == 1


def test_ranks_that_hold_the_same_share_its_bytes() -> None:
    tensors = [StoredTensor(f"{size}", "U8", (size,)) for size in (1, 1, 2, 3, 5, 8, 13, 21, 34)]
    same = [whole(tensor) for tensor in {tensor.name: tensor for tensor in tensors}.values()]
    _, written = index_of([same, same, same])
    load = np.bincount(written.file, written.nbytes, 3)
    assert load.sum() == 87
    assert load.max() == 34


@pytest.mark.parametrize(
    ("ranks", "problem"),
    [
        ([grid(MATRIX, 2, 2)[:3]], "matrix: 72 of 96 bytes"),
        ([grid(MATRIX, 2, 2), [whole(MATRIX)]], "matrix: 120 of 96 bytes|matrix: 168 of 96 bytes"),
        ([[whole(VECTOR)], [whole(StoredTensor("vector", "F32", (3,)))]], "ranks differ in vector"),
    ],
)
def test_parts_that_are_not_the_whole_are_refused(ranks: list[list[Part]], problem: str) -> None:
    with pytest.raises(AssertionError, match=problem):
        index_of(ranks)


def test_the_index_of_2048_ranks_is_small() -> None:
    """A model of 1T weights: 8 stages of 800 tensors, each in 256 shards."""
    shape = 256, 7168, 2048
    tensors = [
        StoredTensor(f"optimizer.layers.{layer}.experts.w{w}.exp_avg", "F32", shape)
        for layer in range(64)
        for w in range(100)
    ]
    file, of_stage = (grid.ravel() for grid in np.indices((2048, 800)))
    zero = np.zeros_like(file)
    held = Index(
        tensors,
        [f"attempt-0001-rank-{rank:05d}.safetensors" for rank in range(2048)],
        file // 256 * 800 + of_stage,
        file,
        np.stack([file % 256, zero, zero], 1),
        np.stack([zero + 1, zero + shape[1], zero + shape[2]], 1),
    )
    content = held.only(share_out(held)).to_bytes()
    assert len(content) < 2**20

    last = (255, 0, 0), (1, *shape[1:])
    written = Index.from_bytes(content)
    assert len(written.tensor) == 1_638_400
    assert written.chunks(tensors[5603].name, *last) == [
        Chunk("attempt-0001-rank-02047.safetensors", 3 * 7168 * 2048 * 4, "F32", *last)
    ]


def test_what_a_rank_sends_of_its_parts_is_small() -> None:
    tensors = [StoredTensor(f"layers.{i}.w.exp_avg", "F32", (256, 7168, 2048)) for i in range(800)]
    packed = PackedParts.of([Part(tensor, (9, 0, 0), (1, 7168, 2048)) for tensor in tensors])
    assert len(packed.tensors) + len(packed.places) < 2**13
