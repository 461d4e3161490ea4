"""Learn which blocks are main text, and write the classifier that `extract` ships.

    python -m data_pipeline.extract.train ../shared/data

The folder holds real pages and what others say their main text is: hand-made texts for a few,
snippets that must or must not be in it for many, the output of Readability.js for some.
trafilatura says it for each page without a hand-made text. The result has learned numbers only,
nothing of a page, and is the same on every run.
"""

import argparse
import gzip
import html
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import trafilatura
from numpy.typing import NDArray

from data_pipeline.crawl import Archive, Page, find_archives
from data_pipeline.extract.blocks import Blocks
from data_pipeline.extract.charset import decode
from data_pipeline.extract.features import Matrix, block_features
from data_pipeline.extract.forest import SHIPPED, Forest
from data_pipeline.extract.labels import coverage, words
from data_pipeline.extract.main_content import block_texts, blocks_of

PAGES = "pages-dev.warc.gz"
HAND_MADE = "extraction-gt-full.jsonl.gz"
SNIPPETS = "extraction-gt-snippets.jsonl.gz"
READABILITY = "extraction-gt-readability.jsonl.gz"

ROUNDS = 100
SETTINGS = {
    "objective": "cross_entropy",
    "num_leaves": 15,
    "learning_rate": 0.12,
    "max_bin": 63,
    "min_data_in_leaf": 60,
    "lambda_l2": 5.0,
    "feature_fraction": 0.3,
    "bagging_fraction": 0.7,
    "bagging_freq": 1,
    "seed": 1,
    "num_threads": 1,
    "deterministic": True,
    "force_row_wise": True,
    "verbose": -1,
}
# What one page weighs in training; what a snippet says weighs twice as much as a guess.
HAND_MADE_WEIGHT, SNIPPET_WEIGHT = 4.0, 2.0
MIN_SNIPPET_SHARE = 0.5

INLINE_TAG = re.compile(
    r"</?(?:a|abbr|b|cite|code|em|font|i|mark|q|small|span|strong|sub|sup|time|u)\b[^>]*>"
)
TAG = re.compile(r"<[^>]+>")
SECOND_LEVEL = frozenset(["ac", "co", "com", "edu", "gob", "gov", "go", "ne", "net", "or", "org"])


@dataclass(frozen=True)
class Example:
    """A page to learn from: a row, a target from 0 to 1 and a weight for each of its blocks."""

    id: str
    site: str
    rows: Matrix
    targets: NDArray[np.float64]
    weights: NDArray[np.float64]


def site(url: str) -> str:
    """The domain that a site registered, near enough: news.example.co.uk is of example.co.uk."""
    labels = (urlsplit(url).hostname or "").split(".")
    is_second_level = len(labels) > 2 and labels[-2] in SECOND_LEVEL
    return ".".join(labels[-3:] if is_second_level else labels[-2:])


def read_pages(data: Path) -> list[Page]:
    (archive,) = find_archives([str(data / PAGES)])
    documents = Archive(archive, id_header="X-Page-Id")
    return [document for document in documents if isinstance(document, Page)]


def read_rows(path: Path) -> dict[str, dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return {row["id"]: row for row in map(json.loads, file)}


def read_examples(data: Path) -> list[Example]:
    """Every page of the folder with what is known of its blocks."""
    hand_made = read_rows(data / HAND_MADE)
    snippets = read_rows(data / SNIPPETS)
    readability = read_rows(data / READABILITY)
    examples = []
    for page in read_pages(data):
        decoded = decode(page.body, page.charset).replace("\0", "")
        if page.id in hand_made:
            references = [hand_made[page.id]["articleBody"]]
        else:
            references = [_trafilatura(decoded, False), _trafilatura(decoded, True)]
        if page.id in readability:
            references.append(_plain(readability[page.id]["expected_html"]))
        example = _example(page, blocks_of(decoded), references, snippets.get(page.id))
        weight = HAND_MADE_WEIGHT if page.id in hand_made else 1.0
        examples.append(
            Example(page.id, example.site, example.rows, example.targets, weight * example.weights)
        )
    return examples


def _trafilatura(page: str, favors_precision: bool) -> str:
    text = trafilatura.extract(page, include_comments=False, favor_precision=favors_precision)
    return text or ""


def _plain(markup: str) -> str:
    return html.unescape(TAG.sub("\n", INLINE_TAG.sub("", markup)))


def _example(
    page: Page, blocks: Blocks, references: Sequence[str], snippets: dict[str, Any] | None
) -> Example:
    texts = block_texts(blocks)
    targets = np.mean([coverage(texts, reference) for reference in references], axis=0)
    weights = _weights(texts, targets)
    if snippets:
        known = _known_blocks(texts, snippets)
        is_known = ~np.isnan(known)
        targets = np.where(is_known, known, targets)
        weights = np.where(is_known, np.maximum(SNIPPET_WEIGHT * weights, 1), weights)
    return Example(page.id, site(page.url), block_features(blocks), targets, weights)


def _weights(texts: Sequence[str], targets: NDArray[np.float64]) -> NDArray[np.float64]:
    """A page weighs 100 in all; a block by its words, 0 where it has none."""
    weights = np.where(np.isnan(targets), 0.0, [len(words(text)) + 1 for text in texts])
    return 100 * weights / max(weights.sum(), 1.0)


def _known_blocks(texts: Sequence[str], snippets: dict[str, Any]) -> NDArray[np.float64]:
    """1 for a block with a snippet that must be there, 0 for one that mostly is an unwanted one."""
    known = np.full(len(texts), np.nan)
    of_block = [f" {' '.join(words(text))} " for text in texts]
    for snippet in snippets["without"]:
        phrase = f" {' '.join(words(snippet))} "
        for index, block in enumerate(of_block):
            if phrase in block and len(phrase) >= MIN_SNIPPET_SHARE * len(block):
                known[index] = 0
    for snippet in snippets["with"]:
        phrase = f" {' '.join(words(snippet))} "
        holders = [index for index, block in enumerate(of_block) if phrase in block]
        if len(holders) == 1:
            known[holders[0]] = 1
    return known


def fit(examples: Iterable[Example]) -> Forest:
    """Boost trees on the blocks of all examples, by LightGBM."""
    import lightgbm  # for development only; what reads examples does without

    examples = [example for example in examples if len(example.rows)]
    weights = np.concatenate([example.weights for example in examples])
    rows = np.concatenate([example.rows for example in examples])[weights > 0]
    targets = np.concatenate([example.targets for example in examples])[weights > 0]
    weights = weights[weights > 0]
    data = lightgbm.Dataset(rows, targets.clip(0, 1), weight=weights / weights.mean())
    booster = lightgbm.train(SETTINGS, data, num_boost_round=ROUNDS)
    return _as_arrays(tree["tree_structure"] for tree in booster.dump_model()["tree_info"])


def _as_arrays(trees: Iterable[dict[str, Any]]) -> Forest:
    roots: list[int] = []
    splits: list[tuple[int, float, int, int]] = []
    leaves: list[float] = []

    def add(node: dict[str, Any]) -> int:
        if "leaf_value" in node:
            leaves.append(node["leaf_value"])
            return ~(len(leaves) - 1)
        at = len(splits)
        splits.append((0, 0.0, 0, 0))
        left, right = add(node["left_child"]), add(node["right_child"])
        splits[at] = (node["split_feature"], node["threshold"], left, right)
        return at

    for tree in trees:
        roots.append(add(tree))  # noqa: PERF401  add() has effects, in this order
    feature, threshold, left, right = zip(*splits, strict=True)
    return Forest(
        root=np.array(roots, dtype=np.int32),
        feature=np.array(feature, dtype=np.int32),
        threshold=_round_down(threshold),
        children=np.array([left, right], dtype=np.int32).T.copy(),
        leaf=np.array(leaves, dtype=np.float32),
    )


def _round_down(thresholds: Sequence[float]) -> NDArray[np.float32]:
    """To float32 such that a float32 is on the same side of a threshold as before."""
    exact = np.array(thresholds)
    rounded = exact.astype(np.float32)
    return np.where(rounded > exact, np.nextafter(rounded, np.float32(-np.inf)), rounded)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="folder with the pages and their references")
    parser.add_argument("--out", type=Path, default=SHIPPED, help="file to write")
    arguments = parser.parse_args()
    fit(read_examples(arguments.data)).save(arguments.out)


if __name__ == "__main__":
    main()
