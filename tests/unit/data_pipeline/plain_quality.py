"""The quality rules word by word and line by line, as the papers state them, for comparison."""

import re
from collections import Counter
from collections.abc import Iterator

from data_pipeline.quality import C4, FineWeb, GopherQuality, GopherRepetition

IDEOGRAPHS = (
    "\u3041-\u30ff\uff66-\uff9f\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
WORD = re.compile(rf"[{IDEOGRAPHS}][\u3001-\u303f\uff01-\uff0f\uff1a-\uff20]*|[^\s{IDEOGRAPHS}]+")
SENTENCE_END = re.compile(
    r"(?<![.!?])[.!?]+[\"”’')\]]*(?:[ \t]*$|\s+[\"“‘'(\[]*(?P<next>\w))|[。！？]", re.MULTILINE
)
ABBREVIATION = re.compile(
    r"\b(?:[^\W\d_]|Dr|Mr|Mrs|Ms|Prof|St|Jr|Sr|No|Fig|vs|cf|approx)\.$", re.IGNORECASE
)
ENDS = (".", "!", "?", '"', "”", "。", "！", "？")
UNWANTED = ("javascript", "terms of use", "privacy policy", "cookie policy", "uses cookies")
UNWANTED = (*UNWANTED, "use of cookies", "use cookies")


def sentences(text: str) -> int:
    count = 0
    for match in SENTENCE_END.finditer(text):
        after = match["next"]
        if after is None:
            count += 1
        elif not after.islower() and not after.isdigit():
            before = text[max(0, match.start() - len("approx.")) : match.start() + 1]
            count += ABBREVIATION.search(before) is None
    return count


def non_blank(pieces: list[str]) -> list[str]:
    return [piece.strip() for piece in pieces if piece.strip()]


def duplicates(pieces: list[str]) -> tuple[float, float]:
    """Shares of the pieces, and of their characters, that repeat an earlier piece."""
    pieces = non_blank(pieces)
    repeated = [piece for place, piece in enumerate(pieces) if piece in pieces[:place]]
    if not pieces:
        return 0.0, 0.0
    return len(repeated) / len(pieces), sum(map(len, repeated)) / sum(map(len, pieces))


def ngrams(words: list[str], n: int) -> tuple[float, float]:
    """Table A1's two shares, word by word."""
    grams = [tuple(words[start : start + n]) for start in range(len(words) - n + 1)]
    total = sum(map(len, words))
    most = max(Counter(grams).values())
    if most == 1:
        return 0.0, 0.0
    top = max(most * sum(map(len, gram)) for gram, count in Counter(grams).items() if count == most)
    seen: set[tuple[str, ...]] = set()
    covered: set[int] = set()
    for start, gram in enumerate(grams):
        if gram in seen:
            covered.update(range(start, start + n))
        seen.add(gram)
    return top / total, sum(len(words[position]) for position in covered) / total


def gopher_repetition(rules: GopherRepetition, text: str) -> Iterator[str]:
    lines, line_characters = duplicates(text.splitlines())
    if lines > rules.max_duplicate_lines:
        yield "gopher.duplicate_line_fraction"
    if line_characters > rules.max_duplicate_line_characters:
        yield "gopher.duplicate_line_character_fraction"
    paragraphs, paragraph_characters = duplicates(text.split("\n\n"))
    if paragraphs > rules.max_duplicate_paragraphs:
        yield "gopher.duplicate_paragraph_fraction"
    if paragraph_characters > rules.max_duplicate_paragraph_characters:
        yield "gopher.duplicate_paragraph_character_fraction"
    words = text.split()
    for n in range(2, min(10, len(words)) + 1):
        top, repeated = ngrams(words, n)
        if top > rules.max_top_ngrams.get(n, 1.0):
            yield f"gopher.top_{n}_gram_character_fraction"
        if repeated > rules.max_duplicate_ngrams.get(n, 1.0):
            yield f"gopher.duplicate_{n}_gram_character_fraction"


def gopher_quality(rules: GopherQuality, text: str, language: str) -> Iterator[str]:
    words = WORD.findall(text)
    spaced = [word for word in words if not re.match(f"[{IDEOGRAPHS}]", word)]
    lines = non_blank(text.splitlines())
    if not rules.min_words <= len(words) <= rules.max_words:
        yield "gopher.word_count"
        return
    mean = sum(map(len, spaced)) / max(1, len(spaced))
    is_usual = rules.min_mean_word_length <= mean <= rules.max_mean_word_length
    if 2 * len(spaced) > len(words) and not is_usual:
        yield "gopher.mean_word_length"
    symbols = max(text.count("#"), text.count("...") + text.count("…"))
    if symbols / len(words) > rules.max_symbol_to_word_ratio:
        yield "gopher.symbol_to_word_ratio"
    bullets = [line for line in lines if line[0] in "•‣▪◦-*"]
    if len(bullets) > rules.max_bullet_lines * len(lines):
        yield "gopher.bullet_lines"
    ellipses = [line for line in lines if line.endswith(("...", "…"))]
    if len(ellipses) > rules.max_ellipsis_lines * len(lines):
        yield "gopher.ellipsis_lines"
    alphabetic = [word for word in words if re.search(r"[^\W\d_]", word)]
    if len(alphabetic) < rules.min_alphabetic_words * len(words):
        yield "gopher.alphabetic_words"
    required = set(rules.stop_words.get(language, ()))
    if required and len(required & {word.lower() for word in words}) < rules.min_stop_words:
        yield "gopher.stop_words"


def c4(rules: C4, text: str) -> tuple[str, str | None]:
    """The text that is left, and the rule that drops it, if one does."""
    if "lorem ipsum" in text.lower():
        return text, "c4.lorem_ipsum"
    if rules.drop_curly_brackets and "{" in text:
        return text, "c4.curly_bracket"
    if any(_spaced(entry) in _spaced(text) for entry in rules.bad_words):
        return text, "c4.bad_words"
    kept = "\n".join(
        line for line in map(_without_citations, text.splitlines()) if _keeps(rules, line)
    )
    return kept, "c4.sentences" if sentences(kept) < rules.min_sentences else None


def _spaced(text: str) -> str:
    """Words and ideographs in lower case with a space on either side, and nothing else."""
    words = re.sub(r"\W", " ", re.sub(f"([{IDEOGRAPHS}])", r" \1 ", text.casefold())).split()
    return f" {' '.join(words)} "


def _without_citations(line: str) -> str:
    return re.sub(r"\[(\d*|edit|citation needed)\]", "", line).rstrip()


def _keeps(rules: C4, line: str) -> bool:
    if rules.require_terminal_punctuation and (not line.endswith(ENDS) or line.endswith("...")):
        return False
    longest = max(map(len, line.split()), default=0)
    if rules.max_word_length is not None and longest > rules.max_word_length:
        return False
    if len(WORD.findall(line)) < rules.min_words_per_line:
        return False
    return not any(phrase in line.lower() for phrase in UNWANTED)


def fineweb(rules: FineWeb, text: str) -> Iterator[str]:
    lines = non_blank(text.splitlines())
    punctuated = [line for line in lines if line.endswith((*ENDS, "'", "’"))]
    if len(punctuated) <= rules.min_punctuated_lines * len(lines):
        yield "fineweb.punctuated_lines"
    if duplicates(lines)[1] >= rules.max_duplicate_line_characters:
        yield "fineweb.duplicate_line_character_fraction"
    short = [line for line in lines if len(line) < rules.short_line_characters]
    if len(short) >= rules.max_short_lines * len(lines):
        yield "fineweb.short_lines"
