"""The classifier of blocks: a sum of small decision trees, learned by `extract.train`."""

import hashlib
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_pipeline.compiled import compiled
from data_pipeline.extract import features
from data_pipeline.extract.vocabulary import MEANINGS

SHIPPED = Path(__file__).with_name("forest.npz")


def format_digest() -> str:
    """What a forest's numbers refer to: the features, and the words that some of them stand for."""
    return hashlib.sha256("\n".join([*features.NAMES, *MEANINGS]).encode()).hexdigest()


@dataclass(frozen=True)
class Forest:
    """Trees as arrays: at split i, a row goes to children[i, row[feature[i]] > threshold[i]].

    A child c >= 0 is another split, one below 0 the leaf ~c. `root[t]` is tree t's first split.
    """

    root: NDArray[np.int32]
    feature: NDArray[np.int32]
    threshold: NDArray[np.float32]
    children: NDArray[np.int32]
    leaf: NDArray[np.float32]

    def chances(self, rows: features.Matrix) -> NDArray[np.float32]:
        """The chance, [blocks], that each block belongs to the main text."""
        odds = _sum_of_leaves(
            rows, self.root, self.feature, self.threshold, self.children, self.leaf
        )
        return 1 / (1 + np.exp(-odds))

    def save(self, path: Path) -> None:
        arrays = {field.name: getattr(self, field.name) for field in fields(self)}
        np.savez_compressed(path, format=np.array(format_digest()), **arrays)

    @staticmethod
    def load(path: Path) -> "Forest":
        with np.load(path) as arrays:
            assert arrays["format"] == format_digest(), f"{path} was learned from other features"
            return Forest(**{field.name: arrays[field.name] for field in fields(Forest)})


@cache
def shipped_forest() -> Forest:
    """The forest that `python -m data_pipeline.extract.train` made."""
    return Forest.load(SHIPPED)


@compiled
def _sum_of_leaves(rows, root, feature, threshold, children, leaf):  # type: ignore[no-untyped-def]
    sums = np.zeros(len(rows), dtype=np.float32)
    for start in root:
        for index in range(len(rows)):
            at = start
            while at >= 0:
                at = children[at, int(rows[index, feature[at]] > threshold[at])]
            sums[index] += leaf[~at]
    return sums
