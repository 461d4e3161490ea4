"""Main text of real pages by `fast`, resiliparse and trafilatura: how right, and how fast.

    python -m bench.extraction [../shared/data] [--folds 5]

F1 is that of zyte's article-extraction-benchmark on its hand-made texts: multisets of runs of four
words; true and false positives and false negatives of a page divided by their sum; precision and
recall averaged over pages, F1 from the averages; the interval from pages drawn with replacement.
`fast` is judged by classifiers that saw no page of the sites they are judged on: sites fall into
folds, and each fold's pages are read by a classifier learned from the other folds.

Snippets are trafilatura's: the share of those that must be in the text and are (with), and of those
that must not and are (without). Speed is megabytes of HTML by CPU seconds over all pages in one
process, from bytes to text, with the shipped classifier. Exit code 1: F1 or speed of `fast` is too
low.
"""

import argparse
import platform
import random
import statistics
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from resiliparse.extract.html2text import extract_plain_text
from resiliparse.parse.html import HTMLTree

from data_pipeline.crawl import Page
from data_pipeline.extract import ExtractError, extract_text
from data_pipeline.extract.charset import decode
from data_pipeline.extract.labels import words
from data_pipeline.extract.main_content import main_text
from data_pipeline.extract.train import (
    HAND_MADE,
    SNIPPETS,
    Example,
    fit,
    read_examples,
    read_pages,
    read_rows,
    site,
)

DATA = Path(__file__).parents[2] / "shared" / "data"
SHINGLE = 4
RESAMPLES = 1000
REQUIRED_F1, REQUIRED_SPEED = 0.94, 40.0

Counts = tuple[float, float, float]
Extract = Callable[[Page], str]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, nargs="?", default=DATA)
    parser.add_argument("--folds", type=int, default=5)
    arguments = parser.parse_args()
    pages = read_pages(arguments.data)
    peers: dict[str, Extract] = {
        "fast": lambda page: _text(page, "fast"),
        "resiliparse": resiliparse_main,
        "accurate (trafilatura)": lambda page: _text(page, "accurate"),
    }
    texts, speeds = {}, {}
    for name, extract in peers.items():
        texts[name], speeds[name] = timed(extract, pages)
    texts["fast"] = cross_validated(pages, read_examples(arguments.data), arguments.folds)
    peer_names = ("resiliparse", "trafilatura", "numba", "lightgbm")
    versions = ", ".join(f"{name} {version(name)}" for name in peer_names)
    print(f"Python {platform.python_version()}, {versions}")
    print(f"{len(pages)} pages, {_megabytes(pages):.0f} MB; {arguments.folds} folds of sites\n")
    print("| | F1 | 95 % | precision | recall | with | without | MB HTML/s |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    f1 = {name: print_row(arguments.data, name, texts[name], speeds[name]) for name in peers}
    return 0 if f1["fast"] >= REQUIRED_F1 and speeds["fast"] >= REQUIRED_SPEED else 1


def print_row(data: Path, name: str, texts: Mapping[str, str], speed: float) -> float:
    """Print what a table says of one way to extract, and return its F1."""
    hand_made = read_rows(data / HAND_MADE)
    counts = [compare(row["articleBody"], texts[page]) for page, row in hand_made.items()]
    f1, precision, recall = score(counts)
    low, high = interval(counts)
    snippets = read_rows(data / SNIPPETS)
    wanted, unwanted = (
        share_kept({page: row[kind] for page, row in snippets.items()}, texts)
        for kind in ("with", "without")
    )
    print(
        f"| {name} | {f1:.3f} | {low:.3f}-{high:.3f} | {precision:.3f} | {recall:.3f} "
        f"| {wanted:.3f} | {unwanted:.3f} | {speed:.1f} |"
    )
    return f1


def _text(page: Page, mode: str) -> str:
    try:
        return extract_text(page, mode)  # type: ignore[arg-type]
    except ExtractError:
        return ""


def resiliparse_main(page: Page) -> str:
    """resiliparse's main content, behind the same decoder as the other two."""
    tree = HTMLTree.parse(decode(page.body, page.charset).replace("\0", ""))
    return str(extract_plain_text(tree, main_content=True, alt_texts=False))


def _megabytes(pages: Sequence[Page]) -> float:
    return sum(len(page.body) for page in pages) / 1e6


def timed(extract: Extract, pages: Sequence[Page]) -> tuple[dict[str, str], float]:
    """Texts by page id, and megabytes of HTML in a CPU second."""
    extract(pages[0])  # imports, and loads compiled code
    start = time.process_time()
    texts = {page.id: extract(page) for page in pages}
    return texts, _megabytes(pages) / (time.process_time() - start)


def cross_validated(
    pages: Sequence[Page], examples: Sequence[Example], folds: int
) -> dict[str, str]:
    """The text of each page by a classifier that has seen no page of its site."""
    texts: dict[str, str] = {}
    for fold in range(folds):
        forest = fit([example for example in examples if fold_of(example.site, folds) != fold])
        for page in pages:
            if fold_of(site(page.url), folds) == fold:
                decoded = decode(page.body, page.charset).replace("\0", "")
                texts[page.id] = main_text(decoded, forest)
    return texts


def fold_of(name: str, folds: int) -> int:
    return zlib.crc32(name.encode()) % folds


def compare(true: str, found: str) -> Counts:
    """True positives, false positives and false negatives, as shares of their sum."""
    expected, given = _shingles(true), _shingles(found)
    counts = ((expected & given).total(), (given - expected).total(), (expected - given).total())
    total = sum(counts)
    return (counts[0] / total, counts[1] / total, counts[2] / total) if total else (0.0, 0.0, 0.0)


def _shingles(text: str) -> Counter[tuple[str, ...]]:
    """Runs of four words; a shorter text is one run."""
    sequence = words(text)
    last = max(1, len(sequence) - SHINGLE + 1)
    return Counter(tuple(sequence[at : at + SHINGLE]) for at in range(last) if sequence)


def score(counts: Sequence[Counts]) -> tuple[float, float, float]:
    """F1, precision and recall; a page without text found, or without any to find, has no say."""
    precision = statistics.fmean(tp / (tp + fp) for tp, fp, _ in counts if tp + fp)
    recall = statistics.fmean(tp / (tp + fn) for tp, _, fn in counts if tp + fn)
    return 2 * precision * recall / (precision + recall), precision, recall


def interval(counts: Sequence[Counts]) -> tuple[float, float]:
    """95 % of F1 over pages drawn with replacement."""
    draws = random.Random(0)
    scores = sorted(score(draws.choices(counts, k=len(counts)))[0] for _ in range(RESAMPLES))
    return scores[round(0.025 * RESAMPLES)], scores[round(0.975 * RESAMPLES) - 1]


def share_kept(snippets: Mapping[str, Sequence[str]], texts: Mapping[str, str]) -> float:
    kept = [
        f" {' '.join(words(snippet))} " in f" {' '.join(words(texts[page]))} "
        for page, of_page in snippets.items()
        for snippet in of_page
    ]
    return statistics.fmean(kept)


if __name__ == "__main__":
    sys.exit(main())
