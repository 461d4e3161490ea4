"""The MassiveText filters of Gopher (Rae et al. 2021, arXiv:2112.11446, A.1.1 and table A1)."""

import re
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from data_pipeline.quality.verdict import Thresholds, Verdict
from data_pipeline.quality.words import UNSPACED_WORD, split_words

LETTER = re.compile(r"[^\W\d_]")
BULLETS = ("•", "‣", "▪", "◦", "-", "*")
ELLIPSES = ("...", "…")
HASH_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


class GopherQuality(Thresholds):
    """Document-wise rules; `stop_words` holds required words by language, others are not asked.

    Nor is the length of words asked of a text that is mostly Chinese or Japanese.
    """

    min_words: int
    max_words: int
    min_mean_word_length: float
    max_mean_word_length: float
    max_symbol_to_word_ratio: float
    max_bullet_lines: float
    max_ellipsis_lines: float
    min_alphabetic_words: float
    min_stop_words: int
    stop_words: dict[str, tuple[str, ...]]

    def judge(self, text: str, language: str) -> Verdict:
        return Verdict(text, next(self._broken_rules(text, language), None))

    def _broken_rules(self, text: str, language: str) -> Iterator[str]:
        words = split_words(text)
        if not self.min_words <= len(words) <= self.max_words:
            yield "gopher.word_count"
            return
        spaced = [word for word in words if not UNSPACED_WORD.match(word)]
        mean_length = sum(map(len, spaced)) / max(1, len(spaced))
        is_spaced = 2 * len(spaced) > len(words)
        if is_spaced and not self.min_mean_word_length <= mean_length <= self.max_mean_word_length:
            yield "gopher.mean_word_length"
        symbols = max(text.count("#"), sum(map(text.count, ELLIPSES)))
        if symbols > self.max_symbol_to_word_ratio * len(words):
            yield "gopher.symbol_to_word_ratio"
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        if sum(line.startswith(BULLETS) for line in lines) > self.max_bullet_lines * len(lines):
            yield "gopher.bullet_lines"
        if sum(line.endswith(ELLIPSES) for line in lines) > self.max_ellipsis_lines * len(lines):
            yield "gopher.ellipsis_lines"
        alphabetic = sum(LETTER.search(word) is not None for word in words)
        if alphabetic < self.min_alphabetic_words * len(words):
            yield "gopher.alphabetic_words"
        required = set(self.stop_words.get(language, ()))
        if required and len(required.intersection(map(str.lower, words))) < self.min_stop_words:
            yield "gopher.stop_words"


class GopherRepetition(Thresholds):
    """Table A1: the share of a text that repeats what the text has said before.

    A first occurrence is no repetition. `top_ngrams` bounds the share of characters in the most
    frequent n-gram of words, by n; `duplicate_ngrams` that in all repeated ones, where overlaps
    count once.
    """

    max_duplicate_lines: float
    max_duplicate_line_characters: float
    max_duplicate_paragraphs: float
    max_duplicate_paragraph_characters: float
    max_top_ngrams: dict[int, float]
    max_duplicate_ngrams: dict[int, float]

    def judge(self, text: str, language: str) -> Verdict:
        return Verdict(text, next(self._broken_rules(text), None))

    def _broken_rules(self, text: str) -> Iterator[str]:
        lines, line_characters = duplicate_shares(text.splitlines())
        if lines > self.max_duplicate_lines:
            yield "gopher.duplicate_line_fraction"
        if line_characters > self.max_duplicate_line_characters:
            yield "gopher.duplicate_line_character_fraction"
        paragraphs, paragraph_characters = duplicate_shares(text.split("\n\n"))
        if paragraphs > self.max_duplicate_paragraphs:
            yield "gopher.duplicate_paragraph_fraction"
        if paragraph_characters > self.max_duplicate_paragraph_characters:
            yield "gopher.duplicate_paragraph_character_fraction"
        longest = max([*self.max_top_ngrams, *self.max_duplicate_ngrams], default=0)
        for n, top, duplicate in ngram_shares(text.split(), longest):
            if top > self.max_top_ngrams.get(n, 1.0):
                yield f"gopher.top_{n}_gram_character_fraction"
            if duplicate > self.max_duplicate_ngrams.get(n, 1.0):
                yield f"gopher.duplicate_{n}_gram_character_fraction"


def duplicate_shares(pieces: list[str]) -> tuple[float, float]:
    """Shares of the pieces, and of their characters, that repeat an earlier piece."""
    stripped = [piece.strip() for piece in pieces if piece.strip()]
    unique = set(stripped)
    characters = sum(map(len, stripped))
    if not characters:
        return 0.0, 0.0
    return 1 - len(unique) / len(stripped), 1 - sum(map(len, unique)) / characters


def ngram_shares(words: list[str], longest: int) -> Iterator[tuple[int, float, float]]:
    """For n = 2 to `longest`: n, the top n-gram's and all repeated n-grams' share of characters."""
    vocabulary: dict[str, int] = {}
    numbers = [vocabulary.setdefault(word, len(vocabulary) + 1) for word in words]
    ids: NDArray[np.uint64] = np.array(numbers, dtype=np.uint64) * HASH_MULTIPLIER
    lengths = np.array([len(word) for word in words], dtype=np.int64)
    before = np.concatenate([[0], np.cumsum(lengths)])
    hashes = ids
    for n in range(2, min(longest, len(words)) + 1):
        hashes = (hashes[:-1] ^ (hashes[:-1] >> np.uint64(29))) * HASH_MULTIPLIER + ids[n - 1 :]
        _, first, counts = np.unique(hashes, return_index=True, return_counts=True)
        most = counts.max()
        if most == 1:
            yield n, 0.0, 0.0
            continue
        most_frequent = first[counts == most]
        top = most * (before[most_frequent + n] - before[most_frequent]).max()
        repeats = np.ones(len(hashes), dtype=np.int64)
        repeats[first] = 0
        starts = np.flatnonzero(repeats)
        edges = np.zeros(len(words) + 1, dtype=np.int64)
        edges[starts] += 1
        np.subtract.at(edges, starts + n, 1)
        covered = np.cumsum(edges[:-1]) > 0
        yield n, float(top / before[-1]), float(lengths[covered].sum() / before[-1])
