"""Train the linear classifier that tells curated texts from those of a crawl."""

import hashlib
import heapq
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data_pipeline.compiled import compiled
from data_pipeline.dedup.batches import read_rows
from data_pipeline.dedup.inputs import open_parquet
from data_pipeline.dedup.jsonl import read_jsonl
from data_pipeline.errors import DataError, file_errors
from data_pipeline.quality.gpt3 import PARETO_ALPHA, keep_probability
from data_pipeline.quality.linear import BUCKETS, Features, LinearModel, read_features

PARQUET = ".parquet"
JSONL = (".jsonl", ".jsonl.gz", ".jsonl.zst")
FEWEST = 20
HELD_OUT = 10
EPOCHS = 10
LEARNING_RATE = 0.1
L2 = 1e-6
Example = tuple[int, Features]


@dataclass(frozen=True)
class Training:
    """A model, and what it says of the tenth of each kind that it has not seen.

    Attributes:
        documents: how many curated and crawled ones were used.
        accuracy: mean of the shares of either kind that are told right.
        kept: shares of the curated and of the crawled that GPT-3's rule would keep.
    """

    model: LinearModel
    documents: tuple[int, int]
    accuracy: float
    kept: tuple[float, float]


def train_classifier(
    positive: Sequence[Path], negative: Sequence[Path], documents: int, seed: int
) -> Training:
    """Train on files of curated and of crawled texts; both kinds weigh the same.

    The same texts and seed give the same model, however the texts are spread over files.

    Args:
        positive, negative: Parquet or JSON Lines with a column or field `text`, or folders of them.
        documents: at most this many of each kind are used, drawn by a hash of seed and text.

    Raises:
        DataError: files that cannot be read, or too few texts.
    """
    kinds = [
        _draw(_texts(paths), documents, seed, option)
        for paths, option in ((negative, "--negative"), (positive, "--positive"))
    ]
    examples = sorted(
        ((key, label, features) for label, kind in enumerate(kinds) for key, features in kind),
        key=lambda example: example[:2],
    )
    labelled = [(label, features) for _, label, features in examples]
    # Of each kind by itself: of a few there might be none among all that are held out.
    places = count(), count()
    seen: list[Example] = []
    held_out: list[Example] = []
    for label, features in labelled:
        (seen if next(places[label]) % HELD_OUT else held_out).append((label, features))
    about = {"seed": seed, "positive": len(kinds[1]), "negative": len(kinds[0])}
    model = _fit(seen, about)
    scores = [
        [model.score_features(features) for label, features in held_out if label == kind]
        for kind in (0, 1)
    ]
    negatives, positives = scores
    right = (fmean(score > 0.5 for score in positives), fmean(score <= 0.5 for score in negatives))
    kept = [fmean(keep_probability(score, PARETO_ALPHA) for score in kind) for kind in scores]
    return Training(model, (len(kinds[1]), len(kinds[0])), fmean(right), (kept[1], kept[0]))


def _draw(
    texts: Iterable[str], documents: int, seed: int, option: str
) -> list[tuple[int, Features]]:
    """The documents with the smallest hashes, each text once."""
    drawn: list[tuple[int, Features]] = []
    keys: set[int] = set()
    for text in texts:
        key = _key(text, seed)
        if key in keys or (len(drawn) == documents and key > -drawn[0][0]):
            continue
        features = read_features(text)
        if not len(features.buckets):
            continue
        keys.add(key)
        # A heap has its smallest on top: the largest hash, turned negative.
        if len(drawn) < documents:
            heapq.heappush(drawn, (-key, features))
        else:
            keys.discard(-heapq.heapreplace(drawn, (-key, features))[0])
    if len(drawn) < FEWEST:
        raise DataError(
            f"{option}: {len(drawn)} different texts with words; at least {FEWEST} are needed, and "
            "thousands for a useful classifier"
        )
    return [(-key, features) for key, features in drawn]


def _key(text: str, seed: int) -> int:
    encoded = text.encode(errors="surrogatepass")
    digest = hashlib.blake2b(encoded, digest_size=8, salt=str(seed).encode()[:16])
    return int.from_bytes(digest.digest(), "big")


def _texts(paths: Sequence[Path]) -> Iterator[str]:
    for path in paths:
        files = [path]
        if path.is_dir():
            files = sorted(
                file for file in path.rglob("*") if file.name.endswith((PARQUET, *JSONL))
            )
            if not files:
                raise DataError(f"{path}: no {', '.join((PARQUET, *JSONL))} in this folder")
        for file in files:
            yield from _texts_of(file)


def _texts_of(path: Path) -> Iterator[str]:
    if not path.name.endswith((PARQUET, *JSONL)):
        allowed = ", ".join((PARQUET, *JSONL))
        raise DataError(f"{path}: unknown file type; allowed are {allowed}, and folders of them")
    with file_errors(), path.open("rb"):
        pass
    tables = _parquet(path) if path.suffix == PARQUET else read_jsonl(path)
    with file_errors():
        for table in tables:
            yield from (text for text in table["text"].to_pylist() if text)


def _parquet(path: Path) -> Iterator[pa.RecordBatch]:
    try:
        with open_parquet(path, ["text"]) as file:
            yield from read_rows(file, ["text"])
    except pa.ArrowException as error:
        raise DataError(f"{path}: damaged ({error})") from error


def _fit(examples: Sequence[Example], about: dict[str, Any]) -> LinearModel:
    labels = np.array([label for label, _ in examples])
    counts = np.bincount(labels, minlength=2)
    sizes = [len(features.buckets) for _, features in examples]
    weights, bias = _ada_grad(
        np.concatenate([[0], np.cumsum(sizes)]),
        np.concatenate([features.buckets for _, features in examples]),
        np.concatenate([features.values for _, features in examples]),
        labels,
        len(labels) / 2 / np.maximum(1, counts),
        BUCKETS,
    )
    return LinearModel(weights.astype(np.float32), float(np.float32(bias)), about)


@compiled
def _ada_grad(
    ends: NDArray[np.int64],
    buckets: NDArray[np.int32],
    values: NDArray[np.float64],
    labels: NDArray[np.int64],
    importance: NDArray[np.float64],
    size: int,
) -> tuple[NDArray[np.float64], float]:
    """Logistic regression, one document at a time (Duchi et al. 2011, algorithm 1, diagonal)."""
    weights = np.zeros(size)
    squares = np.full(size, 1e-8)
    bias, bias_squares = 0.0, 1e-8
    for _ in range(EPOCHS):
        for example in range(len(labels)):
            score = bias
            for place in range(ends[example], ends[example + 1]):
                score += weights[buckets[place]] * values[place]
            label = labels[example]
            error = (1 / (1 + math.exp(-score)) - label) * importance[label]
            for place in range(ends[example], ends[example + 1]):
                bucket = buckets[place]
                gradient = error * values[place] + L2 * weights[bucket]
                squares[bucket] += gradient * gradient
                weights[bucket] -= LEARNING_RATE * gradient / math.sqrt(squares[bucket])
            bias_squares += error * error
            bias -= LEARNING_RATE * error / math.sqrt(bias_squares)
    return weights, bias
