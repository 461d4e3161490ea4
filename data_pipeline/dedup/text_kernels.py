r"""Lower-cased `\w+` words and MinHash minima of UTF-8 texts, compiled by numba.

The functions run outside Python's interpreter lock. Those that call each other and the constants
they use stand in one file, by whose date numba's cache of compiled code goes.
"""

import numpy as np
from numpy.typing import NDArray

from data_pipeline.compiled import compiled

# What the table of `characters.character_table` says of a code point.
LOWER = 0x1FFFFF
WORD = 1 << 21
CASED = 1 << 22
CASE_IGNORABLE = 1 << 23

CAPITAL_SIGMA, SIGMA, FINAL_SIGMA = map(ord, "Σσς")
# The only character whose lower-cased form is longer: i and a dot above, which is not in a word.
I_WITH_DOT = ord("İ")

# A signature takes so many at a time that they stay in the processor's first cache.
WORDS_AT_ONCE = 2048
CHARACTER_BASE = np.uint64(0x9E3779B97F4A7C15)
HIGH_HALF = np.uint64(32)


@compiled
def mix(x: np.uint64) -> np.uint64:
    """The finalizer of SplitMix64 (Steele, Lea and Flood 2014), a bijection."""
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)


@compiled
def decode(data: NDArray[np.uint8], i: int) -> tuple[int, int]:
    """The code point at byte i of valid UTF-8, and where the next one is."""
    lead = int(data[i])
    if lead < 0x80:
        return lead, i + 1
    if lead < 0xE0:
        return (lead & 0x1F) << 6 | data[i + 1] & 0x3F, i + 2
    if lead < 0xF0:
        return (lead & 0x0F) << 12 | (data[i + 1] & 0x3F) << 6 | data[i + 2] & 0x3F, i + 3
    point = (lead & 0x07) << 18 | (data[i + 1] & 0x3F) << 12
    return point | (data[i + 2] & 0x3F) << 6 | data[i + 3] & 0x3F, i + 4


@compiled
def is_final_sigma(
    data: NDArray[np.uint8], start: int, i: int, stop: int, characters: NDArray[np.uint32]
) -> bool:
    """Whether the sigma of two bytes at i ends a word of cased characters, as in str.lower()."""
    before = i
    kind = np.uint32(CASE_IGNORABLE)
    while before > start and kind & CASE_IGNORABLE:
        before -= 1
        while data[before] & 0xC0 == 0x80:
            before -= 1
        kind = characters[decode(data, before)[0]]
    if not kind & CASED:
        return False
    after = i + 2
    kind = np.uint32(CASE_IGNORABLE)
    while after < stop and kind & CASE_IGNORABLE:
        point, after = decode(data, after)
        kind = characters[point]
    return not kind & CASED


@compiled
def fill_words(
    data: NDArray[np.uint8],
    start: int,
    i: int,
    stop: int,
    letters: NDArray[np.uint8],
    characters: NDArray[np.uint32],
    words: NDArray[np.uint64],
    filled: int,
) -> tuple[int, int]:
    """Hash the lower-cased words of a text from byte i on, until `words` is full.

    Returns:
        The byte to go on from, and how much of `words` is filled.
    """
    h = np.uint64(0)
    while i < stop and filled < len(words):
        byte = data[i]
        letter = np.uint64(0)
        after = i + 1
        if byte < 0x80:
            letter = np.uint64(letters[byte])
        else:
            point, after = decode(data, i)
            character = characters[point]
            if character & WORD:
                letter = np.uint64(character & LOWER)
            if point == CAPITAL_SIGMA and is_final_sigma(data, start, i, stop, characters):
                letter = np.uint64(FINAL_SIGMA)
            if point == I_WITH_DOT:  # the dot above ends the word
                h = (h ^ letter) * CHARACTER_BASE
                letter = np.uint64(0)
        # Without a branch, which processors would mispredict at the end of most words.
        words[filled] = h
        filled += (letter == 0) & (h != 0)
        h = (h ^ letter) * CHARACTER_BASE if letter else np.uint64(0)
        i = after
    if h:
        words[filled] = h
        filled += 1
    return i, filled


@compiled
def hash_shingles(
    words: NDArray[np.uint64], count: int, powers: NDArray[np.uint64], hashes: NDArray[np.uint64]
) -> None:
    """hashes[i] = the mixed sum of words[i + k] powers[k]."""
    for i in range(count):
        total = np.uint64(0)
        for k in range(len(powers)):
            total += words[i + k] * powers[k]
        hashes[i] = mix(total)


@compiled
def lower_minima(
    hashes: NDArray[np.uint64],
    a: NDArray[np.uint32],
    b: NDArray[np.uint32],
    minima: NDArray[np.uint32],
) -> None:
    """minima[p] = min(minima[p], a[p] x + b[p] modulo 2^32) over the high halves x of hashes."""
    x = (hashes >> HIGH_HALF).astype(np.uint32)
    for p in range(len(minima)):
        factor, summand = a[p], b[p]
        lowest = minima[p]
        for i in range(len(x)):
            lowest = min(lowest, np.uint32(factor * x[i] + summand))
        minima[p] = lowest


@compiled
def sign_texts(
    data: NDArray[np.uint8],
    offsets: NDArray[np.int64],
    powers: NDArray[np.uint64],
    letters: NDArray[np.uint8],
    characters: NDArray[np.uint32],
    a: NDArray[np.uint32],
    b: NDArray[np.uint32],
    minima: NDArray[np.uint32],
) -> NDArray[np.bool_]:
    """Lower each text's row of `minima`; return which texts have words."""
    ngram = len(powers)
    has_words = np.zeros(len(minima), np.bool_)
    words = np.empty(WORDS_AT_ONCE + ngram, np.uint64)
    hashes = np.empty(len(words), np.uint64)
    for text in range(len(minima)):
        start, stop = offsets[text], offsets[text + 1]
        i, filled = start, 0
        while i < stop:
            i, filled = fill_words(data, start, i, stop, letters, characters, words, filled)
            if not has_words[text] and 0 < filled < ngram:
                words[filled:ngram] = 0
                filled = ngram
            count = filled - ngram + 1
            if count > 0:
                has_words[text] = True
                hash_shingles(words, count, powers, hashes)
                lower_minima(hashes[:count], a, b, minima[text])
                for k in range(ngram - 1):
                    words[k] = words[count + k]
                filled = ngram - 1
    return has_words


@compiled
def hash_texts(
    data: NDArray[np.uint8],
    offsets: NDArray[np.int64],
    powers: NDArray[np.uint64],
    letters: NDArray[np.uint8],
    characters: NDArray[np.uint32],
) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """The hashes of all shingles, text by text, and where those of each text begin."""
    ngram = len(powers)
    texts = len(offsets) - 1
    # A word takes two bytes with what follows it.
    room = (offsets[texts] - offsets[0]) // 2 + texts * ngram + 1
    hashes = np.empty(room, np.uint64)
    words = np.empty(room, np.uint64)
    first = np.zeros(texts + 1, np.int64)
    for text in range(texts):
        start, stop = offsets[text], offsets[text + 1]
        _, filled = fill_words(data, start, start, stop, letters, characters, words, 0)
        if 0 < filled < ngram:
            words[filled:ngram] = 0
            filled = ngram
        count = max(filled - ngram + 1, 0)
        hash_shingles(words, count, powers, hashes[first[text] :])
        first[text + 1] = first[text] + count
    return hashes[: first[texts]].copy(), first


@compiled
def hash_bands(minima: NDArray[np.uint32], bands: int) -> NDArray[np.uint32]:
    """One hash per band of the minima, [bands, texts]; bands of other numbers differ."""
    rows = minima.shape[1] // max(bands, 1)
    hashes = np.empty((bands, len(minima)), np.uint32)
    for text in range(len(minima)):
        for band in range(bands):
            h = np.uint64(band)
            for row in range(band * rows, (band + 1) * rows):
                h = mix(h ^ np.uint64(minima[text, row]))
            hashes[band, text] = np.uint32(h >> HIGH_HALF)
    return hashes
