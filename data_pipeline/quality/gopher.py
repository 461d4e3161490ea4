"""The MassiveText filters of Gopher (Rae et al. 2021, arXiv:2112.11446, A.1.1 and table A1)."""

from collections.abc import Iterator

from data_pipeline.quality.ngrams import ngram_shares
from data_pipeline.quality.text import Text, duplicate_shares, non_blank
from data_pipeline.quality.verdict import Thresholds, Verdict
from data_pipeline.quality.words import WORD

BULLETS = ("•", "‣", "▪", "◦", "-", "*")
ELLIPSES = ("...", "…")


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

    def judge(self, document: Text, language: str) -> Verdict:
        return Verdict(document, next(self._broken_rules(document, language), None))

    def _broken_rules(self, document: Text, language: str) -> Iterator[str]:
        text, lines = document.text, document.lines
        words, spaced, spaced_characters, alphabetic = document.words
        if not self.min_words <= words <= self.max_words:
            yield "gopher.word_count"
            return
        mean_length = spaced_characters / max(1, spaced)
        is_spaced = 2 * spaced > words
        if is_spaced and not self.min_mean_word_length <= mean_length <= self.max_mean_word_length:
            yield "gopher.mean_word_length"
        symbols = max(text.count("#"), sum(map(text.count, ELLIPSES)))
        if symbols > self.max_symbol_to_word_ratio * words:
            yield "gopher.symbol_to_word_ratio"
        if sum(line.startswith(BULLETS) for line in lines) > self.max_bullet_lines * len(lines):
            yield "gopher.bullet_lines"
        if sum(line.endswith(ELLIPSES) for line in lines) > self.max_ellipsis_lines * len(lines):
            yield "gopher.ellipsis_lines"
        if alphabetic < self.min_alphabetic_words * words:
            yield "gopher.alphabetic_words"
        if not self._has_stop_words(text, language):
            yield "gopher.stop_words"

    def _has_stop_words(self, text: str, language: str) -> bool:
        missing = set(self.stop_words.get(language, ()))
        enough = len(missing) - self.min_stop_words
        if not missing:
            return True
        for word in WORD.finditer(text):
            if len(missing) <= enough:
                return True
            missing.discard(word[0].lower())
        return len(missing) <= enough


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

    def judge(self, document: Text, language: str) -> Verdict:
        return Verdict(document, next(self._broken_rules(document), None))

    def _broken_rules(self, document: Text) -> Iterator[str]:
        lines, line_characters = document.duplicate_lines
        if lines > self.max_duplicate_lines:
            yield "gopher.duplicate_line_fraction"
        if line_characters > self.max_duplicate_line_characters:
            yield "gopher.duplicate_line_character_fraction"
        paragraphs, paragraph_characters = duplicate_shares(non_blank(document.text.split("\n\n")))
        if paragraphs > self.max_duplicate_paragraphs:
            yield "gopher.duplicate_paragraph_fraction"
        if paragraph_characters > self.max_duplicate_paragraph_characters:
            yield "gopher.duplicate_paragraph_character_fraction"
        longest = max([*self.max_top_ngrams, *self.max_duplicate_ngrams], default=0)
        for n, top, duplicate in ngram_shares(document.pieces, longest):
            if top > self.max_top_ngrams.get(n, 1.0):
                yield f"gopher.top_{n}_gram_character_fraction"
            if duplicate > self.max_duplicate_ngrams.get(n, 1.0):
                yield f"gopher.duplicate_{n}_gram_character_fraction"
