"""One pass over the bytes of a page: its elements, and its text in blocks.

A tree as browsers build it costs more than reading it. Blocks need less: which elements that
break lines contain a piece of text, and what those are called. Time and memory are linear in
the page; the stack of open elements has a limit, and so has every search in it.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_pipeline.compiled import compiled_in_place
from data_pipeline.extract import vocabulary
from data_pipeline.extract.scan import (
    AMPERSAND,
    BANG,
    CLASSES,
    FNV_PRIME,
    IS_HIDDEN,
    IS_SELF_CLOSING,
    LT,
    MARKS,
    MEANINGS,
    OTHER_BLOCK,
    QUESTION,
    SLASH,
    Bytes,
    Marks,
    comment_end,
    entity_end,
    find_byte,
    is_letter,
    name_end,
    raw_end,
    read_attributes,
    space_at,
    tag_end,
    tag_number,
)
from data_pipeline.extract.vocabulary import TAGS, Kind, names

State = NDArray[np.int64]
Stack = NDArray[np.int32]
Counts = NDArray[np.int32]

MAX_DEPTH = 1024
MAX_SEARCH = 128
MAX_NODES = 100_000  # a page of so many has no main text, and features would take 200 MB
MAX_SHORT_WORD = 3
LINE_FEED = ord("\n")

TAG_KINDS = vocabulary.TAG_KINDS
INLINE, BLOCK, BREAK, RAW, SKIP, VOID, ROOT = (int(kind) for kind in Kind)
A, B, STRONG, SPAN, BR, TITLE, IMG, INPUT, PRE, P, LI, UL, OL, DT, DD, DL = (
    TAGS[name] for name in names("a b strong span br title img input pre p li ul ol dt dd dl")
)
TR, TD, TH, TBODY, THEAD, TFOOT, TABLE, OBJECT, BUTTON, H1, H6 = (
    TAGS[name] for name in names("tr td th tbody thead tfoot table object button h1 h6")
)

# What separates a block from the one before it.
PARAGRAPH, LINE_BREAK, NEW_CELL, NEW_ITEM, NEW_ROW = range(5)

# Columns of `Blocks.counts`.
(
    CHARACTERS,
    WORDS,
    SHORT_WORDS,
    LINK_CHARACTERS,
    LINKS,
    DIGITS,
    CAPITALS,
    SENTENCE_ENDS,
    COMMAS,
    BOLD,
    WIDE,
    BEYOND_ASCII,
    IMAGES,
    INPUTS,
    SPANS,
    COUNTS,
) = range(16)

# Where the reader stands: fields of one array, so that compiled functions can share them.
(
    OUT,  # bytes of text written
    N_BLOCKS,
    N_NODES,
    DEPTH,
    IS_OPEN,  # a block has begun
    SEPARATOR,
    SPACE,  # white space waits for the next character
    WORD_LENGTH,
    LINK,
    NEW_LINK,
    BOLD_DEPTH,
    SKIPPED,
    PREFORMATTED,
    IMAGES_BEFORE,
    INPUTS_BEFORE,
    SPANS_BEFORE,
    OVERFLOW,
    TITLE_START,
    TITLE_END,
    FIELDS,
) = range(20)


class Blocks(NamedTuple):
    """Elements and blocks of one page, both in document order.

    Blocks of an element are those from its `first_block` up to `end_block`; node 0 is the page.
    """

    node_parent: NDArray[np.int32]
    node_tag: NDArray[np.uint8]
    node_depth: NDArray[np.int32]
    node_hidden: NDArray[np.bool_]
    node_meanings: NDArray[np.uint64]
    node_path: NDArray[np.uint64]
    """Hash of the tags and classes from the page down to the element."""
    node_first_block: NDArray[np.int32]
    node_end_block: NDArray[np.int32]
    block_node: NDArray[np.int32]
    block_start: NDArray[np.int64]
    block_end: NDArray[np.int64]
    block_separator: NDArray[np.uint8]
    block_meanings: NDArray[np.uint64]
    counts: Counts
    text: NDArray[np.uint8]
    title: NDArray[np.uint8]
    is_too_deep: bool


@compiled_in_place
def _end_block(blocks: Blocks, state: State, separator: int) -> None:
    """Text that follows is another block's."""
    if state[IS_OPEN]:
        block = state[N_BLOCKS] - 1
        blocks.block_end[block] = state[OUT]
        if 0 < state[WORD_LENGTH] <= MAX_SHORT_WORD:
            blocks.counts[block, SHORT_WORDS] += 1
        state[IS_OPEN] = 0
        state[SEPARATOR] = separator
    elif separator == LINE_BREAK:
        if state[SEPARATOR] == LINE_BREAK:
            state[SEPARATOR] = PARAGRAPH
    elif separator > state[SEPARATOR] or state[SEPARATOR] == LINE_BREAK:
        state[SEPARATOR] = separator
    state[SPACE] = state[WORD_LENGTH] = 0


@compiled_in_place
def _begin_block(blocks: Blocks, state: State, stack: Stack) -> int:
    block = state[N_BLOCKS]
    if block >= len(blocks.block_node):
        state[OVERFLOW] = state[IS_OPEN] = 1  # what follows are more lines of the last block
        blocks.text[state[OUT]] = LINE_FEED
        state[OUT] += 1
        return block - 1
    state[N_BLOCKS] += 1
    blocks.block_node[block] = stack[state[DEPTH]]
    blocks.block_start[block] = state[OUT]
    blocks.block_separator[block] = state[SEPARATOR]
    blocks.counts[block] = 0
    blocks.counts[block, IMAGES] = state[IMAGES_BEFORE]
    blocks.counts[block, INPUTS] = state[INPUTS_BEFORE]
    blocks.counts[block, SPANS] = state[SPANS_BEFORE]
    state[IMAGES_BEFORE] = state[INPUTS_BEFORE] = state[SPANS_BEFORE] = 0
    state[IS_OPEN] = 1
    state[SEPARATOR] = PARAGRAPH
    state[SPACE] = state[WORD_LENGTH] = 0
    state[NEW_LINK] = state[LINK]
    return block


@compiled_in_place
def _count_character(html: Bytes, at: int, counts: Counts, block: int) -> None:
    """Count the character that begins at `at`, no small letter, in the statistics of its block."""
    byte = html[at]
    if byte < 128:
        if 65 <= byte <= 90:
            counts[block, CAPITALS] += 1
        elif 48 <= byte <= 57:
            counts[block, DIGITS] += 1
        elif byte == 46 or byte == 33 or byte == 63:
            counts[block, SENTENCE_ENDS] += 1
        elif byte == 44 or byte == 59:
            counts[block, COMMAS] += 1
        return
    counts[block, BEYOND_ASCII] += 1
    if at + 2 >= len(html):
        return
    second, third = html[at + 1], html[at + 2]
    if byte == 0xE3 and second == 0x80:  # ideographic comma and full stop
        counts[block, COMMAS] += third == 0x81
        counts[block, SENTENCE_ENDS] += third == 0x82
    elif byte == 0xEF and second == 0xBC:  # full-width ! , ?
        counts[block, COMMAS] += third == 0x8C
        counts[block, SENTENCE_ENDS] += third == 0x81 or third == 0x9F
    elif byte == 0xE0 and second == 0xA5:  # danda
        counts[block, SENTENCE_ENDS] += third == 0xA4
    elif 0xE3 <= byte <= 0xED:
        counts[block, WIDE] += 1
    elif byte == 0xD8:  # Arabic comma, question mark
        counts[block, COMMAS] += second == 0x8C
        counts[block, SENTENCE_ENDS] += second == 0x9F
    elif byte == 0xDB:  # Urdu full stop
        counts[block, SENTENCE_ENDS] += second == 0x94


@compiled_in_place
def _read_text(html: Bytes, at: int, end: int, blocks: Blocks, state: State, stack: Stack) -> None:
    """Copy text with its white space collapsed, and count what it consists of."""
    text, counts = blocks.text, blocks.counts
    is_open, block, out = state[IS_OPEN], state[N_BLOCKS] - 1, state[OUT]
    space, word_length, characters = state[SPACE], state[WORD_LENGTH], 0
    while at < end:
        byte = html[at]
        if word_length and not space and not state[NEW_LINK]:
            start = at
            while at < end and 97 <= html[at] <= 122:
                text[out] = html[at]
                out += 1
                at += 1
            if at > start:
                word_length += at - start
                characters += at - start
                continue
        width = space_at(html, at)
        if width:
            if is_open:
                if state[PREFORMATTED] and byte == LINE_FEED:
                    text[out] = LINE_FEED
                    out += 1
                    space = 0
                else:
                    space = 1
            if 0 < word_length <= MAX_SHORT_WORD:
                counts[block, SHORT_WORDS] += 1
            word_length = 0
            at += width
            continue
        if byte < 32:
            at += 1
            continue
        if not is_open:
            state[OUT] = out
            block = _begin_block(blocks, state, stack)
            is_open, out = 1, state[OUT]
            space = word_length = 0
        if space:
            text[out] = 32
            out += 1
            space = 0
        if word_length == 0:
            counts[block, WORDS] += 1
        if state[NEW_LINK]:
            counts[block, LINKS] += 1
            state[NEW_LINK] = 0
        if byte < 128 or byte >= 192:
            _count_character(html, at, counts, block)
            characters += 1
            word_length += 1
        stop = min(end, entity_end(html, at)) if byte == AMPERSAND else at + 1
        while at < stop:
            text[out] = html[at]
            out += 1
            at += 1
    if characters:
        counts[block, CHARACTERS] += characters
        counts[block, LINK_CHARACTERS] += characters * state[LINK]
        if state[BOLD_DEPTH]:
            counts[block, BOLD] += characters
    state[OUT], state[SPACE], state[WORD_LENGTH] = out, space, word_length


@compiled_in_place
def _push(blocks: Blocks, state: State, stack: Stack, tag: int, marks: Marks, skips: bool) -> None:
    node = state[N_NODES]
    if state[DEPTH] + 1 >= MAX_DEPTH or node >= len(blocks.node_tag):
        state[OVERFLOW] = 1
        return
    parent = stack[state[DEPTH]]
    state[N_NODES] += 1
    state[DEPTH] += 1
    stack[state[DEPTH]] = node
    blocks.node_parent[node] = parent
    blocks.node_tag[node] = tag
    blocks.node_depth[node] = state[DEPTH]
    blocks.node_hidden[node] = blocks.node_hidden[parent] or marks[IS_HIDDEN] > 0
    blocks.node_meanings[node] = marks[MEANINGS]
    path = (blocks.node_path[parent] ^ np.uint64(tag + 1)) * FNV_PRIME
    blocks.node_path[node] = (path ^ marks[CLASSES]) * FNV_PRIME
    blocks.node_first_block[node] = state[N_BLOCKS]
    state[SKIPPED] += skips
    state[PREFORMATTED] += tag == PRE


@compiled_in_place
def _pop(blocks: Blocks, state: State, stack: Stack) -> None:
    node = stack[state[DEPTH]]
    tag = blocks.node_tag[node]
    blocks.node_end_block[node] = state[N_BLOCKS]
    state[SKIPPED] -= TAG_KINDS[tag] == SKIP
    state[PREFORMATTED] -= tag == PRE
    state[DEPTH] -= 1


@compiled_in_place
def _close(
    blocks: Blocks,
    state: State,
    stack: Stack,
    tag: int,
    other_tag: int,
    scope: int,
    other_scope: int,
) -> None:
    """Close the innermost element of a tag unless one that bounds its scope comes first."""
    lowest = max(0, state[DEPTH] - MAX_SEARCH)
    for depth in range(state[DEPTH], lowest, -1):
        found = blocks.node_tag[stack[depth]]
        if found in (tag, other_tag):
            while state[DEPTH] >= depth:
                _pop(blocks, state, stack)
            return
        if found in (scope, other_scope):
            return


@compiled_in_place
def _close_implied(blocks: Blocks, state: State, stack: Stack, tag: int) -> None:
    """Close what a start tag closes though no end tag says so (HTML standard, 13.2.6.4.7)."""
    top = blocks.node_tag[stack[state[DEPTH]]]
    if top == P and tag != BUTTON:
        _pop(blocks, state, stack)
        top = blocks.node_tag[stack[state[DEPTH]]]
    if H1 <= tag <= H6 and H1 <= top <= H6:
        _pop(blocks, state, stack)
    elif tag == LI:
        _close(blocks, state, stack, LI, LI, UL, OL)
    elif tag in (DT, DD):
        _close(blocks, state, stack, DT, DD, DL, DL)
    elif tag in (TD, TH):
        _close(blocks, state, stack, TD, TH, TR, TABLE)
    elif tag == TR:
        _close(blocks, state, stack, TR, TR, TABLE, TABLE)
    elif tag in (TBODY, THEAD, TFOOT):
        _close(blocks, state, stack, TBODY, THEAD, TABLE, TABLE)


@compiled_in_place
def _start_tag(
    html: Bytes,
    at: int,
    name_start: int,
    name_end: int,
    blocks: Blocks,
    state: State,
    stack: Stack,
    marks: Marks,
) -> int:
    """Act on a start tag whose attributes begin at `at`; return where reading goes on."""
    at = read_attributes(html, at, marks)
    tag = tag_number(html, name_start, name_end)
    kind = TAG_KINDS[tag]
    if kind == RAW:
        end = raw_end(html, at, name_start, name_end)
        if tag == TITLE and state[TITLE_END] == 0:
            state[TITLE_START], state[TITLE_END] = at, end
        return tag_end(html, end)
    if kind == BREAK:
        _end_block(blocks, state, LINE_BREAK if tag == BR else PARAGRAPH)
    elif kind == VOID:
        state[IMAGES_BEFORE] += tag == IMG
        state[INPUTS_BEFORE] += tag == INPUT
    elif kind in (BLOCK, SKIP):
        separator = PARAGRAPH
        _close_implied(blocks, state, stack, tag)
        if tag == LI:
            separator = NEW_ITEM
        elif tag in (TD, TH):
            row = stack[state[DEPTH]]
            is_first = blocks.node_first_block[row] == state[N_BLOCKS]
            separator = NEW_ROW if is_first else NEW_CELL
        if kind == BLOCK:
            _end_block(blocks, state, separator)
        if not (marks[IS_SELF_CLOSING] and (kind == SKIP or tag == OTHER_BLOCK)):
            _push(blocks, state, stack, tag, marks, kind == SKIP)
    elif kind == INLINE:
        if tag == A:
            state[LINK] = state[NEW_LINK] = 1
        elif tag in (B, STRONG):
            state[BOLD_DEPTH] += 1
        elif tag == SPAN:
            state[SPANS_BEFORE] += 1
        block = state[N_BLOCKS] - 1 if state[IS_OPEN] else state[N_BLOCKS]
        if block < len(blocks.block_meanings):
            blocks.block_meanings[block] |= marks[MEANINGS]
    return at


@compiled_in_place
def _end_tag(
    html: Bytes, at: int, name_start: int, name_end: int, blocks: Blocks, state: State, stack: Stack
) -> int:
    tag = tag_number(html, name_start, name_end)
    kind = TAG_KINDS[tag]
    if kind in (BLOCK, SKIP):
        if kind == BLOCK:
            _end_block(blocks, state, PARAGRAPH)
            if tag in (LI, UL, OL, TR, TABLE):
                state[SEPARATOR] = PARAGRAPH  # not that of an empty item or cell
        is_cell = tag in (TD, TH, TR, TABLE)
        scope = OBJECT if tag != OBJECT else TABLE
        _close(blocks, state, stack, tag, tag, scope if is_cell else TD, scope)
    elif tag == BR:
        _end_block(blocks, state, LINE_BREAK)
    elif tag == A:
        state[LINK] = state[NEW_LINK] = 0
    elif tag in (B, STRONG):
        state[BOLD_DEPTH] = max(0, state[BOLD_DEPTH] - 1)
    return tag_end(html, at)


@compiled_in_place
def _read(html: Bytes, blocks: Blocks, state: State, stack: Stack, marks: Marks) -> None:
    n = len(html)
    at = 0
    while at < n:
        if html[at] != LT:
            end = find_byte(html, at, LT)
            if state[SKIPPED] == 0:
                _read_text(html, at, end, blocks, state, stack)
            at = end
        elif at + 1 == n:
            break
        elif is_letter(html[at + 1]):
            end = name_end(html, at + 1)
            at = _start_tag(html, end, at + 1, end, blocks, state, stack, marks)
        elif html[at + 1] == SLASH and at + 2 < n and is_letter(html[at + 2]):
            end = name_end(html, at + 2)
            at = _end_tag(html, end, at + 2, end, blocks, state, stack)
        elif html[at + 1] == BANG:
            at = comment_end(html, at)
        elif html[at + 1] == SLASH or html[at + 1] == QUESTION:
            at = tag_end(html, at)
        else:
            if state[SKIPPED] == 0:
                _read_text(html, at, at + 1, blocks, state, stack)
            at += 1
    _end_block(blocks, state, PARAGRAPH)
    while state[DEPTH] >= 0:
        _pop(blocks, state, stack)


def read_blocks(html: Bytes) -> Blocks:
    """Split a page, UTF-8 encoded, into blocks of text; never fails on any bytes."""
    capacity = min(MAX_NODES, int(np.count_nonzero(html == LT)) + 2)
    blocks = Blocks(
        node_parent=np.zeros(capacity, dtype=np.int32),
        node_tag=np.zeros(capacity, dtype=np.uint8),
        node_depth=np.zeros(capacity, dtype=np.int32),
        node_hidden=np.zeros(capacity, dtype=np.bool_),
        node_meanings=np.zeros(capacity, dtype=np.uint64),
        node_path=np.zeros(capacity, dtype=np.uint64),
        node_first_block=np.zeros(capacity, dtype=np.int32),
        node_end_block=np.zeros(capacity, dtype=np.int32),
        block_node=np.zeros(capacity, dtype=np.int32),
        block_start=np.zeros(capacity, dtype=np.int64),
        block_end=np.zeros(capacity, dtype=np.int64),
        block_separator=np.zeros(capacity, dtype=np.uint8),
        block_meanings=np.zeros(capacity, dtype=np.uint64),
        counts=np.zeros((capacity, COUNTS), dtype=np.int32),
        text=np.empty(len(html) + 1, dtype=np.uint8),
        title=html[:0],
        is_too_deep=False,
    )
    state = np.zeros(FIELDS, dtype=np.int64)
    state[N_NODES] = 1
    stack, marks = np.zeros(MAX_DEPTH, dtype=np.int32), np.zeros(MARKS, dtype=np.uint64)
    _read(html, blocks, state, stack, marks)
    nodes, found = int(state[N_NODES]), int(state[N_BLOCKS])
    cut = {
        name: values[: nodes if name.startswith("node_") else found]
        for name, values in blocks._asdict().items()
        if name.startswith(("node_", "block_", "counts"))
    }
    return Blocks(
        **cut,
        text=blocks.text[: state[OUT]],
        title=html[state[TITLE_START] : state[TITLE_END]],
        is_too_deep=bool(state[OVERFLOW]),
    )
