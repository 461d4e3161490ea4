"""Tags, attributes and text of HTML, told apart in its bytes."""

import numpy as np
from numpy.typing import NDArray

from data_pipeline.compiled import compiled_in_place
from data_pipeline.extract import vocabulary

Bytes = NDArray[np.uint8]
Hashes = NDArray[np.uint64]
Marks = NDArray[np.uint64]

MAX_ENTITY_BYTES = 12
MAX_ATTRIBUTE_NAME = len("aria-hidden")

LT, GT, AMPERSAND, QUOTE, APOSTROPHE, SLASH, BANG, QUESTION, EQUALS, DASH, COLON, SEMICOLON = (
    b"<>&\"'/!?=-:;"
)
LOWER_D, LOWER_H, LOWER_I, LOWER_N, LOWER_O, LOWER_T, LOWER_Y = b"dhinoty"
FNV_START, FNV_PRIME = np.uint64(vocabulary.FNV_START), np.uint64(vocabulary.FNV_PRIME)
ZERO = np.uint64(0)

TAG_KEYS, TAG_NUMBERS = vocabulary.tag_table()
TAG_SLOT_MASK = np.uint64(len(TAG_KEYS) - 1)
OTHER_INLINE, OTHER_BLOCK = vocabulary.OTHER_INLINE, vocabulary.OTHER_BLOCK
NEXT_STATE, MEANINGS_FOUND = vocabulary.meaning_automaton()
EDGE = vocabulary.EDGE

CLASS, ID, ROLE, ITEMPROP, REL, STYLE, HIDDEN, ARIA_HIDDEN = (
    np.uint64(vocabulary.fnv1a(name))
    for name in vocabulary.names("class id role itemprop rel style hidden aria-hidden")
)

# What a tag's attributes say, in one array.
MEANINGS, CLASSES, IS_HIDDEN, IS_SELF_CLOSING, MARKS = range(5)


@compiled_in_place
def lower(byte: int) -> int:
    return byte + 32 if 65 <= byte <= 90 else byte


@compiled_in_place
def is_letter(byte: int) -> bool:
    return 97 <= (byte | 32) <= 122


@compiled_in_place
def is_space(byte: int) -> bool:
    return byte == 32 or 9 <= byte <= 13


@compiled_in_place
def find_byte(html: Bytes, start: int, byte: int) -> int:
    index = start
    while index < len(html) and html[index] != byte:
        index += 1
    return index


@compiled_in_place
def _find(html: Bytes, start: int, first: int, second: int) -> int:
    """Where two bytes follow each other at or after `start`, or the page's end."""
    for index in range(start, len(html) - 1):
        if html[index] == first and html[index + 1] == second:
            return index
    return len(html)


@compiled_in_place
def hash_bytes(html: Bytes, start: int, end: int) -> np.uint64:
    value = FNV_START
    for index in range(start, end):
        value = (value ^ np.uint64(lower(html[index]))) * FNV_PRIME
    return value


@compiled_in_place
def tag_end(html: Bytes, start: int) -> int:
    """What follows the next >."""
    return min(len(html), find_byte(html, start, GT) + 1)


@compiled_in_place
def name_end(html: Bytes, start: int) -> int:
    end = start
    while end < len(html) and html[end] > 32 and html[end] != SLASH and html[end] != GT:
        end += 1
    return end


@compiled_in_place
def tag_number(html: Bytes, start: int, end: int) -> int:
    """The number of a tag; unknown ones with a dash are custom elements, most often blocks."""
    key = hash_bytes(html, start, end)
    slot = np.int64(key & TAG_SLOT_MASK)
    while TAG_KEYS[slot] != ZERO:
        if TAG_KEYS[slot] == key:
            return int(TAG_NUMBERS[slot])
        slot = (slot + 1) & np.int64(TAG_SLOT_MASK)
    for index in range(start, end):
        if html[index] == DASH:
            return OTHER_BLOCK
    return OTHER_INLINE


@compiled_in_place
def comment_end(html: Bytes, start: int) -> int:
    """The byte after a comment or declaration that begins with <! at `start`."""
    if start + 4 <= len(html) and html[start + 2] == DASH and html[start + 3] == DASH:
        at = start + 4
        if at < len(html) and html[at] == GT:
            return at + 1
        while True:
            at = _find(html, at, DASH, DASH)
            while at + 2 < len(html) and html[at + 2] == DASH:
                at += 1
            if at + 2 >= len(html):
                return len(html)
            if html[at + 2] == GT:
                return at + 3
            at += 2
    return tag_end(html, start)


@compiled_in_place
def raw_end(html: Bytes, start: int, name_start: int, name_end: int) -> int:
    """Where the end tag of a raw text element begins, or the page's end."""
    length = name_end - name_start
    at = start
    while True:
        at = _find(html, at, LT, SLASH)
        after = at + 2 + length
        if after > len(html):
            return len(html)
        is_same = True
        for index in range(length):
            if lower(html[at + 2 + index]) != lower(html[name_start + index]):
                is_same = False
                break
        if is_same and (after == len(html) or not is_letter(html[after])):
            return at
        at += 2


@compiled_in_place
def space_at(html: Bytes, at: int) -> int:
    """Bytes of the white space at `at`, a non-breaking one included; 0 if there is none."""
    byte = html[at]
    if is_space(byte):
        return 1
    if byte == 0xC2 and at + 1 < len(html) and html[at + 1] == 0xA0:
        return 2
    if byte != AMPERSAND or at + 5 >= len(html):
        return 0
    if html[at + 1] == 110 and html[at + 2] == 98 and html[at + 3] == 115 and html[at + 4] == 112:
        return 6 if html[at + 5] == SEMICOLON else 5  # &nbsp;
    if html[at + 1] == 35 and html[at + 2] == 49 and html[at + 3] == 54 and html[at + 4] == 48:
        return 6 if html[at + 5] == SEMICOLON else 0  # &#160;
    return 0


@compiled_in_place
def entity_end(html: Bytes, at: int) -> int:
    """The byte after the character reference at `at`, or after its & where it is none."""
    limit = min(len(html), at + MAX_ENTITY_BYTES)
    for index in range(at + 1, limit):
        if html[index] == SEMICOLON:
            return index + 1
        if html[index] <= 32 or html[index] == LT or html[index] == AMPERSAND:
            break
    return at + 1


@compiled_in_place
def read_attributes(html: Bytes, at: int, marks: Marks) -> int:
    """Read attributes up to the end of their tag, note them in `marks`, and return what follows."""
    marks[MEANINGS], marks[CLASSES] = ZERO, ZERO
    marks[IS_HIDDEN], marks[IS_SELF_CLOSING] = ZERO, ZERO
    n = len(html)
    while at < n:
        byte = html[at]
        if byte == GT:
            return at + 1
        if byte == SLASH or is_space(byte):
            marks[IS_SELF_CLOSING] = np.uint64(byte == SLASH)
            at += 1
            continue
        name_start = at
        while at < n and html[at] > 32 and html[at] not in (EQUALS, GT, SLASH):
            at += 1
        name_end = at
        while at < n and is_space(html[at]):
            at += 1
        start = end = at
        if at < n and html[at] == EQUALS:
            at += 1
            while at < n and is_space(html[at]):
                at += 1
            if at < n and (html[at] == QUOTE or html[at] == APOSTROPHE):
                start = at + 1
                end = find_byte(html, start, html[at])
                at = end + 1
            else:
                start = at
                while at < n and html[at] > 32 and html[at] != GT:
                    at += 1
                end = at
        elif name_end == name_start:
            at += 1
        if name_end - name_start <= MAX_ATTRIBUTE_NAME:
            _note_attribute(html, name_start, name_end, start, min(end, n), marks)
    return n


@compiled_in_place
def _note_attribute(
    html: Bytes, name_start: int, name_end: int, start: int, end: int, marks: Marks
) -> None:
    name = hash_bytes(html, name_start, name_end)
    if name in (CLASS, ID, ROLE, ITEMPROP, REL):
        marks[MEANINGS] |= _meanings(html, start, end)
        if name == CLASS:
            for index in range(start, end):
                if html[index] > 57 or html[index] < 48:  # numbers name single elements
                    marks[CLASSES] = (marks[CLASSES] ^ np.uint64(html[index])) * FNV_PRIME
    elif name == HIDDEN:
        marks[IS_HIDDEN] = np.uint64(1)
    elif name == ARIA_HIDDEN:
        marks[IS_HIDDEN] |= np.uint64(end > start and lower(html[start]) == LOWER_T)
    elif name == STYLE:
        marks[IS_HIDDEN] |= np.uint64(_hides(html, start, end))


@compiled_in_place
def _meanings(html: Bytes, start: int, end: int) -> np.uint64:
    """The meanings of the words in an attribute's value."""
    found = ZERO
    state = NEXT_STATE[0, EDGE]
    is_lower = False
    for index in range(start, end):
        byte = html[index]
        letter = np.int64(byte | 32) - 96
        if letter < 1 or letter > 26 or byte < 65:
            state = NEXT_STATE[state, EDGE]
            is_lower = False
        else:
            if is_lower and byte < 97:  # camelCase
                state = NEXT_STATE[state, EDGE]
                found |= MEANINGS_FOUND[state]
            state = NEXT_STATE[state, letter]
            is_lower = byte >= 97
        found |= MEANINGS_FOUND[state]
    return found | MEANINGS_FOUND[NEXT_STATE[state, EDGE]]


@compiled_in_place
def _hides(html: Bytes, start: int, end: int) -> bool:
    """Whether a style has display:none or visibility:hidden, by letters around its colons."""
    for colon in range(start + 1, end - 3):
        if html[colon] != COLON or lower(html[colon - 1]) != LOWER_Y:
            continue
        at = colon + 1
        while at < end and is_space(html[at]):
            at += 1
        if at + 3 > end:
            return False
        first, second, third = lower(html[at]), lower(html[at + 1]), lower(html[at + 2])
        if first == LOWER_N and second == LOWER_O and third == LOWER_N:
            return True
        if first == LOWER_H and second == LOWER_I and third == LOWER_D:
            return True
    return False
