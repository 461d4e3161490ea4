"""Pieces cover what is visible, once, and nothing else."""

from collections.abc import Iterator

from hypothesis import given
from hypothesis import strategies as st

from pretrain.model.kernels.pieces import Piece, visible_pieces

LENGTH = 40


@st.composite
def blocks(draw: st.DrawFn) -> tuple[range, range]:
    """Queries, and keys that lie before them or hold theirs."""
    start, stop = sorted(draw(st.lists(st.integers(0, LENGTH), min_size=2, max_size=2)))
    if draw(st.booleans()):
        first, last = sorted(draw(st.lists(st.integers(0, start), min_size=2, max_size=2)))
    else:
        first, last = draw(st.integers(0, start)), draw(st.integers(stop, LENGTH))
    return range(start, stop), range(first, last)


def pairs(piece: Piece) -> Iterator[tuple[int, int]]:
    queries, keys, mask = piece
    assert mask == "full" or len(queries) == len(keys)
    for number, query in enumerate(queries):
        seen = {"full": keys, "causal": keys[: number + 1], "reversed": keys[number:]}[mask]
        yield from ((query, key) for key in seen)


@given(blocks(), st.one_of(st.none(), st.integers(1, LENGTH + 5)))
def test_each_visible_pair_is_in_one_piece(block: tuple[range, range], window: int | None) -> None:
    queries, keys = block
    covered = [pair for piece in visible_pieces(queries, keys, window) for pair in pairs(piece)]
    oldest = LENGTH if window is None else window
    expected = [(i, j) for i in queries for j in keys if i - oldest < j <= i]
    assert sorted(covered) == expected


@given(blocks(), st.integers(1, LENGTH))
def test_a_querys_own_key_comes_first(block: tuple[range, range], window: int) -> None:
    seen: set[int] = set()
    for queries, keys, mask in visible_pieces(*block, window):
        assert (mask == "causal") == (queries == keys)
        if set(block[0]) <= set(block[1]):
            assert mask == "causal" or set(queries) <= seen
        seen |= set(queries)
