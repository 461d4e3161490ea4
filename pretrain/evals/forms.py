"""The two forms of a synthetic task: reserved tokens, and text through the run's tokenizer."""

from collections.abc import Iterator
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from data_pipeline.stream import Tokenizer
from data_pipeline.synthetic import (
    Alphabet,
    Document,
    Event,
    Question,
    Statement,
    Task,
    is_synthetic,
    tell,
    write_document,
)
from pretrain.errors import UserError

FORMS = ("auto", "tokens", "text")
CONSONANTS, VOWELS = "bdfgklmnrt", "aeiou"
SYLLABLES = [consonant + vowel for consonant in CONSONANTS for vowel in VOWELS]
# Names of three syllables, and as many numbers of seven digits.
SYMBOLS = len(SYLLABLES) ** 3
FIRST_NUMBER, NUMBER_STEP = 1_000_000, 72
FILLER = (
    "The road follows the river for a while and then climbs into the hills.",
    "In the morning the market opens, and by noon most of it is sold.",
    "A clock on the wall was slow, though nobody had noticed yet.",
    "Rain fell on the roofs all night, and the gardens were glad of it.",
    "She put the letters back into the box and closed the lid.",
    "The train was late again, so they walked along the platform.",
    "Bread, cheese and apples were on the table when they came home.",
    "From the tower one can see the lake, the fields and the old mill.",
    "The children counted boats until it was too dark to see them.",
    "Every winter the birds leave, and every spring they return.",
    "He had read the book twice and still did not know how it ended.",
    "The lamp in the window was the only light in the street.",
)


class Form(Protocol):
    """Writes documents of a task.

    Attributes:
        chance: of guessing an answer's token.
    """

    @property
    def chance(self) -> float: ...

    def check(self, task: Task, length: int) -> None:
        """Raise unless documents of `length` tokens can be written."""

    def write(
        self, task: Task, length: int, rng: np.random.Generator, depth: float | None
    ) -> Document:
        """A document of exactly `length` tokens, its questions at the end."""


def form_of(name: str, tokenizer: Tokenizer) -> tuple[str, Form]:
    """The form of that name; `auto` is `tokens` where the tokenizer is that of synthetic shards."""
    if name == "auto":
        name = "tokens" if is_synthetic(tokenizer) else "text"
    return name, TokenForm(tokenizer.vocab_size) if name == "tokens" else TextForm(tokenizer)


class TokenForm:
    """Documents as `farspan data synthetic` makes them."""

    def __init__(self, vocab_size: int) -> None:
        self.alphabet = Alphabet(vocab_size)
        self.chance = 1 / self.alphabet.symbols

    def check(self, task: Task, length: int) -> None:
        self.alphabet.check(task, length)

    def write(
        self, task: Task, length: int, rng: np.random.Generator, depth: float | None
    ) -> Document:
        return write_document(task, length, self.alphabet, rng, depth)


class Piece(NamedTuple):
    """Tokens, and whether they answer a question."""

    tokens: list[int]
    is_answer: bool = False


class TextForm:
    """Documents of sentences in between others, in any tokenizer's tokens.

    Names and numbers are tokenized by themselves, so that they have the same tokens wherever they
    stand.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        # Nobody guesses one of so many names and numbers.
        self.chance = 1 / SYMBOLS

    def check(self, task: Task, length: int) -> None:
        self._tell(task, length, np.random.default_rng(0), None)

    def write(
        self, task: Task, length: int, rng: np.random.Generator, depth: float | None
    ) -> Document:
        events, said = self._tell(task, length, rng, depth)
        tokens_said = sum(len(piece.tokens) for pieces in said for piece in pieces)
        haystack, ends = self._haystack(length - 1 - tokens_said, rng)
        # Statements come before the gap, which ends where the questions begin.
        ends = ends[ends <= len(haystack) - task.gap]
        parts: list[NDArray[np.int64]] = []
        answers: list[NDArray[np.int64]] = []

        def add(tokens: NDArray[np.int64], answer: int) -> None:
            parts.append(tokens)
            answers.append(np.full(len(tokens), answer))

        begun, asked = 0, 0
        for event, pieces in zip(events, said, strict=True):
            end = len(haystack)
            if isinstance(event.what, Statement):
                # Between two sentences.
                end = int(ends[np.abs(ends - event.place * (end - task.gap)).argmin()])
            add(haystack[begun:end], -1)
            begun = max(begun, end)
            for piece in pieces:
                add(np.array(piece.tokens, np.int64), asked if piece.is_answer else -1)
            asked += isinstance(event.what, Question)
        add(haystack[begun:], -1)
        add(np.array([self.tokenizer.eos_id]), -1)
        return Document(np.concatenate(parts), np.concatenate(answers))

    def _tell(
        self, task: Task, length: int, rng: np.random.Generator, depth: float | None
    ) -> tuple[list[Event], list[list[Piece]]]:
        """A story, and each of its events in words. Raises UserError if it does not fit."""
        events = tell(task, SYMBOLS, rng, depth)
        said = [list(self._say(event, task)) for event in events]
        least = 1 + task.gap + sum(len(piece.tokens) for pieces in said for piece in pieces)
        if length < least:
            apart = f", {task.gap} tokens apart," if task.gap else ""
            raise UserError(
                f"--lengths {length}: {task.statements} statements and {task.questions} questions "
                f"of {task.name}{apart} take {least} of this tokenizer's tokens: take more, or "
                "fewer pairs or values"
            )
        return events, said

    @cached_property
    def _filler(self) -> list[NDArray[np.int64]]:
        return [np.array(self._encode(f" {sentence}"), np.int64) for sentence in FILLER]

    def _haystack(
        self, length: int, rng: np.random.Generator
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """So many tokens, and where sentences end; the last one may be cut."""
        shortest = min(map(len, self._filler))
        chosen = rng.integers(len(self._filler), size=length // shortest + 1)
        ends = np.cumsum([len(self._filler[sentence]) for sentence in chosen])
        used = int(np.searchsorted(ends, length)) + 1
        tokens = np.concatenate([self._filler[sentence] for sentence in chosen[:used]])[:length]
        return tokens, np.concatenate([[0], ends[: used - 1], [length]])

    def _say(self, event: Event, task: Task) -> Iterator[Piece]:
        if isinstance(event.what, Statement):
            return self._state(event.what, task)
        return self._ask(event.what, task)

    def _state(self, what: Statement, task: Task) -> Iterator[Piece]:
        key = name_of(what.key)
        if what.is_copy:
            yield self._piece(" Variable")
            yield self._piece(f" {key}")
            yield self._piece(" is a copy of")
            yield self._piece(f" {name_of(what.value)}")
        else:
            yield self._piece(" Variable" if task.name == "variable_tracking" else " The number of")
            yield self._piece(f" {key}")
            yield self._piece(" is now" if task.name == "overwrite" else " is")
            yield self._piece(f" {_number(what.value)}")
        yield self._piece(".")

    def _ask(self, what: Question, task: Task) -> Iterator[Piece]:
        subject, answers = f" {name_of(what.subject)}", [f" {_number(n)}" for n in what.answers]
        before, after, answer = {
            "multi_value": (
                "\nQuestion: which numbers has",
                ", in their order? Answer:",
                " The numbers are",
            ),
            "variable_tracking": (
                "\nQuestion: which variables are",
                ", in the order in which they became so? Answer:",
                " The variables are",
            ),
            "overwrite": ("\nQuestion: what is the last number of", "? Answer:", " It is"),
        }.get(task.name, ("\nQuestion: what is the number of", "? Answer:", " It is"))
        if task.name == "variable_tracking":
            subject, answers = f" {_number(what.subject)}", [f" {name_of(n)}" for n in what.answers]
        for text in (before, subject, after, answer):
            yield self._piece(text)
        yield Piece(self._encode(answers[0]), is_answer=True)
        for _, text in pairwise(answers):
            yield self._piece(",")
            yield Piece(self._encode(text), is_answer=True)
        yield self._piece(".")

    def _piece(self, text: str) -> Piece:
        return Piece(self._encode(text))

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text)


def name_of(symbol: int) -> str:
    """An invented word; `symbol` is below SYMBOLS."""
    n = len(SYLLABLES)
    return SYLLABLES[symbol // n**2] + SYLLABLES[symbol // n % n] + SYLLABLES[symbol % n]


def _number(symbol: int) -> str:
    return str(FIRST_NUMBER + NUMBER_STEP * symbol)
