"""The filters that FineWeb adds to Gopher's and C4's.

Penedo et al. 2024, arXiv:2406.17557, section 3.6.
"""

from collections.abc import Iterator

from data_pipeline.quality.c4 import TERMINAL_PUNCTUATION
from data_pipeline.quality.text import Text
from data_pipeline.quality.verdict import Thresholds, Verdict

LINE_ENDS = (*TERMINAL_PUNCTUATION, "'", "’")


class FineWeb(Thresholds):
    """Shares of a text's lines, and of the characters in lines that repeat an earlier line.

    A text is dropped at `min_punctuated_lines` or below, and at each maximum or above.
    """

    min_punctuated_lines: float
    max_duplicate_line_characters: float
    short_line_characters: int
    max_short_lines: float

    def judge(self, document: Text, language: str) -> Verdict:
        return Verdict(document, next(self._broken_rules(document), None))

    def _broken_rules(self, document: Text) -> Iterator[str]:
        lines = document.lines
        punctuated = sum(line.endswith(LINE_ENDS) for line in lines)
        if punctuated <= self.min_punctuated_lines * len(lines):
            yield "fineweb.punctuated_lines"
        if document.duplicate_lines[1] >= self.max_duplicate_line_characters:
            yield "fineweb.duplicate_line_character_fraction"
        short = sum(len(line) < self.short_line_characters for line in lines)
        if short >= self.max_short_lines * len(lines):
            yield "fineweb.short_lines"
