"""A text with what several rules ask of it, each worked out once."""

from functools import cached_property

from data_pipeline.quality.words import Pieces, WordCounts, read_words


class Text:
    """A document's text; lines are stripped of white space, and blank ones left out."""

    def __init__(self, text: str) -> None:
        self.text = text

    @cached_property
    def lines(self) -> list[str]:
        return non_blank(self.text.splitlines())

    @cached_property
    def duplicate_lines(self) -> tuple[float, float]:
        """The share of the lines, and of their characters, that repeat an earlier line."""
        return duplicate_shares(self.lines)

    @property
    def words(self) -> WordCounts:
        return self._words[0]

    @property
    def pieces(self) -> Pieces:
        return self._words[1]

    @cached_property
    def _words(self) -> tuple[WordCounts, Pieces]:
        return read_words(self.text)


def non_blank(pieces: list[str]) -> list[str]:
    """The pieces without the white space around them, except those that are nothing else."""
    return [stripped for piece in pieces if (stripped := piece.strip())]


def duplicate_shares(pieces: list[str]) -> tuple[float, float]:
    """Shares of the pieces, and of their characters, that repeat an earlier piece."""
    unique = set(pieces)
    if len(unique) == len(pieces):
        return 0.0, 0.0
    characters = sum(map(len, pieces))
    return 1 - len(unique) / len(pieces), 1 - sum(map(len, unique)) / characters
