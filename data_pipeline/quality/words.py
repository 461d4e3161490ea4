"""Words and sentences, in scripts with spaces and without."""

import functools
import re
import unicodedata
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_pipeline.compiled import compiled
from data_pipeline.prepared import prepare

# Han, Hiragana and Katakana put no space between words: each character stands for one.
IDEOGRAPHS = (
    "\u3041-\u30ff\uff66-\uff9f\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
IDEOGRAPHIC_PUNCTUATION = "\u3001-\u303f\uff01-\uff0f\uff1a-\uff20"
WORD = re.compile(rf"[{IDEOGRAPHS}][{IDEOGRAPHIC_PUNCTUATION}]*|[^\s{IDEOGRAPHS}]+")

SENTENCE_END = re.compile(
    r"(?<![.!?])[.!?]+[\"”’')\]]*(?:[ \t]*$|\s+[\"“‘'(\[]*(?P<next>\w))|[。！？]", re.MULTILINE
)
ABBREVIATION = re.compile(
    r"\b(?:[^\W\d_]|Dr|Mr|Mrs|Ms|Prof|St|Jr|Sr|No|Fig|vs|cf|approx)\.$", re.IGNORECASE
)
LONGEST_ABBREVIATION = len("approx.")

SPACE, LETTER, IDEOGRAPH, PUNCTUATION = (np.uint8(1 << bit) for bit in range(4))
KINDS = {
    SPACE: r"\s",
    LETTER: r"[^\W\d_]",
    IDEOGRAPH: f"[{IDEOGRAPHS}]",
    PUNCTUATION: f"[{IDEOGRAPHIC_PUNCTUATION}]",
}
CHARACTERS = 0x110000
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
SHIFT = np.uint64(29)


class WordCounts(NamedTuple):
    """Counts of the words of a text; every Chinese or Japanese character is a word.

    Attributes:
        spaced: the words that are no such character.
        spaced_characters: their characters.
        alphabetic: the words with a letter.
    """

    words: int
    spaced: int
    spaced_characters: int
    alphabetic: int


class Pieces(NamedTuple):
    """What stands between the spaces of a text: a hash of each piece, and its characters."""

    hashes: NDArray[np.uint64]
    lengths: NDArray[np.int64]


def read_words(text: str) -> tuple[WordCounts, Pieces]:
    """Count the words of a text, and hash what stands between its spaces."""
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    hashes, lengths, *counts = _read_words(codes, _kinds())
    return WordCounts(*counts), Pieces(hashes, lengths)


def has_sentences(text: str, minimum: int) -> bool:
    """Whether a text has as many sentences; reads no further than the last one it needs.

    Terminal punctuation ends one at the end of a line or before a letter that is not lower case.
    Neither an initial ("U.S. Navy", "e.g. Paris") nor a common abbreviation does.
    """
    if minimum <= 0:
        return True
    for match in SENTENCE_END.finditer(text):
        minimum -= _ends_sentence(text, match)
        if minimum == 0:
            return True
    return False


def _ends_sentence(text: str, match: re.Match[str]) -> bool:
    following = match["next"]
    if following is None:
        return True
    if following.islower() or following.isdigit():
        return False
    start = match.start()
    return not ABBREVIATION.search(text[max(0, start - LONGEST_ABBREVIATION) : start + 1])


@functools.cache
def _kinds() -> NDArray[np.uint8]:
    """The kinds of every character, as bits."""
    of = f"{unicodedata.unidata_version} {KINDS}"
    return prepare("kinds", of.encode(), lambda: {"kinds": _find_kinds()})["kinds"]


def _find_kinds() -> NDArray[np.uint8]:
    characters = "".join(map(chr, range(CHARACTERS)))
    kinds = np.zeros(CHARACTERS, np.uint8)
    for bit, pattern in KINDS.items():
        for run in re.finditer(f"{pattern}+", characters):
            kinds[run.start() : run.end()] |= bit
    return kinds


@compiled
def _read_words(
    codes: NDArray[np.uint32], kinds: NDArray[np.uint8]
) -> tuple[NDArray[np.uint64], NDArray[np.int64], int, int, int, int]:
    hashes = np.empty(len(codes) // 2 + 1, np.uint64)
    lengths = np.empty(len(codes) // 2 + 1, np.int64)
    pieces = words = spaced = spaced_characters = alphabetic = 0
    hash = np.uint64(0)
    length = 0
    in_word = in_spaced = has_letter = False
    for code in codes:
        kind = kinds[code]
        if kind & SPACE:
            if length:
                hashes[pieces], lengths[pieces] = hash, length
                pieces += 1
                hash, length = np.uint64(0), 0
            in_word = in_spaced = False
            continue
        hash = ((hash ^ np.uint64(code)) * MULTIPLIER) ^ (hash >> SHIFT)
        length += 1
        if kind & IDEOGRAPH:
            in_word, in_spaced, has_letter = True, False, False
            words += 1
        elif not in_spaced and not (in_word and kind & PUNCTUATION):
            in_word, in_spaced, has_letter = True, True, False
            words += 1
            spaced += 1
        spaced_characters += in_spaced
        if kind & LETTER and not has_letter:
            has_letter = True
            alphabetic += 1
    if length:
        hashes[pieces], lengths[pieces] = hash, length
        pieces += 1
    return hashes[:pieces], lengths[:pieces], words, spaced, spaced_characters, alphabetic
