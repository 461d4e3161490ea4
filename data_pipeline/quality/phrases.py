"""Listed words and phrases, found whole in any letter case."""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

from data_pipeline.quality.words import IDEOGRAPHS

# Chinese and Japanese have no space between words: each character stands for one.
WORD = re.compile(rf"[{IDEOGRAPHS}]|[^\W{IDEOGRAPHS}]+")

Phrase = tuple[str, ...]
Phrases = Mapping[str, tuple[Phrase, ...]]
"""For each first word the phrases that begin with it, as words."""


def words_of(text: str) -> list[str]:
    """The words of a text without letter case, and without what stands between them."""
    return WORD.findall(text.casefold())


def by_first_word(entries: Iterable[str]) -> Phrases:
    """The phrases of a list; each entry has a word."""
    phrases: defaultdict[str, dict[Phrase, None]] = defaultdict(dict)
    for entry in entries:
        words = tuple(words_of(entry))
        phrases[words[0]][words] = None
    return {first: tuple(others) for first, others in phrases.items()}


def find_phrases(words: Sequence[str], phrases: Phrases) -> Iterator[tuple[int, Phrase]]:
    """Where phrases begin among words; they may overlap."""
    if phrases.keys().isdisjoint(words):
        return
    for place, word in enumerate(words):
        for phrase in phrases.get(word, ()):
            if tuple(words[place : place + len(phrase)]) == phrase:
                yield place, phrase
