"""Tasks whose rule is drawn anew for each document, and told by examples only.

Whoever reads the examples can apply the rule (Brown et al. 2020, arXiv:2005.14165, section 1);
whoever does not is left to guess. Inputs and outputs are sequences of symbols.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import product
from math import perm
from typing import NamedTuple

import numpy as np

from data_pipeline.errors import DataError

COPIED = 4
DIGITS = 10
LEXICON = 8
WORDS = 3
# What becomes of two symbols, by their places in the input.
PATTERNS: tuple[tuple[int, ...], ...] = tuple(
    places for places in product((0, 1), repeat=3) if len(set(places)) > 1
)
LEAST_SYMBOLS = COPIED

Symbols = tuple[int, ...]
Apply = Callable[[Symbols], Symbols]


class Example(NamedTuple):
    """An input, and what the rule makes of it."""

    given: Symbols
    wanted: Symbols


@dataclass(frozen=True)
class Rule:
    """
    Attributes:
        draw: an input.
        apply: the output of an input.
    """

    draw: Callable[[np.random.Generator], Symbols]
    apply: Apply


@dataclass(frozen=True)
class IclTask:
    """
    Attributes:
        rule: draws a rule over so many symbols.
        chance: that one guesses an output right who knows the task and its input, and has seen no
            example, over so many symbols.
        tokens: of an input and its output.
    """

    rule: Callable[[int, np.random.Generator], Rule]
    chance: Callable[[int], float]
    tokens: int


def _copy(symbols: int, rng: np.random.Generator) -> Rule:
    return Rule(lambda draw: _different(symbols, COPIED, draw), lambda given: given)


def _reversal(symbols: int, rng: np.random.Generator) -> Rule:
    return Rule(lambda draw: _different(symbols, COPIED, draw), lambda given: given[::-1])


def _arithmetic(symbols: int, rng: np.random.Generator) -> Rule:
    modulus = min(DIGITS, symbols)
    added = int(rng.integers(modulus))
    return Rule(
        lambda draw: (int(draw.integers(modulus)),), lambda given: ((given[0] + added) % modulus,)
    )


def _pattern(symbols: int, rng: np.random.Generator) -> Rule:
    pattern = PATTERNS[int(rng.integers(len(PATTERNS)))]
    return Rule(
        lambda draw: _different(symbols, 2, draw),
        lambda given: tuple(given[place] for place in pattern),
    )


def _translation(symbols: int, rng: np.random.Generator) -> Rule:
    """A language of a few words: each has another; they come in the same order, or in reverse."""
    lexicon = min(LEXICON, symbols)
    words, foreign = _different(symbols, lexicon, rng), _different(symbols, lexicon, rng)
    means = dict(zip(words, foreign, strict=True))
    order = range(WORDS) if rng.integers(2) else range(WORDS)[::-1]
    return Rule(
        lambda draw: tuple(words[n] for n in _different(lexicon, WORDS, draw)),
        lambda given: tuple(means[given[place]] for place in order),
    )


ICL_TASKS: dict[str, IclTask] = {
    # Nothing but examples tells these two apart.
    "copy": IclTask(_copy, lambda symbols: 1 / 2, 2 * COPIED),
    "reversal": IclTask(_reversal, lambda symbols: 1 / 2, 2 * COPIED),
    "arithmetic": IclTask(_arithmetic, lambda symbols: 1 / min(DIGITS, symbols), 2),
    "pattern": IclTask(_pattern, lambda symbols: 1 / len(PATTERNS), 5),
    "translation": IclTask(_translation, lambda symbols: 1 / perm(symbols, WORDS), 2 * WORDS),
}


def check_icl_task(name: str) -> None:
    """Raises DataError, with the nearest name, if there is no such task."""
    if name not in ICL_TASKS:
        nearest = get_close_matches(name, ICL_TASKS, n=1, cutoff=0)[0]
        raise DataError(
            f"task {name!r} is not known, did you mean {nearest}? Allowed: {', '.join(ICL_TASKS)}"
        )


def draw_examples(name: str, symbols: int, count: int, rng: np.random.Generator) -> list[Example]:
    """So many examples of one rule. Where there are others, the last one has no word whose
    translation they do not show.

    Args:
        symbols: at least LEAST_SYMBOLS.
    """
    rule = ICL_TASKS[name].rule(symbols, rng)
    inputs = [rule.draw(rng) for _ in range(count)]
    if name == "translation" and count > 1:
        known = {word for given in inputs[:-1] for word in given}
        while not known.issuperset(inputs[-1]):
            inputs[-1] = rule.draw(rng)
    return [Example(given, rule.apply(given)) for given in inputs]


def icl_random_numbers(seed: int, purpose: str, name: str, *numbers: int) -> np.random.Generator:
    """What draws one document: a function of the seed, the task, and what else tells it apart.

    Args:
        purpose: documents to train on are drawn from other numbers than those to evaluate with.
    """
    return np.random.default_rng([seed, zlib.crc32(f"{purpose} icl {name}".encode()), *numbers])


def _different(symbols: int, count: int, rng: np.random.Generator) -> Symbols:
    drawn: list[int] = rng.choice(symbols, count, replace=False).tolist()
    return tuple(drawn)
