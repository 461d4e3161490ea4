"""A linear quality classifier as GPT-3's (Brown et al. 2020, arXiv:2005.14165, appendix A).

Logistic regression on the features of Spark's Tokenizer and HashingTF: words are what stands
between spaces, in lower case, each hashed into a bucket. A count enters by its logarithm, and the
features of a text have length 1 together: with plain counts the score of a page of five hundred
words is 0 or 1 and nothing between.
"""

import functools
import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from data_pipeline.compiled import compiled
from data_pipeline.errors import DataError, file_errors
from data_pipeline.quality.words import read_words

BUCKETS = 1 << 18
FORMAT = "farspan quality classifier 1"
"""It changes with the features: a model is of no use with others."""
TRAIN = "farspan data train-classifier --positive CURATED --negative CRAWL --out MODEL"


class Features(NamedTuple):
    """The buckets of a text's words, each once, and their values."""

    buckets: NDArray[np.int32]
    values: NDArray[np.float64]


def read_features(text: str) -> Features:
    """The hashed words of a text; none in a text without words."""
    _, pieces = read_words(text.lower())
    return Features(*_count(pieces.hashes))


@dataclass(frozen=True)
class LinearModel:
    """Weights [BUCKETS] and a bias; `about` says what it was trained on."""

    weights: NDArray[np.float32]
    bias: float
    about: Mapping[str, Any]

    def score(self, text: str) -> float:
        """The probability that a text is one of the curated, if one in two is."""
        return self.score_features(read_features(text))

    def score_features(self, features: Features) -> float:
        return 1 / (
            1 + math.exp(-self.bias - float(self.weights[features.buckets] @ features.values))
        )

    def save(self, path: Path) -> None:
        """Write a safetensors file, or leave what is there; equal models give equal bytes."""
        tensors = {"weights": self.weights, "bias": np.array([self.bias])}
        header = {"farspan": json.dumps({"format": FORMAT, **self.about}, sort_keys=True)}
        aside = path.with_name(f".{path.name}.{os.getpid()}")
        with file_errors():
            aside.write_bytes(save(tensors, header))
            aside.rename(path)


def sha256_of(path: Path) -> str:
    """Raises: DataError: the file cannot be read."""
    with file_errors(), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@functools.lru_cache(maxsize=1)
def load_model(path: Path, sha256: str) -> LinearModel:
    """Read a model that `LinearModel.save` wrote.

    Raises:
        DataError: no such file, one of another kind, or one that is no longer the file it was.
    """
    with file_errors():
        data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != sha256:
        raise DataError(f"{path}: the classifier has changed while it was in use; start again")
    about = _about(data)
    if about.pop("format", None) != FORMAT:
        raise DataError(f"{path}: not a quality classifier of this version; train one: {TRAIN}")
    tensors = load(data)
    return LinearModel(tensors["weights"], float(tensors["bias"][0]), about)


def _about(data: bytes) -> dict[str, Any]:
    """What is said of the model in the header of a safetensors file, nothing if it is none."""
    try:
        load(data)
        size = int.from_bytes(data[:8], "little")
        about = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["farspan"])
    except (SafetensorError, ValueError, KeyError):
        return {}
    return about if isinstance(about, dict) else {}


@compiled
def _count(hashes: NDArray[np.uint64]) -> tuple[NDArray[np.int32], NDArray[np.float64]]:
    words = len(hashes)
    size = 4
    while size < 2 * words:
        size *= 2
    table = np.full(size, -1, np.int32)
    buckets = np.empty(words, np.int32)
    counts = np.zeros(words, np.float64)
    distinct = 0
    for hash in hashes:
        bucket = np.int64((hash ^ (hash >> np.uint64(32))) & np.uint64(BUCKETS - 1))
        slot = bucket & (size - 1)
        while table[slot] >= 0 and buckets[table[slot]] != bucket:
            slot = (slot + 1) & (size - 1)
        if table[slot] < 0:
            table[slot] = distinct
            buckets[distinct] = bucket
            distinct += 1
        counts[table[slot]] += 1
    values = np.log1p(counts[:distinct])
    return buckets[:distinct], values / max(1e-9, math.sqrt((values * values).sum()))
