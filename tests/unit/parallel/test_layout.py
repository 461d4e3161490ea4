"""How rows are shared among ranks: every token once, equally many, at equal cost."""

from itertools import chain

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.layout import AttentionCost, RowLayout, costs, split_row, zigzag

COST = AttentionCost(full=1, windowed=3, window=5)


@st.composite
def rows(draw: st.DrawFn) -> tuple[list[int], int]:
    """Document lengths, and ranks that share them equally."""
    ranks = draw(st.integers(1, 6))
    room = ranks * draw(st.integers(1, 20))
    share = room // ranks
    sizes = st.sampled_from([1, 2, share // 2, share - 1, share, share + 1, 2 * share, room])
    lengths = []
    while room:
        lengths.append(min(room, max(1, draw(sizes))))
        room -= lengths[-1]
    return lengths, ranks


def pareto_lengths(length: int, shape: float, seed: int) -> list[int]:
    draw, lengths = np.random.default_rng(seed), []
    while length:
        lengths.append(min(length, int(64 * (1 + draw.pareto(shape)))))
        length -= lengths[-1]
    return lengths


@given(rows())
def test_each_token_is_on_one_rank_and_each_rank_has_as_many(row: tuple[list[int], int]) -> None:
    lengths, ranks = row
    layout = split_row(lengths, ranks, COST)
    tokens = [layout.tokens_of(rank).tolist() for rank in range(ranks)]
    assert sorted(chain.from_iterable(tokens)) == list(range(sum(lengths)))
    assert {len(of_rank) for of_rank in tokens} == {sum(lengths) // ranks}
    assert tokens == [sorted(of_rank) for of_rank in tokens]


@given(rows())
def test_twice_as_few_cuts_as_ranks_or_fewer(row: tuple[list[int], int]) -> None:
    lengths, ranks = row
    assert len(split_row(lengths, ranks).held) <= 2 * ranks - 1


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_a_row_of_one_document_is_zigzag(ranks: int) -> None:
    length = 48 * ranks
    layout = split_row([length], ranks)
    blocks = np.arange(length).reshape(2 * ranks, -1)
    for rank in range(ranks):
        expected = np.concatenate([blocks[rank], blocks[2 * ranks - 1 - rank]])
        assert layout.tokens_of(rank).tolist() == expected.tolist()


@given(rows())
def test_cost_is_the_keys_that_tokens_see(row: tuple[list[int], int]) -> None:
    lengths, ranks = row
    layout = split_row(lengths, ranks, COST)
    position = np.concatenate([np.arange(length) for length in lengths])
    of_token = COST.full * (position + 1) + COST.windowed * np.minimum(position + 1, COST.window)
    expected = [int(of_token[layout.tokens_of(rank)].sum()) for rank in range(ranks)]
    assert costs(layout, COST) == expected


@pytest.mark.parametrize("ranks", [2, 3, 4, 8, 16])
@pytest.mark.parametrize("shape", [0.8, 1.1, 1.5])
def test_packed_documents_cost_ranks_the_same(shape: float, ranks: int) -> None:
    for seed in range(10):
        lengths = pareto_lengths(2048 * ranks, shape, seed)
        of_ranks = costs(split_row(lengths, ranks), AttentionCost())
        assert max(of_ranks) <= 1.05 * np.mean(of_ranks)


def test_zigzag_is_not_even_for_packed_documents() -> None:
    worst = 0.0
    for seed in range(10):
        lengths = pareto_lengths(2048 * 8, 1.1, seed)
        of_ranks = costs(RowLayout(tuple(lengths), zigzag(2048 * 8, 8)), AttentionCost())
        worst = max(worst, max(of_ranks) / np.mean(of_ranks))
    assert worst > 1.5


def test_windows_are_shared_by_what_they_see() -> None:
    lengths = pareto_lengths(8192, 1.1, 3)
    narrow = AttentionCost(full=0, windowed=2, window=32)
    of_ranks = costs(split_row(lengths, 4, narrow), narrow)
    assert max(of_ranks) <= 1.01 * np.mean(of_ranks)


@given(rows(), st.integers(1, 4))
def test_cutting_shares_and_joining_them_again_changes_nothing(
    row: tuple[list[int], int], parts: int
) -> None:
    lengths, ranks = [length * parts for length in row[0]], row[1]
    layout = split_row(lengths, ranks)
    cut = layout.cut(parts)
    pieces = [cut.tokens_of(rank) for rank in range(ranks * parts)]
    for rank in range(ranks):
        of_rank = np.concatenate(pieces[rank * parts : (rank + 1) * parts])
        assert of_rank.tolist() == layout.tokens_of(rank).tolist()
    assert cut.joined(parts) == layout


@given(rows())
def test_blocks_parts_and_holders_tell_the_same(row: tuple[list[int], int]) -> None:
    lengths, ranks = row
    layout = split_row(lengths, ranks)
    owner = {
        token: (rank, place)
        for rank in range(ranks)
        for place, token in enumerate(layout.tokens_of(rank).tolist())
    }
    for document in layout.documents:
        held = [
            (token, (rank, place + i))
            for tokens, rank, place in layout.holders(document)
            for i, token in enumerate(tokens)
        ]
        assert held == [(token, owner[token]) for token in document]
    for rank in range(ranks):
        parts = [
            (token, place + i, token in document)
            for document, part, place in layout.parts_of(rank)
            for i, token in enumerate(part)
        ]
        tokens = layout.tokens_of(rank).tolist()
        assert parts == [(token, place, True) for place, token in enumerate(tokens)]
