"""The main text of a page: its blocks that a classifier takes for what the page is about."""

import html
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from data_pipeline.extract.blocks import NEW_CELL, NEW_ITEM, PARAGRAPH, Blocks, read_blocks
from data_pipeline.extract.features import LENGTH, LINKED, block_features, running_sums
from data_pipeline.extract.forest import Forest, shipped_forest

# From a chance on, a block is main text. Where that leaves less than this of a page, as happens
# with shops, forums and lists of links, lower ones are tried.
CHANCES = (0.5, 0.25, 0.1)
MIN_LENGTH = 200.0
MIN_SHARE = 0.1
MAX_LINK_SHARE = 0.5
ITEM = b"- "


def main_text(page: str, forest: Forest | None = None) -> str:
    """The main text of an HTML page; all that is visible where none stands out.

    Args:
        forest: the classifier; the shipped one by default.
    """
    blocks = blocks_of(page)
    return join(blocks, choose(blocks, forest or shipped_forest()))


def blocks_of(page: str) -> Blocks:
    return read_blocks(np.frombuffer(page.encode("utf-8", "replace"), dtype=np.uint8))


def block_texts(blocks: Blocks) -> list[str]:
    text = blocks.text.tobytes()
    bounds = zip(blocks.block_start.tolist(), blocks.block_end.tolist(), strict=True)
    return [html.unescape(text[start:end].decode("utf-8", "replace")) for start, end in bounds]


def choose(blocks: Blocks, forest: Forest) -> NDArray[np.bool_]:
    """Which blocks are main text, [blocks]."""
    is_visible = ~blocks.node_hidden[blocks.block_node]
    if blocks.is_too_deep:
        return is_visible
    chances = forest.chances(block_features(blocks))
    lengths, linked = np.diff(running_sums(blocks)[:, [LENGTH, LINKED]], axis=0).T
    enough = min(MIN_LENGTH, MIN_SHARE * lengths[is_visible].sum())
    by_chance = [chances >= chance for chance in CHANCES]
    for chosen in (*by_chance, is_visible & (linked <= MAX_LINK_SHARE * lengths), is_visible):
        if chosen.any() and lengths[chosen].sum() >= enough:
            return chosen
    return ~is_visible


def join(blocks: Blocks, chosen: NDArray[np.bool_]) -> str:
    """The text of the chosen blocks: a line for each, but one for all cells of a table's row.

    Blank lines come before paragraphs, none before items, rows and the lines of a paragraph.
    """
    pieces = b"".join(_pieces(blocks, np.flatnonzero(chosen)))
    return html.unescape(pieces.decode("utf-8", "replace")).lstrip("\n")


def _pieces(blocks: Blocks, chosen: NDArray[np.intp]) -> Iterator[bytes]:
    text = blocks.text.tobytes()
    columns = (blocks.block_start, blocks.block_end, blocks.block_separator)
    last = -1
    for block, start, end, separator in zip(
        chosen.tolist(), *(column[chosen].tolist() for column in columns), strict=True
    ):
        if separator == NEW_CELL and block == last + 1:
            yield b" "
        elif separator == NEW_ITEM:
            yield b"\n" + ITEM
        else:
            yield b"\n\n" if separator == PARAGRAPH else b"\n"
        yield text[start:end]
        last = block
