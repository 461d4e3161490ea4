"""Which blocks of attention a rank computes with the keys of another: index maths on the host."""

from collections.abc import Iterable, Iterator, Sequence

from parallel.context.documents import Rows
from pretrain.model.kernels.attention import Block

# From so many queries on, blocks of the same lengths may be computed by kernels made for them.
RECURRING_TOKENS = 4096


def ring_blocks(groups: Sequence[Rows], rank: int, ranks: int, first: int = 0) -> list[list[Block]]:
    """What the queries of `rank` see of each rank's keys, in the places where those are held.

    Args:
        first: the token of the rows from which on there are queries.
    """
    blocks: list[list[Block]] = [[] for _ in range(ranks)]
    causal: list[Block] = []
    for rows, layout in groups:
        held: dict[int, slice] = {}
        is_whole = len(layout.lengths) == 1
        n_earlier = sum(len(block) for block in layout.blocks[rank] if block.start < first)
        for document, part, place in layout.parts_of(rank):
            if part.start < first:
                continue
            queries = slice(place - n_earlier, place - n_earlier + len(part))
            recurs = is_whole and len(part) >= RECURRING_TOKENS
            # What a rank holds of a document lies together, and in order.
            start = held.get(document.start, queries).start
            held[document.start] = slice(start, queries.stop)
            for keys, owner, key_place in layout.holders(range(document.start, part.start)):
                if owner != rank or keys.start < first:
                    of_keys = slice(key_place, key_place + len(keys))
                    blocks[owner].append(Block(rows, queries, of_keys, "full", recurs))
        for queries in held.values():
            recurs = is_whole and queries.stop - queries.start >= RECURRING_TOKENS
            of_keys = slice(queries.start + n_earlier, queries.stop + n_earlier)
            causal.append(Block(rows, queries, of_keys, "causal", recurs))
    # A query's causal block comes first.
    blocks[rank] = [*causal, *blocks[rank]]
    return [list(_joined(of_source)) for of_source in blocks]


def last_ring_step(groups: Sequence[Rows], ranks: int, first: int = 0) -> int:
    """The last step of the ring in which any rank sees any of the keys that have come to it.

    In step s, rank r has the keys of rank r - s. There are queries from token `first` on.
    """
    last = 0
    for _, layout in groups:
        for document in layout.documents:
            holders = [(rank, tokens) for tokens, rank, _ in layout.holders(document)]
            for i, (rank, tokens) in enumerate(holders):
                if tokens.start < first:
                    continue
                last = max(last, *((rank - earlier) % ranks for earlier, _ in holders[: i + 1]))
                if last == ranks - 1:
                    return last
    return last


def _joined(blocks: Iterable[Block]) -> Iterator[Block]:
    """The same, neighbours without a mask as one where they are one rectangle.

    Those that recur stay as they are: each segment more would make a new length.
    """
    last: Block | None = None
    for block in blocks:
        joined = _join(last, block) if last else None
        if joined is None and last is not None:
            yield last
        last = joined or block
    if last is not None:
        yield last


def _join(a: Block, b: Block) -> Block | None:
    if a.rows != b.rows or a.mask != "full" or b.mask != "full" or a.recurs:
        return None
    if a.queries == b.queries and a.keys.stop == b.keys.start:
        return a._replace(keys=slice(a.keys.start, b.keys.stop))
    if a.keys == b.keys and a.queries.stop == b.queries.start:
        return a._replace(queries=slice(a.queries.start, b.queries.stop))
    return None
