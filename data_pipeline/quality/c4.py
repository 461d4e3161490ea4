"""The C4 heuristics (Raffel et al. 2019, arXiv:1910.10683, section 2.2).

The paper's removal of repeated three-sentence spans needs the whole corpus: the dedup stage does
that work on documents. Its list of bad words is not shipped; a recipe may give one.
"""

import re

from data_pipeline.quality.verdict import Thresholds, Verdict
from data_pipeline.quality.words import count_sentences, split_words

TERMINAL_PUNCTUATION = (".", "!", "?", '"', "”", "。", "！", "？")
ELLIPSIS = "..."
CITATION = re.compile(r"\[(?:\d*|edit|citation needed)\]")
WORD = re.compile(r"\w+")
POLICY_PHRASES = (
    "terms of use",
    "privacy policy",
    "cookie policy",
    "uses cookies",
    "use of cookies",
    "use cookies",
)


class C4(Thresholds):
    """Page and line rules.

    Lines without terminal punctuation (an ellipsis is none) or with too few words are removed, and
    so are lines about JavaScript, cookies or terms of use; a page is dropped for what is left.
    """

    require_terminal_punctuation: bool
    min_words_per_line: int
    min_sentences: int
    drop_curly_brackets: bool
    bad_words: tuple[str, ...]

    def judge(self, text: str, language: str) -> Verdict:
        lowered = text.lower()
        if "lorem ipsum" in lowered:
            return Verdict(text, "c4.lorem_ipsum")
        if self.drop_curly_brackets and "{" in text:
            return Verdict(text, "c4.curly_bracket")
        if self.bad_words and not set(self.bad_words).isdisjoint(WORD.findall(lowered)):
            return Verdict(text, "c4.bad_words")
        lines = (CITATION.sub("", line).rstrip() for line in text.splitlines())
        kept = "\n".join(line for line in lines if self._keeps_line(line))
        if count_sentences(kept) < self.min_sentences:
            return Verdict(kept, "c4.sentences")
        return Verdict(kept)

    def _keeps_line(self, line: str) -> bool:
        is_terminated = line.endswith(TERMINAL_PUNCTUATION) and not line.endswith(ELLIPSIS)
        if self.require_terminal_punctuation and not is_terminated:
            return False
        if len(split_words(line)) < self.min_words_per_line:
            return False
        lowered = line.lower()
        return "javascript" not in lowered and not any(
            phrase in lowered for phrase in POLICY_PHRASES
        )
