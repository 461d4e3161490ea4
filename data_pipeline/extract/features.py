"""What a classifier is told about a block of text: itself, its neighbours, its place in the page.

Every feature is a number that has the same sense on each site and in each language: lengths,
shares, distances, and which general words name the elements around a block.
"""

import numpy as np
from numpy.typing import NDArray

from data_pipeline.compiled import compiled
from data_pipeline.extract import blocks as b
from data_pipeline.extract.blocks import Blocks
from data_pipeline.extract.scan import (
    FNV_PRIME,
    FNV_START,
    Bytes,
    Hashes,
    hash_bytes,
    is_letter,
    lower,
)
from data_pipeline.extract.vocabulary import MEANINGS, TAGS, names

Matrix = NDArray[np.float32]
Sums = NDArray[np.float64]

# A good block is prose by its looks: long, with few links, not hidden.
MIN_GOOD_LENGTH = 80
MAX_GOOD_LINK_SHARE = 0.3
WIDE_CHARACTER = 2.5  # an ideograph says about as much as this many letters
ANCESTORS = 5
NEIGHBOURS = 2
WINDOW = 5
MAX_SHARED_LEVELS = 8
FAR = 9.0
NONE = np.float32(-1)
NO_SHARE = np.float32(-0.1)
MIN_TITLE_SHARE = 0.3
MAX_TITLE_WORDS = 64
MAX_HEADING_WORDS = 32

# Elements that say what a block is for, as the words of a class do.
SCOPES = names(
    "article main section aside nav header footer form figure table ul ol dl blockquote figcaption "
    "button details dialog h1 h2 h3 h4 pre address td caption"
)
# Tags from text to furniture, so that a threshold between them makes sense.
TAG_ORDER = names(
    "p blockquote pre h2 h3 h4 h5 h6 h1 section article main div center td th li dd dt details "
    "summary figcaption caption figure address header footer aside nav form fieldset legend button"
)
SCOPE_OF_TAG = np.full(256, -1, dtype=np.int8)
SCOPE_OF_TAG[[TAGS[name] for name in SCOPES]] = np.arange(len(SCOPES))
ORDER_OF_TAG = np.full(256, TAG_ORDER.index("main"), dtype=np.int8)
ORDER_OF_TAG[[TAGS[name] for name in TAG_ORDER]] = np.arange(len(TAG_ORDER))

OWN = names(
    "length words link_share links digits capitals sentence_ends commas bold beyond_ascii wide "
    "short_words word_length images inputs spans ends_sentence separator is_hidden tag parent_tag "
    "depth is_good in_title copies"
)
PLACE = names(
    "before after blocks_before page_length page_link_share page_blocks page_good good_before "
    "good_after since_heading since_title since_good until_good window_length window_link_share "
    "window_good levels_to_half levels_to_most"
)
ANCESTOR = names("length link_share blocks mean_length good_share share_of_good")
NEIGHBOUR = names("length link_share tag shared_levels ends_sentence")
PATH = names("length blocks mean_length link_share good_share share_of_good")
SIDES = ("previous", "next")
NAMES = (
    *OWN,
    *PLACE,
    *(f"{name}_{level}_up" for level in range(ANCESTORS) for name in ANCESTOR),
    *(
        f"{side}_{n}_{name}"
        for n in range(1, NEIGHBOURS + 1)
        for side in SIDES
        for name in NEIGHBOUR
    ),
    *(f"path_{name}" for name in PATH),
    *(f"meaning_{number}" for number in range(len(MEANINGS))),
    *(f"inside_{name}" for name in SCOPES),
)
N_FEATURES, N_MEANINGS, N_SCOPES = len(NAMES), len(MEANINGS), len(SCOPES)
N_ANCESTOR, N_NEIGHBOUR = len(ANCESTOR), len(NEIGHBOUR)
AT_PLACE = len(OWN)
AT_ANCESTORS = AT_PLACE + len(PLACE)
AT_NEIGHBOURS = AT_ANCESTORS + ANCESTORS * N_ANCESTOR
AT_PATH = AT_NEIGHBOURS + NEIGHBOURS * len(SIDES) * N_NEIGHBOUR
AT_SURROUNDINGS = AT_PATH + len(PATH)
TAG, IS_GOOD, LINK_SHARE, ENDS_SENTENCE, IN_TITLE, COPIES = (
    OWN.index(name) for name in names("tag is_good link_share ends_sentence in_title copies")
)
UNTIL_GOOD, LEVELS_TO_HALF, LEVELS_TO_MOST = (
    AT_PLACE + PLACE.index(name) for name in names("until_good levels_to_half levels_to_most")
)

LENGTH, LINKED, GOOD, SUMS = range(4)  # columns of running sums, and their number


@compiled
def block_features(page: Blocks) -> Matrix:
    """Features of a page's blocks, [blocks, N_FEATURES]."""
    out = np.zeros((len(page.block_node), N_FEATURES), dtype=np.float32)
    sums = running_sums(page)
    _describe_blocks(page, sums, out)
    _count_copies(page, out)
    _describe_places(page, sums, out)
    _count_levels(page, sums, out)
    _describe_ancestors(page, sums, out)
    _describe_neighbours(page, out)
    _describe_paths(page, sums, out)
    _describe_surroundings(page, sums, out)
    return out


@compiled
def running_sums(page: Blocks) -> Sums:
    """Length, linked length and good length of all blocks before each one, [blocks + 1, SUMS]."""
    n = len(page.block_node)
    sums = np.zeros((n + 1, SUMS), dtype=np.float64)
    for block in range(n):
        count = page.counts[block]
        length = count[b.CHARACTERS] + (WIDE_CHARACTER - 1) * count[b.WIDE]
        linked = length * _share(count[b.LINK_CHARACTERS], count[b.CHARACTERS])
        is_good = (
            length >= MIN_GOOD_LENGTH
            and linked < MAX_GOOD_LINK_SHARE * length
            and not page.node_hidden[page.block_node[block]]
        )
        sums[block + 1, LENGTH] = sums[block, LENGTH] + length
        sums[block + 1, LINKED] = sums[block, LINKED] + linked
        sums[block + 1, GOOD] = sums[block, GOOD] + (length if is_good else 0.0)
    return sums


@compiled
def _log(value: float) -> np.float32:
    return np.float32(np.log1p(value))


@compiled
def _share(part: float, whole: float) -> np.float32:
    return np.float32(part / whole) if whole > 0 else np.float32(0)


@compiled
def _fill(row: Matrix, values: tuple[np.float32, ...]) -> None:
    for column, value in enumerate(values):
        row[column] = value


@compiled
def _describe_blocks(page: Blocks, sums: Sums, out: Matrix) -> None:
    title = np.empty(MAX_TITLE_WORDS, dtype=np.uint64)
    title = title[: _hash_words(page.title, 0, len(page.title), title)]
    for block in range(len(out)):
        count, node = page.counts[block], page.block_node[block]
        characters, words = count[b.CHARACTERS], count[b.WORDS]
        length = sums[block + 1, LENGTH] - sums[block, LENGTH]
        values = (
            _log(length),
            _log(words),
            _share(count[b.LINK_CHARACTERS], characters),
            _log(count[b.LINKS]),
            _share(count[b.DIGITS], characters),
            _share(count[b.CAPITALS], characters),
            _share(count[b.SENTENCE_ENDS], length),
            _share(count[b.COMMAS], length),
            _share(count[b.BOLD], characters),
            _share(count[b.BEYOND_ASCII], characters),
            _share(count[b.WIDE], characters),
            _share(count[b.SHORT_WORDS], words),
            _share(characters, words),
            np.float32(count[b.IMAGES]),
            np.float32(count[b.INPUTS]),
            _log(count[b.SPANS]),
            _ends_sentence(page, block),
            np.float32(page.block_separator[block]),
            np.float32(page.node_hidden[node]),
            np.float32(ORDER_OF_TAG[page.node_tag[node]]),
            np.float32(ORDER_OF_TAG[page.node_tag[page.node_parent[node]]]),
            np.float32(page.node_depth[node]),
            np.float32(sums[block + 1, GOOD] > sums[block, GOOD]),
            _share_in_title(page, block, title),
        )
        _fill(out[block], values)


@compiled
def _ends_sentence(page: Blocks, block: int) -> np.float32:
    """Whether the last characters of a block hold what ends a sentence, or a colon."""
    end = page.block_end[block]
    for at in range(max(page.block_start[block], end - 3), end):
        byte = page.text[at]
        if byte == 46 or byte == 33 or byte == 63 or byte == 58 or byte == 0x82:
            return np.float32(1)
    return np.float32(0)


@compiled
def _hash_words(text: Bytes, start: int, end: int, hashes: Hashes) -> int:
    """Hash as many words of two bytes or more as there is room for; returns their number."""
    found = 0
    at = start
    while at < end and found < len(hashes):
        value = FNV_START
        begin = at
        while at < end and (is_letter(text[at]) or text[at] >= 128 or 48 <= text[at] <= 57):
            value = (value ^ np.uint64(lower(text[at]))) * FNV_PRIME
            at += 1
        if at - begin > 1:
            hashes[found] = value
            found += 1
        at += 1
    return found


@compiled
def _share_in_title(page: Blocks, block: int, title: Hashes) -> np.float32:
    """How well a short block agrees with the page's title, 0 to 1."""
    if page.counts[block, b.WORDS] >= MAX_HEADING_WORDS or len(title) == 0:
        return NONE
    words = np.empty(MAX_HEADING_WORDS, dtype=np.uint64)
    n = _hash_words(page.text, page.block_start[block], page.block_end[block], words)
    shared = 0
    for word in words[:n]:
        for other in title:
            if word == other:
                shared += 1
                break
    return _share(shared * min(shared, len(title)), n * len(title))


@compiled
def _count_copies(page: Blocks, out: Matrix) -> None:
    """How often the page has a block's text."""
    keys = np.empty(len(out), dtype=np.uint64)
    for block in range(len(out)):
        keys[block] = hash_bytes(page.text, page.block_start[block], page.block_end[block])
    numbers, found = _group(keys)
    times = np.bincount(numbers, minlength=found)
    for block in range(len(out)):
        out[block, COPIES] = times[numbers[block]]


@compiled
def _group(keys: Hashes) -> tuple[NDArray[np.int64], int]:
    """Number equal keys alike, from 0 in order of appearance; returns numbers and their count."""
    size = 16
    while size < 2 * len(keys):
        size *= 2
    slots = np.full(size, -1, dtype=np.int64)
    numbers = np.empty(len(keys), dtype=np.int64)
    found = 0
    for index in range(len(keys)):
        slot = np.int64((keys[index] >> np.uint64(20)) & np.uint64(size - 1))
        while slots[slot] >= 0 and keys[slots[slot]] != keys[index]:
            slot = (slot + 1) & (size - 1)
        if slots[slot] < 0:
            slots[slot] = index
            numbers[index] = found
            found += 1
        else:
            numbers[index] = numbers[slots[slot]]
    return numbers, found


@compiled
def _describe_places(page: Blocks, sums: Sums, out: Matrix) -> None:
    n = len(out)
    total, good = sums[n, LENGTH], sums[n, GOOD]
    heading = title = last_good = -1
    for block in range(n):
        tag = page.node_tag[page.block_node[block]]
        if tag == b.H1:
            heading = block
        if b.H1 <= tag <= b.H6 and out[block, IN_TITLE] >= MIN_TITLE_SHARE:
            title = block
        first, end = max(0, block - WINDOW), min(n, block + WINDOW + 1)
        window = sums[end] - sums[first]
        values = (
            _share(sums[block, LENGTH], total),
            _log(total - sums[block + 1, LENGTH]),
            _share(block, n),
            _log(total),
            _share(sums[n, LINKED], total),
            _log(n),
            _share(good, total),
            _share(sums[block, GOOD], good),
            _share(good - sums[block + 1, GOOD], good),
            _log(sums[block, LENGTH] - sums[heading, LENGTH]) if heading >= 0 else NONE,
            _log(sums[block, LENGTH] - sums[title, LENGTH]) if title >= 0 else NONE,
            _log(block - last_good) if last_good >= 0 else np.float32(FAR),
            np.float32(FAR),
            _log(window[LENGTH]),
            _share(window[LINKED], window[LENGTH]),
            _share(window[GOOD], window[LENGTH]),
        )
        _fill(out[block, AT_PLACE:], values)
        if out[block, IS_GOOD]:
            for before in range(max(0, last_good), block):
                out[before, UNTIL_GOOD] = _log(block - before)
            last_good = block


@compiled
def _count_levels(page: Blocks, sums: Sums, out: Matrix) -> None:
    """How many levels up is the first element with a half, and with most, of the good text."""
    good = sums[len(out), GOOD]
    levels = np.zeros((len(page.node_tag), 2), dtype=np.float32)
    for node in range(1, len(levels)):
        held = sums[page.node_end_block[node], GOOD] - sums[page.node_first_block[node], GOOD]
        above = levels[page.node_parent[node]]
        levels[node, 0] = 0 if held >= 0.5 * good else above[0] + 1
        levels[node, 1] = 0 if held >= 0.85 * good else above[1] + 1
    for block in range(len(out)):
        out[block, LEVELS_TO_HALF] = levels[page.block_node[block], 0]
        out[block, LEVELS_TO_MOST] = levels[page.block_node[block], 1]


@compiled
def _describe_ancestors(page: Blocks, sums: Sums, out: Matrix) -> None:
    good = sums[len(out), GOOD]
    for block in range(len(out)):
        node = page.block_node[block]
        for level in range(ANCESTORS):
            first, end = page.node_first_block[node], page.node_end_block[node]
            held = sums[end] - sums[first]
            values = (
                _log(held[LENGTH]),
                _share(held[LINKED], held[LENGTH]),
                _log(end - first),
                _log(_share(held[LENGTH], end - first)),
                _share(held[GOOD], held[LENGTH]),
                _share(held[GOOD], good),
            )
            _fill(out[block, AT_ANCESTORS + level * N_ANCESTOR :], values)
            node = page.node_parent[node]


@compiled
def _describe_neighbours(page: Blocks, out: Matrix) -> None:
    for block in range(len(out)):
        at = AT_NEIGHBOURS
        for distance in range(1, NEIGHBOURS + 1):
            for other in (block - distance, block + distance):
                if 0 <= other < len(out):
                    values = (
                        out[other, 0],
                        out[other, LINK_SHARE],
                        out[other, TAG],
                        _levels_between(page, page.block_node[block], other),
                        out[other, ENDS_SENTENCE],
                    )
                    _fill(out[block, at:], values)
                else:
                    out[block, at : at + N_NEIGHBOUR] = NONE
                at += N_NEIGHBOUR


@compiled
def _levels_between(page: Blocks, node: int, block: int) -> np.float32:
    """How many levels above an element is the first one that also holds `block`."""
    levels = 0
    while levels < MAX_SHARED_LEVELS and not (
        page.node_first_block[node] <= block < page.node_end_block[node]
    ):
        node = page.node_parent[node]
        levels += 1
    return np.float32(levels)


@compiled
def _describe_paths(page: Blocks, sums: Sums, out: Matrix) -> None:
    """Describe all blocks whose elements have the same tags and classes from the page down."""
    numbers, found = _group(page.node_path[page.block_node])
    of_path = np.zeros((found, SUMS + 1), dtype=np.float64)
    for block in range(len(out)):
        path = of_path[numbers[block]]
        for column in range(SUMS):
            path[column] += sums[block + 1, column] - sums[block, column]
        path[SUMS] += 1
    good = sums[len(out), GOOD]
    for block in range(len(out)):
        path = of_path[numbers[block]]
        values = (
            _log(path[LENGTH]),
            _log(path[SUMS]),
            _log(path[LENGTH] / path[SUMS]),
            _share(path[LINKED], path[LENGTH]),
            _share(path[GOOD], path[LENGTH]),
            _share(path[GOOD], good),
        )
        _fill(out[block, AT_PATH:], values)


@compiled
def _describe_surroundings(page: Blocks, sums: Sums, out: Matrix) -> None:
    """For each meaning and scope: the share of the page's text in the nearest element with it."""
    total = sums[len(out), LENGTH]
    nearest = np.full((len(page.node_tag), N_MEANINGS + N_SCOPES), NO_SHARE, dtype=np.float32)
    for node in range(1, len(nearest)):
        first, end = page.node_first_block[node], page.node_end_block[node]
        if first == end:
            continue
        row = nearest[node]
        row[:] = nearest[page.node_parent[node]]
        share = _share(sums[end, LENGTH] - sums[first, LENGTH], total)
        _set_meanings(row, page.node_meanings[node], share)
        scope = SCOPE_OF_TAG[page.node_tag[node]]
        if scope >= 0:
            row[N_MEANINGS + scope] = share
    for block in range(len(out)):
        row = out[block, AT_SURROUNDINGS:]
        row[:] = nearest[page.block_node[block]]
        share = _share(sums[block + 1, LENGTH] - sums[block, LENGTH], total)
        _set_meanings(row, page.block_meanings[block], share)


@compiled
def _set_meanings(row: Matrix, meanings: np.uint64, share: np.float32) -> None:
    if meanings:
        for meaning in range(N_MEANINGS):
            if meanings >> np.uint64(meaning) & np.uint64(1):
                row[meaning] = share
