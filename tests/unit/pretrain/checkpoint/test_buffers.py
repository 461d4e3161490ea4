"""Tensors that share few pieces of memory."""

from collections.abc import Sequence

import torch
from hypothesis import given
from hypothesis import strategies as st

from pretrain.checkpoint.buffers import empty_tensors

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.uint8])
SHAPES = st.lists(st.integers(0, 9), max_size=3).map(torch.Size)


@given(st.lists(st.tuples(SHAPES, DTYPES), max_size=12), st.integers(1, 2000))
def test_each_has_its_shape_and_memory_of_its_own(
    wanted: Sequence[tuple[torch.Size, torch.dtype]], piece: int
) -> None:
    named = {f"tensor {number}": one for number, one in enumerate(wanted)}
    tensors = empty_tensors(named, pin=False, piece=piece)
    assert list(tensors) == list(named)
    for number, tensor in enumerate(tensors.values(), start=1):
        tensor.fill_(number)
    for number, (size, dtype) in enumerate(wanted, start=1):
        tensor = tensors[f"tensor {number - 1}"]
        assert tensor.is_contiguous()
        assert tensor.dtype == dtype
        assert torch.equal(tensor, torch.full(size, number, dtype=dtype))


def test_pieces_are_as_large_as_asked_for_and_full() -> None:
    lengths = [700, 300, 520, 480, 90, 10, 1500, 401]
    named = {str(n): (torch.Size([n]), torch.float32) for n in lengths}
    tensors = empty_tensors(named, pin=False, piece=4096)
    pieces = {tensor.untyped_storage().data_ptr(): tensor for tensor in tensors.values()}
    sizes = sorted(tensor.untyped_storage().nbytes() for tensor in pieces.values())
    # One that is larger than a piece has its own.
    assert sizes[-1] == -(-1500 * 4 // 64) * 64
    assert all(size <= 4096 for size in sizes[:-1])
    assert len(sizes) == 1 + 3
