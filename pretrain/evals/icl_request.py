"""What an evaluation of in-context learning is asked for, and its prompts; without torch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from data_pipeline.stream import Tokenizer
from data_pipeline.synthetic import (
    ICL_TASKS,
    Alphabet,
    Example,
    check_icl_task,
    draw_examples,
    icl_random_numbers,
    is_synthetic,
)
from pretrain.config import Config, overridden
from pretrain.errors import UserError
from pretrain.eval_config import longest_position
from pretrain.evals.forms import FORMS, SYMBOLS, name_of
from pretrain.evals.request import TRAINS_NOT, prepared

SHOTS = (0, 1, 2, 4, 8, 16)


@dataclass(frozen=True, kw_only=True)
class IclRequest:
    """
    Attributes:
        tasks: names in ICL_TASKS.
        shots: examples before the one that is asked for.
        samples: prompts of each task and number of shots.
        seed: of the prompts.
        form: as of `Request`.
    """

    tasks: tuple[str, ...] = tuple(ICL_TASKS)
    shots: tuple[int, ...] = SHOTS
    samples: int = 128
    seed: int = 0
    form: str = "auto"

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise UserError(f"--form {self.form} is not known; allowed: {', '.join(FORMS)}")
        if not self.tasks:
            raise UserError("--tasks is empty: name at least one, or leave it out for all")
        for name in self.tasks:
            check_icl_task(name)


def parse_shots(text: str) -> tuple[int, ...]:
    """`0,1,4`, in increasing order. Raises UserError."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdecimal() for part in parts):
        raise UserError(f"--shots {text}: must be numbers of examples, as in 0,1,4,16")
    return tuple(sorted(set(map(int, parts))))


class Prompt(NamedTuple):
    """Examples of one rule, the last of which is asked for.

    Attributes:
        tokens: [T]
        is_asked: [T], the tokens of its output.
    """

    tokens: NDArray[np.int64]
    is_asked: NDArray[np.bool_]


class ExampleForm(Protocol):
    """Writes examples in tokens.

    Attributes:
        symbols: how many different ones there are.
    """

    symbols: int

    def spell(self, name: str, example: Example) -> tuple[list[int], list[int]]:
        """An example of a task: what comes before its output, and its output."""


def example_form(name: str, tokenizer: Tokenizer) -> tuple[str, ExampleForm]:
    """The form of that name; `auto` is `tokens` where the tokenizer is that of synthetic shards."""
    if name == "auto":
        name = "tokens" if is_synthetic(tokenizer) else "text"
    if name == "text":
        return name, TextExamples(tokenizer)
    alphabet = Alphabet(tokenizer.vocab_size)
    alphabet.check_symbols()
    return name, TokenExamples(alphabet)


class TokenExamples:
    """Examples as `farspan data synthetic --task icl` writes them."""

    def __init__(self, alphabet: Alphabet) -> None:
        self.symbols = alphabet.symbols
        self._alphabet = alphabet

    def spell(self, name: str, example: Example) -> tuple[list[int], list[int]]:
        tokens = self._alphabet.spell([example])
        before = len(tokens) - len(example.wanted)
        return tokens[:before], tokens[before:]


class TextExamples:
    """Examples as lines of invented words and of numbers, in any tokenizer's tokens.

    Each word is tokenized by itself, so that it has the same tokens wherever it stands.
    """

    symbols = SYMBOLS

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def spell(self, name: str, example: Example) -> tuple[list[int], list[int]]:
        is_number = name == "arithmetic"
        given, wanted = (
            [token for symbol in part for token in self._word(symbol, is_number)]
            for part in example
        )
        return [*self._begin, *given, *self._then], wanted

    def _word(self, symbol: int, is_number: bool) -> list[int]:
        return self._tokenizer.encode(f" {symbol}" if is_number else f" {name_of(symbol)}")

    @cached_property
    def _begin(self) -> list[int]:
        return self._tokenizer.encode("\nInput:")

    @cached_property
    def _then(self) -> list[int]:
        return self._tokenizer.encode("\nOutput:")


def prompts(form: ExampleForm, request: IclRequest, name: str, shots: int) -> Iterator[Prompt]:
    for number in range(request.samples):
        rng = icl_random_numbers(request.seed, "evaluation", name, shots, number)
        spelled = [
            form.spell(name, example)
            for example in draw_examples(name, form.symbols, shots + 1, rng)
        ]
        *shown, (before, asked) = spelled
        told = [token for example in shown for part in example for token in part] + before
        is_asked = np.repeat([False, True], [len(told), len(asked)])
        yield Prompt(np.array(told + asked, np.int64), is_asked)


def fitted(
    trained: Config, overrides: Sequence[str], form: ExampleForm, request: IclRequest, nproc: int
) -> Config:
    """The configuration to ask with: rows are as long as the longest prompt, or a little longer.

    Raises:
        UserError: longer than the run's positions, or a layout that is impossible.
    """
    config = overridden(trained, [TRAINS_NOT, *overrides])
    longest = max(
        len(prompt.tokens)
        for name in request.tasks
        for prompt in prompts(form, request, name, max(request.shots))
    )
    limit = longest_position(config)
    if limit is not None and longest > limit:
        raise UserError(
            f"--shots {max(request.shots)}: prompts take up to {longest} tokens, and the run has "
            f"softmax layers with rotary positions, trained for {limit}: give fewer shots, or see "
            f"how they extrapolate with data.seq_len={longest}"
        )
    unit = config.parallel.cp * config.parallel.tp
    segment = config.data.seq_len // config.context.segments
    if longest > segment and config.context.segments > 1:
        unit = segment
    return prepared(trained, overrides, [-(-longest // unit) * unit], nproc)
