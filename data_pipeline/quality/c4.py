"""The C4 heuristics (Raffel et al. 2019, arXiv:1910.10683, section 2.2).

The paper's removal of repeated three-sentence spans needs the whole corpus: the dedup stage does
that work on documents. Its list of bad words is not shipped; a recipe may give one.
"""

import functools
import re
from collections.abc import Callable
from typing import Annotated

from pydantic import AfterValidator

from data_pipeline.quality.phrases import Phrases, by_first_word, find_phrases, words_of
from data_pipeline.quality.text import Text
from data_pipeline.quality.verdict import Thresholds, Verdict
from data_pipeline.quality.words import WORD, has_sentences

TERMINAL_PUNCTUATION = (".", "!", "?", '"', "”", "。", "！", "？")
ELLIPSIS = "..."
CITATION = re.compile(r"\[(?:\d*|edit|citation needed)\]")
UNWANTED_PHRASES = (
    "javascript",
    "terms of use",
    "privacy policy",
    "cookie policy",
    "uses cookies",
    "use of cookies",
    "use cookies",
)


def _with_a_word(entry: str) -> str:
    if not words_of(entry):
        raise ValueError(f"{entry!r:.80} has no word; leave it out")
    return entry


class C4(Thresholds):
    """Page and line rules.

    Lines without terminal punctuation (an ellipsis is none), with too few words or with one that is
    too long are removed, and so are lines about JavaScript, cookies or terms of use; a page is
    dropped for what is left. `max_word_length` is in the authors' code, not in the paper.
    `bad_words` are words and phrases; one of them, whole and in any letter case, drops a page.
    """

    require_terminal_punctuation: bool
    min_words_per_line: int
    max_word_length: int | None
    min_sentences: int
    drop_curly_brackets: bool
    bad_words: tuple[Annotated[str, AfterValidator(_with_a_word)], ...]

    def judge(self, document: Text, language: str) -> Verdict:
        text = document.text
        lowered = text.lower()
        if "lorem ipsum" in lowered:
            return Verdict(document, "c4.lorem_ipsum")
        if self.drop_curly_brackets and "{" in text:
            return Verdict(document, "c4.curly_bracket")
        if self.bad_words and any(find_phrases(words_of(text), _phrases(self.bad_words))):
            return Verdict(document, "c4.bad_words")
        kept = Text("\n".join(self._kept_lines(document)))
        if not has_sentences(kept.text, self.min_sentences):
            return Verdict(kept, "c4.sentences")
        return Verdict(kept)

    def _kept_lines(self, document: Text) -> list[str]:
        text = CITATION.sub("", document.text)
        lowered = text.lower()
        unwanted = [phrase for phrase in UNWANTED_PHRASES if phrase in lowered]
        has_words = self._has_words(document)
        lines = [line for line in map(str.rstrip, text.splitlines()) if has_words(line)]
        if self.require_terminal_punctuation:
            lines = [
                line
                for line in lines
                if line.endswith(TERMINAL_PUNCTUATION) and not line.endswith(ELLIPSIS)
            ]
        if unwanted:
            lines = [line for line in lines if not any(x in line.lower() for x in unwanted)]
        if self.max_word_length is not None:
            lines = [line for line in lines if not self._has_long_word(line)]
        return lines

    def _has_words(self, document: Text) -> Callable[[str], bool]:
        """Whether a line has enough words; words in a text with spaces are found faster."""
        minimum = self.min_words_per_line
        if document.words.spaced < document.words.words:
            return lambda line: len(WORD.findall(line)) >= minimum
        return lambda line: len(line.split(None, minimum)) >= minimum

    def _has_long_word(self, line: str) -> bool:
        longest = self.max_word_length
        return (
            longest is not None
            and len(line) > longest
            and any(len(word) > longest for word in line.split())
        )


@functools.lru_cache(maxsize=2)
def _phrases(bad_words: tuple[str, ...]) -> Phrases:
    return by_first_word(bad_words)
