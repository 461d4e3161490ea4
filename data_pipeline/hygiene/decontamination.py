r"""Drop texts that share long runs of words with evaluation sets (GPT-3's rule).

Brown et al. 2020, arXiv:2005.14165, appendix C. Words are lower-cased runs of `\w`, so that
punctuation and white space do not matter; each Chinese or Japanese character is one (13 of these
are a short clause: a crawl in these languages wants a larger `ngram`). An example shorter than
`ngram` is compared as a whole, one of fewer than `min_words` words not at all, as it would be found
by chance.

Two things differ. GPT-3 removed the n-gram with 200 characters on either side, and the whole
document when that left more than ten pieces; here the document is dropped, so that no page is torn
apart. And GPT-3 spared n-grams that more than ten documents of the crawl have: to know these the
crawl would have to be read twice, so famous passages that an evaluation quotes are dropped too; the
audit names the examples to be removed from the evaluation files where that is not wanted.
"""

import functools
import io
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import model_validator

from data_pipeline.compiled import compiled
from data_pipeline.dedup.batches import read_rows
from data_pipeline.errors import DataError
from data_pipeline.hygiene.listed import FileSettings, Finding, changed
from data_pipeline.quality.linear import sha256_of
from data_pipeline.quality.words import IDEOGRAPHS

WORD = re.compile(rf"[{IDEOGRAPHS}]|[^\W{IDEOGRAPHS}]+")
JSONL = (".jsonl", ".jsonl.gz", ".jsonl.zst")
PARQUET = ".parquet"
LETTER, IDEOGRAPH = 1, 2
CHARACTERS = 0x110000
SHOWN_WORDS = 40

CHARACTER_BASE = np.uint64(0x9E3779B97F4A7C15)
WORD_BASE = np.uint64(0xD1342543DE82EF95)
SHIFT = np.uint64(29)


class Decontamination(FileSettings):
    """Evaluation files (Parquet, JSON Lines; a field `text`), and the overlap that is too much."""

    ngram: int
    min_words: int

    @model_validator(mode="after")
    def _is_possible(self) -> "Decontamination":
        if not 1 <= self.min_words <= self.ngram:
            raise ValueError(
                f"min_words {self.min_words} and ngram {self.ngram} are impossible; allowed: "
                "min_words from 1 to ngram"
            )
        return self

    def load(self) -> "Index":
        return _load_index(self.files, self.sha256, self.ngram, self.min_words)

    def judge(self, text: str) -> Finding | None:
        """Why a text is dropped, None where it is not."""
        overlap = self.load().find(text)
        if overlap is None:
            return None
        shown = " ".join(overlap.words[:SHOWN_WORDS])
        more = " ..." if len(overlap.words) > SHOWN_WORDS else ""
        return Finding(
            "decontamination.overlap",
            f"{len(overlap.words)} words of {overlap.example}: {shown}{more}",
        )


@dataclass(frozen=True)
class Overlap:
    """The first words of a text that are those of an example, as many as agree.

    Attributes:
        example: where the example stands.
    """

    words: Sequence[str]
    example: str


class Index:
    """The n-grams of evaluation texts by a 64-bit hash, each with a place where it stands.

    What a hash finds is compared word by word, so nothing is found that is not there. Of different
    n-grams with equal hashes only the first is kept: with 10 million of them it is improbable (3 in
    a million) that there are any.
    """

    def __init__(self, texts: Sequence[str], places: Sequence[str], ngram: int, min_words: int):
        """
        Args:
            places: where the user finds each text.
        """
        self._texts = texts
        self._places = places
        self.skipped = 0
        keys: list[NDArray[np.uint64]] = []
        examples: list[NDArray[np.int32]] = []
        sizes: set[int] = set()
        for number, text in enumerate(texts):
            words = _hash_words(_codes(text.lower()), _kinds())
            size = min(ngram, len(words))
            if size < min_words:
                self.skipped += 1
                continue
            sizes.add(size)
            keys.append(_hash_ngrams(words, size))
            examples.append(np.full(len(keys[-1]), number, np.int32))
        self._sizes = np.array(sorted(sizes), np.int64)
        self._keys, self._examples = _fill(
            np.concatenate([np.empty(0, np.uint64), *keys]),
            np.concatenate([np.empty(0, np.int32), *examples]),
        )

    def find(self, text: str) -> Overlap | None:
        """The first overlap of a text with an example."""
        lowered = text.lower()
        hashes = _hash_words(_codes(lowered), _kinds())
        words: list[str] = []
        start = 0
        while True:
            start, size, example = _find(hashes, start, self._sizes, self._keys, self._examples)
            if example < 0:
                return None
            words = words or WORD.findall(lowered)
            common = _common(words, start, size, WORD.findall(self._texts[example].lower()))
            if common:
                return Overlap(words[start : start + common], self._places[example])
            start += 1


def _common(words: Sequence[str], start: int, size: int, example: Sequence[str]) -> int:
    """How many words from `start` on the example has in a row, 0 if fewer than `size`."""
    longest = 0
    for place in range(len(example)):
        count = 0
        while (
            place + count < len(example)
            and start + count < len(words)
            and example[place + count] == words[start + count]
        ):
            count += 1
        longest = max(longest, count)
    return longest if longest >= size else 0


@functools.lru_cache(maxsize=1)
def _load_index(
    files: tuple[Path, ...], hashes: tuple[str, ...], ngram: int, min_words: int
) -> Index:
    texts: list[str] = []
    places: list[str] = []
    for file, sha256 in zip(files, hashes, strict=True):
        for number, text in enumerate(_read(file)):
            texts.append(text)
            places.append(f"example {number} (counted from 0) of {file.name}")
        if sha256_of(file) != sha256:
            raise changed(file)
    index = Index(texts, places, ngram, min_words)
    if index.skipped == len(texts):
        names = ", ".join(str(file) for file in files)
        raise DataError(f"{names}: no text of at least {min_words} words; is it in `text`?")
    return index


def _read(path: Path) -> Iterator[str]:
    if path.name.endswith(JSONL):
        return _read_jsonl(path)
    if path.suffix == PARQUET:
        return _read_parquet(path)
    raise DataError(f"{path}: unknown file type; allowed are {', '.join((PARQUET, *JSONL))}")


def _read_jsonl(path: Path) -> Iterator[str]:
    """Of a line only `text` matters: other fields of evaluation sets are of any type."""
    number = 0
    try:
        with io.BufferedReader(pa.input_stream(str(path), compression="detect")) as lines:
            for number, line in enumerate(lines, 1):
                if not line.isspace():
                    yield _text(line, f"{path}:{number}")
    except OSError as error:
        raise DataError(f"{path}: damaged after line {number} ({error})") from error


def _text(line: bytes, place: str) -> str:
    try:
        text = json.loads(line).get("text") or ""
    except (ValueError, AttributeError, RecursionError) as error:
        raise DataError(f"{place}: not a JSON object ({error})") from error
    if not isinstance(text, str):
        raise DataError(f"{place}: `text` must be a string, not {text!r:.40}")
    return text


def _read_parquet(path: Path) -> Iterator[str]:
    try:
        file = pq.ParquetFile(path)
        names = file.schema_arrow.names
        if "text" not in names:
            raise DataError(f"{path}: no column `text` among {', '.join(names)}")
        for batch in read_rows(file, ["text"]):
            yield from (text or "" for text in batch["text"].cast(pa.large_string()).to_pylist())
    except pa.ArrowException as error:
        raise DataError(f"{path}: damaged or not Parquet ({error})") from error


def _codes(text: str) -> NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


@functools.cache
def _kinds() -> NDArray[np.uint8]:
    """For each code point whether it is a word, belongs to one, or neither."""
    characters = "".join(map(chr, range(CHARACTERS)))
    kinds = np.zeros(CHARACTERS, np.uint8)
    for kind, pattern in ((LETTER, r"\w+"), (IDEOGRAPH, f"[{IDEOGRAPHS}]+")):
        for run in re.finditer(pattern, characters):
            kinds[run.start() : run.end()] = kind
    return kinds


@compiled
def _mix(hash: np.uint64) -> np.uint64:
    hash = (hash ^ (hash >> SHIFT)) * CHARACTER_BASE
    return hash ^ (hash >> SHIFT)


@compiled
def _hash_words(codes: NDArray[np.uint32], kinds: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """A hash of each word of `WORD` in a text."""
    hashes = np.empty(len(codes), np.uint64)
    words = 0
    hash = np.uint64(0)
    for i in range(len(codes)):
        kind = kinds[codes[i]]
        if kind == LETTER:
            hash = (hash ^ np.uint64(codes[i])) * CHARACTER_BASE
            continue
        if hash:
            hashes[words] = _mix(hash)
            words += 1
            hash = np.uint64(0)
        if kind == IDEOGRAPH:
            hashes[words] = _mix(np.uint64(codes[i]) * CHARACTER_BASE)
            words += 1
    if hash:
        hashes[words] = _mix(hash)
        words += 1
    return hashes[:words]


@compiled
def _power(size: int) -> np.uint64:
    power = np.uint64(1)
    for _ in range(size):
        power *= WORD_BASE
    return power


@compiled
def _key(sum: np.uint64, size: int) -> np.uint64:
    """Never 0, which marks an empty slot; runs of different sizes differ."""
    return _mix(sum + np.uint64(size)) | np.uint64(1)


@compiled
def _hash_ngrams(words: NDArray[np.uint64], size: int) -> NDArray[np.uint64]:
    """The key of each run of `size` words."""
    keys = np.empty(len(words) - size + 1, np.uint64)
    power = _power(size)
    sum = np.uint64(0)
    for i in range(len(words)):
        sum = sum * WORD_BASE + words[i]
        if i >= size:
            sum -= words[i - size] * power
        if i >= size - 1:
            keys[i - size + 1] = _key(sum, size)
    return keys


@compiled
def _fill(
    keys: NDArray[np.uint64], examples: NDArray[np.int32]
) -> tuple[NDArray[np.uint64], NDArray[np.int32]]:
    """A hash table with open addressing, at most half full; of equal keys the first stays."""
    slots = 16
    while slots < 2 * len(keys):
        slots *= 2
    table = np.zeros(slots, np.uint64)
    values = np.full(slots, -1, np.int32)
    for i in range(len(keys)):
        slot = np.int64(keys[i] >> np.uint64(1)) & (slots - 1)
        while table[slot] and table[slot] != keys[i]:
            slot = (slot + 1) & (slots - 1)
        if not table[slot]:
            table[slot], values[slot] = keys[i], examples[i]
    return table, values


@compiled
def _find(
    words: NDArray[np.uint64],
    start: int,
    sizes: NDArray[np.int64],
    table: NDArray[np.uint64],
    values: NDArray[np.int32],
) -> tuple[int, int, int]:
    """The first run of words from `start` on that is in the table: its place, size and example.

    The example is -1 where there is none.
    """
    sums = np.zeros(len(sizes), np.uint64)
    powers = np.empty(len(sizes), np.uint64)
    for k in range(len(sizes)):
        powers[k] = _power(sizes[k])
    for i in range(start, len(words)):
        for k in range(len(sizes)):
            size = sizes[k]
            sums[k] = sums[k] * WORD_BASE + words[i]
            first = i - size + 1
            if first > start:
                sums[k] -= words[first - 1] * powers[k]
            if first >= start:
                key = _key(sums[k], size)
                slot = np.int64(key >> np.uint64(1)) & (len(table) - 1)
                while table[slot] and table[slot] != key:
                    slot = (slot + 1) & (len(table) - 1)
                if table[slot]:
                    return first, size, values[slot]
    return 0, 0, -1
