"""Stories in reserved tokens, for models that are trained on them from scratch."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import models, pre_tokenizers

from data_pipeline.errors import DataError
from data_pipeline.synthetic.icl import ICL_TASKS, LEAST_SYMBOLS, Example, draw_examples
from data_pipeline.synthetic.stories import Event, Question, Task, tell
from data_pipeline.tokenize import END_OF_DOCUMENT, Tokenizer

# What a statement and a question begin with, after the end-of-document token 0.
SET, COPY, ASK = 1, 2, 3
FIRST_KEY = 4
KINDS_OF_SYMBOLS = 4
STATEMENT_TOKENS = 3


@dataclass(frozen=True)
class Alphabet:
    """What the ids of a vocabulary stand for.

    In order: the end of a document, `set`, `copy`, `ask`, keys, values, filler, and answers. Of
    keys, values and answers there are a quarter of the vocabulary each. Symbol n is the same thing
    as a key, a value or an answer; an answer has an id of its own, so that from the id of a token
    alone it is known whether it is to be predicted.

    Attributes:
        vocab_size: at least 8.
    """

    vocab_size: int

    def __post_init__(self) -> None:
        least = FIRST_KEY + KINDS_OF_SYMBOLS
        if self.vocab_size < least:
            raise DataError(f"vocab_size = {self.vocab_size}: must be at least {least}")

    @property
    def symbols(self) -> int:
        """How many keys there are, and as many values and answers."""
        return (self.vocab_size - FIRST_KEY) // KINDS_OF_SYMBOLS

    @property
    def first_value(self) -> int:
        return FIRST_KEY + self.symbols

    @property
    def filler(self) -> range:
        return range(FIRST_KEY + 2 * self.symbols, self.first_answer)

    @property
    def first_answer(self) -> int:
        """Ids from this one on are answers."""
        return self.vocab_size - self.symbols

    @cached_property
    def names(self) -> list[str]:
        """A word for each id."""
        kinds = [
            *(f"k{n}" for n in range(self.symbols)),
            *(f"v{n}" for n in range(self.symbols)),
            *(f"f{n}" for n in range(len(self.filler))),
            *(f"a{n}" for n in range(self.symbols)),
        ]
        return [END_OF_DOCUMENT, "set", "copy", "ask", *kinds]

    def save_tokenizer(self, path: Path) -> None:
        """Write a tokenizer.json that reads these words between spaces."""
        vocabulary = {name: number for number, name in enumerate(self.names)}
        tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token=END_OF_DOCUMENT))
        tokenizer.add_special_tokens([END_OF_DOCUMENT])
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer.save(str(path))

    def check(self, task: Task, length: int) -> None:
        """Raise DataError unless documents of `length` tokens of this task can be written."""
        if task.symbols > self.symbols:
            least = FIRST_KEY + KINDS_OF_SYMBOLS * task.symbols
            raise DataError(
                f"a vocabulary of {self.vocab_size} has {self.symbols} keys and as many values, "
                f"and {task.name} with {task.pairs} pairs of {task.values} values needs "
                f"{task.symbols}: take a vocabulary of {least} or more, or fewer pairs or values"
            )
        least = _slot_tokens(task) * (task.statements + task.questions + _slots_of_gaps(task)) + 1
        if length < least:
            apart = f" {task.gap} tokens apart" if task.gap else ""
            raise DataError(
                f"{length} tokens have no room for the {task.statements} statements and "
                f"{task.questions} questions of {task.name}{apart}: take {least} or more, or fewer "
                f"pairs or values{', or a smaller gap' if task.gap else ''}"
            )

    def check_symbols(self) -> None:
        """Raise DataError unless examples can be written."""
        if self.symbols < LEAST_SYMBOLS:
            least = FIRST_KEY + KINDS_OF_SYMBOLS * LEAST_SYMBOLS
            raise DataError(
                f"a vocabulary of {self.vocab_size} has {self.symbols} symbols, and examples need "
                f"{LEAST_SYMBOLS}: take a vocabulary of {least} or more"
            )

    def check_examples(self, length: int) -> None:
        """Raise DataError unless documents of `length` tokens can be written of examples."""
        self.check_symbols()
        # One to learn from, and one to learn.
        least = 1 + 2 * max(1 + task.tokens for task in ICL_TASKS.values())
        if length < least:
            raise DataError(f"{length} tokens have no room for two examples: take {least} or more")

    def spell(self, examples: Sequence[Example]) -> list[int]:
        """`ask`, the input in keys, and the output in answers, of each."""
        return [
            token
            for given, wanted in examples
            for token in (
                ASK,
                *(FIRST_KEY + symbol for symbol in given),
                *(self.first_answer + symbol for symbol in wanted),
            )
        ]


class Document(NamedTuple):
    """
    Attributes:
        tokens: [T] int64, the end-of-document token last.
        question: [T] int64, the number of the question that the token answers; -1 for the others.
    """

    tokens: NDArray[np.int64]
    question: NDArray[np.int64]


def is_synthetic(tokenizer: Tokenizer) -> bool:
    """Whether `Alphabet` made the vocabulary of a tokenizer."""
    if tokenizer.vocab_size < FIRST_KEY + KINDS_OF_SYMBOLS:
        return False
    names = Alphabet(tokenizer.vocab_size).names
    vocabulary = tokenizer.backend.get_vocab(with_added_tokens=True)
    return vocabulary == {name: number for number, name in enumerate(names)}


def write_document(
    task: Task,
    length: int,
    alphabet: Alphabet,
    rng: np.random.Generator,
    depth: float | None = None,
) -> Document:
    """A document of exactly `length` tokens; `Alphabet.check` says whether that is enough.

    It is cut into slots as wide as its longest event. Those that no event takes are filler.

    Args:
        depth: the place of a needle among the slots before the gap, 0 to 1; None draws it.
    """
    filler = alphabet.filler
    width = _slot_tokens(task)
    slots = (length - 1) // width
    first = length - 1 - slots * width
    empty = slots - task.statements - task.questions
    apart = _slots_of_gaps(task) / task.gaps / empty if task.spread and task.gap else 0.0
    events = tell(task, alphabet.symbols, rng, depth, apart)
    tokens = rng.integers(filler.start, filler.stop, length)
    tokens[-1] = 0
    question = np.full(length, -1)
    asked = 0
    for slot, event in zip(_choose_slots(events, slots, task), events, strict=True):
        start = first + int(slot) * width
        ids = _spell(event, task, alphabet)
        if isinstance(event.what, Question):
            # At the end of its slot: what comes next is the next event.
            start += width - len(ids)
            question[start + 2 : start + len(ids)] = asked
            asked += 1
        tokens[start : start + len(ids)] = ids
    return Document(tokens, question)


def write_examples(
    names: Sequence[str], length: int, alphabet: Alphabet, rng: np.random.Generator
) -> NDArray[np.int64]:
    """[length] tokens: as many examples as have room, of a task that is drawn among `names`, and
    filler before them. Each output is to be predicted from all before it.
    """
    name = names[int(rng.integers(len(names)))]
    count = (length - 1) // (1 + ICL_TASKS[name].tokens)
    spelled = alphabet.spell(draw_examples(name, alphabet.symbols, count, rng))
    filler = rng.integers(alphabet.filler.start, alphabet.filler.stop, length - 1 - len(spelled))
    return np.concatenate([filler, np.array([*spelled, 0])])


def _slot_tokens(task: Task) -> int:
    return max(STATEMENT_TOKENS, 2 + task.answers)


def _slots_of_gaps(task: Task) -> int:
    """How many of the slots that no event takes are needed to keep events apart."""
    if not task.gap:
        return 0
    whole = -(-task.gap // _slot_tokens(task))
    # Places anywhere are rounded to slots, and two may come one closer.
    return task.gaps * (whole + 1) if task.spread else whole


def _choose_slots(events: list[Event], slots: int, task: Task) -> NDArray[np.int64]:
    """Of each event, in order: its share of the slots that no event takes lies before it."""
    at_end = 0 if task.spread else task.questions
    before = len(events) - at_end
    empty = slots - len(events) - (0 if task.spread else _slots_of_gaps(task))
    places = np.array([event.place for event in events[:before]])
    skipped = np.rint(places * empty).astype(np.int64)
    return np.concatenate([skipped + np.arange(before), np.arange(slots - at_end, slots)])


def _spell(event: Event, task: Task, alphabet: Alphabet) -> list[int]:
    what = event.what
    if isinstance(what, Question):
        is_value = task.name == "variable_tracking"
        subject = (alphabet.first_value if is_value else FIRST_KEY) + what.subject
        return [ASK, subject, *(alphabet.first_answer + answer for answer in what.answers)]
    if what.is_copy:
        return [COPY, FIRST_KEY + what.key, FIRST_KEY + what.value]
    return [SET, FIRST_KEY + what.key, alphabet.first_value + what.value]
