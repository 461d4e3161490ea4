"""fastText's classifiers in their quantized form (Joulin et al. 2016, arXiv:1612.03651).

fastText itself reads 3 to 5 MB of text a second. The same sums take a quarter of that with the
quantized rows expanded once, and with a bit per n-gram for whether it survived the pruning.
"""

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.compiled import compiled, compiled_in_place

MAGIC = 793712314
VERSION = 12
HIERARCHICAL_SOFTMAX = 1
LABEL = "__label__"
END_OF_LINE = "</s>"
WORD_ENTRY, LABEL_ENTRY = 0, 1
CENTROIDS = 256
NO_COUNT = 10**15

# All that follows is compiled into the functions of this file.
FNV32_START, FNV32_PRIME = np.uint32(2166136261), np.uint32(16777619)
FNV64_START, FNV64_PRIME = np.uint64(14695981039346656037), np.uint64(1099511628211)
BEGIN, END = np.uint8(ord("<")), np.uint8(ord(">"))
CONTINUATION_MASK, CONTINUATION = np.uint8(0xC0), np.uint8(0x80)
SIGN_BIT, SIGN_EXTENSION = np.uint8(0x80), np.uint32(0xFFFFFF00)
SMALLEST_PROBABILITY = 1e-5
SPACES = np.zeros(256, np.bool_)
SPACES[list(b" \n\r\t\v\f\0")] = True


@dataclass(frozen=True)
class Classifier:
    """What predicts: rows of words and of hashed n-grams, and a tree whose leaves are the labels.

    Attributes:
        word_keys, word_rows: an open hash table from the FNV-1a hash of a word to its row.
        survives: a bit for each n-gram bucket.
        gram_keys, gram_rows: an open hash table from a bucket that survives to its row.
        rows: [row, dim] float32.
        nodes: [node, dim] float32, weights of the inner nodes; children: [node, 2] their children,
            where those below the number of labels are leaves.
    """

    labels: tuple[str, ...]
    buckets: int
    lengths: tuple[int, int]
    end_of_line: int
    word_keys: NDArray[np.uint64]
    word_rows: NDArray[np.int32]
    survives: NDArray[np.uint8]
    gram_keys: NDArray[np.uint64]
    gram_rows: NDArray[np.int32]
    rows: NDArray[np.float32]
    nodes: NDArray[np.float32]
    children: NDArray[np.int64]

    def predict(self, line: bytes) -> tuple[str, float]:
        """The most likely label of one line of UTF-8, and its probability."""
        label, probability = _predict(
            np.frombuffer(line, np.uint8),
            self.buckets,
            *self.lengths,
            self.end_of_line,
            self.word_keys,
            self.word_rows,
            self.survives,
            self.gram_keys,
            self.gram_rows,
            self.rows,
            self.nodes,
            self.children,
        )
        return self.labels[label], min(1.0, float(probability))


def load_classifier(path: Path) -> Classifier:
    """Read a quantized, pruned classifier with hierarchical softmax, as lid.176.ftz is one.

    Raises:
        ValueError: the file is of another kind.
    """
    reader = _Reader(path.read_bytes())
    if reader.values("2i") != (MAGIC, VERSION):
        raise ValueError(f"{path}: no fastText model of version {VERSION}")
    dim, *_, word_ngrams, loss, _, buckets, shortest, longest, _, _ = reader.values("12id")
    size, _, _, _, pruned_buckets = reader.values("3i2q")
    entries = [reader.entry() for _ in range(size)]
    words = [word for word, _, kind in entries if kind == WORD_ENTRY]
    counts = [count for _, count, kind in entries if kind == LABEL_ENTRY]
    labels = [word.decode() for word, _, kind in entries if kind == LABEL_ENTRY]
    pruned = reader.array(np.int32, 2 * max(0, pruned_buckets)).reshape(-1, 2)
    if loss != HIERARCHICAL_SOFTMAX or word_ngrams > 1 or not len(pruned):
        raise ValueError(f"{path}: no pruned model of single words with hierarchical softmax")
    rows = reader.matrix()
    assert rows.shape == (len(words) + len(pruned), dim)
    word_keys, word_rows = _hash_table(
        np.array([_hash64(np.frombuffer(word, np.uint8)) for word in words], np.uint64),
        np.arange(len(words)),
    )
    kept = pruned[:, 0]
    gram_keys, gram_rows = _hash_table(kept.astype(np.uint64), len(words) + pruned[:, 1])
    survives = np.zeros(buckets // 8 + 1, np.uint8)
    np.bitwise_or.at(survives, kept >> 3, np.uint8(1) << (kept & 7).astype(np.uint8))
    end_of_line = END_OF_LINE.encode()
    return Classifier(
        labels=tuple(label.removeprefix(LABEL) for label in labels),
        buckets=buckets,
        lengths=(shortest, longest),
        end_of_line=words.index(end_of_line) if end_of_line in words else -1,
        word_keys=word_keys,
        word_rows=word_rows,
        survives=survives,
        gram_keys=gram_keys,
        gram_rows=gram_rows,
        rows=rows,
        nodes=reader.matrix(),
        children=_huffman_tree(counts),
    )


class _Reader:
    """Values one after the other, as fastText writes them on a little-endian machine."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._place = 0

    def values(self, form: str) -> tuple[Any, ...]:
        values = struct.unpack_from("<" + form, self._data, self._place)
        self._place += struct.calcsize("<" + form)
        return values

    def array(self, kind: type, count: int) -> NDArray[Any]:
        array: NDArray[Any] = np.frombuffer(self._data, kind, count, self._place)
        self._place += array.nbytes
        return array

    def entry(self) -> tuple[bytes, int, int]:
        """A word of the dictionary, its count and its kind."""
        end = self._data.index(0, self._place)
        word, self._place = self._data[self._place : end], end + 1
        return word, *self.values("qb")

    def matrix(self) -> NDArray[np.float32]:
        """A matrix of numbers, or one of product-quantized rows, expanded."""
        if not self.values("?")[0]:
            rows, columns = self.values("2q")
            return self.array(np.float32, rows * columns).reshape(rows, columns)
        has_norms, rows, _, size = self.values("?2qi")
        codes = self.array(np.uint8, size).reshape(rows, -1)
        matrix = self._expand(codes)
        if has_norms:
            matrix *= self._expand(self.array(np.uint8, rows).reshape(rows, 1))
        return matrix

    def _expand(self, codes: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Rows from [row, part] codes; the centroids of each part follow in the file."""
        dim, parts, width, last_width = self.values("4i")
        centroids = self.array(np.float32, dim * CENTROIDS)
        widths = [width] * (parts - 1) + [last_width]
        tables = np.split(centroids, np.cumsum([CENTROIDS * width for width in widths])[:-1])
        return np.concatenate(
            [
                table.reshape(CENTROIDS, width)[codes[:, part]]
                for part, (table, width) in enumerate(zip(tables, widths, strict=True))
            ],
            axis=1,
        )


def _huffman_tree(counts: list[int]) -> NDArray[np.int64]:
    """The children of the inner nodes in the order of fastText, for labels by falling count."""
    leaves = len(counts)
    totals = np.array(counts + [NO_COUNT] * (leaves - 1), np.int64)
    children = np.zeros((leaves - 1, 2), np.int64)
    leaf, inner = leaves - 1, leaves
    for node in range(leaves, 2 * leaves - 1):
        for side in range(2):
            if leaf >= 0 and totals[leaf] < totals[inner]:
                children[node - leaves, side], leaf = leaf, leaf - 1
            else:
                children[node - leaves, side], inner = inner, inner + 1
        totals[node] = totals[children[node - leaves]].sum()
    return children


@compiled_in_place
def _hash64(word: NDArray[np.uint8]) -> np.uint64:
    hash = FNV64_START
    for byte in word:
        hash = (hash ^ np.uint64(byte)) * FNV64_PRIME
    return hash


@compiled_in_place
def _slot(key: np.uint64, mask: int) -> np.int64:
    return np.int64((key ^ (key >> np.uint64(32))) & np.uint64(mask))


@compiled
def _hash_table(
    keys: NDArray[np.uint64], rows: NDArray[np.int64]
) -> tuple[NDArray[np.uint64], NDArray[np.int32]]:
    """An open hash table at most half full; free places have row -1."""
    size = 2
    while size < 2 * len(keys):
        size *= 2
    table_keys, table_rows = np.zeros(size, np.uint64), np.full(size, -1, np.int32)
    for key, row in zip(keys, rows):  # noqa: B905
        slot = _slot(key, size - 1)
        while table_rows[slot] >= 0:
            slot = (slot + 1) & (size - 1)
        table_keys[slot], table_rows[slot] = key, row
    return table_keys, table_rows


@compiled_in_place
def _find(key: np.uint64, keys: NDArray[np.uint64], rows: NDArray[np.int32]) -> int:
    slot = _slot(key, len(keys) - 1)
    while rows[slot] >= 0 and keys[slot] != key:
        slot = (slot + 1) & (len(keys) - 1)
    return rows[slot]


@compiled_in_place
def _add(row: int, rows: NDArray[np.float32], hidden: NDArray[np.float32]) -> None:
    for place in range(rows.shape[1]):
        hidden[place] += rows[row, place]


@compiled_in_place
def _add_ngrams(
    word: NDArray[np.uint8],
    buckets: int,
    shortest: int,
    longest: int,
    survives: NDArray[np.uint8],
    gram_keys: NDArray[np.uint64],
    gram_rows: NDArray[np.int32],
    rows: NDArray[np.float32],
    hidden: NDArray[np.float32],
) -> int:
    """Add the rows of the n-grams of characters of a word with its brackets; return how many."""
    added = 0
    size = len(word)
    for start in range(size):
        if word[start] & CONTINUATION_MASK == CONTINUATION:
            continue
        hash = FNV32_START
        end = start
        for length in range(1, longest + 1):
            if end == size:
                break
            while True:
                extension = SIGN_EXTENSION if word[end] & SIGN_BIT else np.uint32(0)
                hash = np.uint32((hash ^ (np.uint32(word[end]) | extension)) * FNV32_PRIME)
                end += 1
                if end == size or word[end] & CONTINUATION_MASK != CONTINUATION:
                    break
            if length < shortest or (length == 1 and (start == 0 or end == size)):
                continue
            bucket = np.int64(hash) % buckets
            if survives[bucket >> 3] >> (bucket & 7) & 1:
                _add(_find(np.uint64(bucket), gram_keys, gram_rows), rows, hidden)
                added += 1
    return added


@compiled
def _predict(
    line: NDArray[np.uint8],
    buckets: int,
    shortest: int,
    longest: int,
    end_of_line: int,
    word_keys: NDArray[np.uint64],
    word_rows: NDArray[np.int32],
    survives: NDArray[np.uint8],
    gram_keys: NDArray[np.uint64],
    gram_rows: NDArray[np.int32],
    rows: NDArray[np.float32],
    nodes: NDArray[np.float32],
    children: NDArray[np.int64],
) -> tuple[int, float]:
    hidden = np.zeros(rows.shape[1], np.float32)
    added = 0
    word = np.empty(len(line) + 2, np.uint8)
    word[0] = BEGIN
    size = 1
    for place in range(len(line) + 1):
        if place < len(line) and not SPACES[line[place]]:
            word[size] = line[place]
            size += 1
            continue
        if size > 1:
            row = _find(_hash64(word[1:size]), word_keys, word_rows)
            if row >= 0:
                _add(row, rows, hidden)
                added += 1
            word[size] = END
            added += _add_ngrams(
                word[: size + 1],
                buckets,
                shortest,
                longest,
                survives,
                gram_keys,
                gram_rows,
                rows,
                hidden,
            )
        size = 1
    if end_of_line >= 0:
        _add(end_of_line, rows, hidden)
        added += 1
    return _most_likely(hidden / np.float32(max(1, added)), nodes, children)


@compiled
def _most_likely(
    hidden: NDArray[np.float32], nodes: NDArray[np.float32], children: NDArray[np.int64]
) -> tuple[int, float]:
    """The leaf with the highest product of probabilities on its path, and that product."""
    leaves = len(children) + 1
    scores = np.zeros(2 * leaves - 1, np.float64)
    best, best_score = 0, -np.inf
    for node in range(leaves - 2, -1, -1):
        score = scores[leaves + node]
        if score < best_score:
            scores[children[node]] = -np.inf
            continue
        total = np.float32(0)
        for place in range(len(hidden)):
            total += hidden[place] * nodes[node, place]
        right = 1 / (1 + math.exp(-total))
        for side, probability in enumerate((1 - right, right)):
            child = children[node, side]
            scores[child] = score + math.log(probability + SMALLEST_PROBABILITY)
            if child < leaves and scores[child] > best_score:
                best, best_score = child, scores[child]
    return best, math.exp(best_score)
