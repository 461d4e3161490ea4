"""Words and sentences, in scripts with spaces and without."""

import re

# Han, Hiragana and Katakana put no space between words: each character stands for one.
IDEOGRAPHS = (
    "\u3041-\u30ff\uff66-\uff9f\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
IDEOGRAPHIC_PUNCTUATION = "\u3001-\u303f\uff01-\uff0f\uff1a-\uff20"
UNSPACED_WORD = re.compile(f"[{IDEOGRAPHS}]")
WORD = re.compile(rf"[{IDEOGRAPHS}][{IDEOGRAPHIC_PUNCTUATION}]*|[^\s{IDEOGRAPHS}]+")

SENTENCE_END = re.compile(
    r"(?<![.!?])[.!?]+[\"”’')\]]*(?:[ \t]*$|\s+[\"“‘'(\[]*(?P<next>\w))|[。！？]", re.MULTILINE
)
ABBREVIATION = re.compile(
    r"\b(?:[^\W\d_]|Dr|Mr|Mrs|Ms|Prof|St|Jr|Sr|No|Fig|vs|cf|approx)\.$", re.IGNORECASE
)
LONGEST_ABBREVIATION = len("approx.")


def split_words(text: str) -> list[str]:
    """Words by their spaces, and every Chinese or Japanese character as a word."""
    return WORD.findall(text) if UNSPACED_WORD.search(text) else text.split()


def count_sentences(text: str) -> int:
    """Terminal punctuation that ends a line or comes before a letter that is not lower case.

    Neither an initial ("U.S. Navy", "e.g. Paris") nor a common abbreviation ends a sentence.
    """
    return sum(_ends_sentence(text, match) for match in SENTENCE_END.finditer(text))


def _ends_sentence(text: str, match: re.Match[str]) -> bool:
    following = match["next"]
    if following is None:
        return True
    if following.islower() or following.isdigit():
        return False
    start = match.start()
    return not ABBREVIATION.search(text[max(0, start - LONGEST_ABBREVIATION) : start + 1])
