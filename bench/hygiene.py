"""Hygiene of texts: how fast each check is, and how right the masks are.

    python -m bench.hygiene [--megabytes 20] [--examples 100000]

Speed is megabytes of UTF-8 by CPU seconds in one process, over synthetic pages of 3 kB without
anything to find and over the same pages with one personal thing each. Decontamination is asked
about evaluation sets of `--examples` texts of 60 words. Hostile texts are 1 MB each, made of one
piece; the slowest is shown. Precision and recall are those of the marked texts of the tests, which
are written from the formats' specifications; other kinds of page have other numbers. Exit code 1:
masks at less than 100 MB/s on clean pages, decontamination at less than 20, or precision or recall
below .95.
"""

import argparse
import json
import platform
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from data_pipeline.hygiene.blocklist import UrlBlocklist, WordBlocklist
from data_pipeline.hygiene.decontamination import Decontamination
from data_pipeline.hygiene.privacy import Privacy
from tests.unit.data_pipeline.hygiene.cases import KINDS, score

PAGE_WORDS = 550
REQUIRED = {"masks, clean pages": 100.0, "decontamination": 20.0}
REQUIRED_SCORE = 0.95
PERSONAL = ("ann@example.org", "93.184.216.34", "+49 30 901820", "4111 1111 1111 1111")
HOSTILE = ("a@", "1-", "::", "1.", "01 ", "4111 ", "a@a.", '"@a.com ', "1   ", "93.184.216.34 ")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=20)
    parser.add_argument("--examples", type=int, default=100_000)
    arguments = parser.parse_args()
    draw = random.Random(1)
    clean = make_pages(draw, arguments.megabytes * 1_000_000)
    personal = [f"{page} {draw.choice(PERSONAL)}" for page in clean]
    masks = Privacy(email="<EMAIL>", ip_address="<IP>", phone="<PHONE>", card="<CARD>")
    with tempfile.TemporaryDirectory() as folder:
        sites, words, evaluation = make_lists(draw, Path(folder), arguments.examples)
        urls = [f"https://www.{word(draw)}{word(draw)}.example/a/{i}" for i in range(200_000)]
        speeds = {
            "masks, clean pages": speed(masks.mask, clean),
            "masks, one in each page": speed(masks.mask, personal),
            "word blocklist": speed(words.judge, clean),
            "decontamination": speed(evaluation.judge, clean),
        }
        per_second = speed(sites.judge, urls) / (sum(map(len, urls)) / len(urls) / 1e6)
    print(
        f"Python {platform.python_version()}, {len(clean)} pages, {arguments.examples} examples\n"
    )
    print("| | MB/s |\n|---|---:|")
    for name, value in speeds.items():
        print(f"| {name} | {value:.0f} |")
    slowest = min(
        (speed(masks.mask, [piece * (1_000_000 // len(piece))]), piece) for piece in HOSTILE
    )
    print(f"| masks, 1 MB of {slowest[1]!r} | {slowest[0]:.1f} |")
    print(f"\nURL blocklist: {per_second / 1e6:.2f} million addresses a second")
    print("\n| kind | cases | precision | recall |\n|---|---:|---:|---:|")
    scores = {kind: score(kind) for kind in KINDS}
    for kind, found in scores.items():
        marked = found.right + found.missed
        print(f"| {kind} | {marked} | {found.precision:.3f} | {found.recall:.3f} |")
    is_fast = all(speeds[name] >= least for name, least in REQUIRED.items())
    is_right = all(min(s.precision, s.recall) >= REQUIRED_SCORE for s in scores.values())
    return 0 if is_fast and is_right else 1


def word(draw: random.Random) -> str:
    return "".join(draw.choices("etaoinshrdlucmfwypvbgk", k=draw.randint(2, 9)))


def make_pages(draw: random.Random, size: int) -> list[str]:
    """Pages with the numbers and dates that pages have, about `size` bytes in all."""
    words = [word(draw) for _ in range(20_000)]
    words += [str(number) for number in range(1900, 2100)] + ["12", "3.5", "1,200", "12:30"] * 20
    words += ["12.05.2014", "2014-05-12", "2012-2014", "naïve", "größer", "–"] * 10
    pages = []
    while size > 0:
        lines = [
            " ".join(draw.choices(words, k=50)).capitalize() + "." for _ in range(PAGE_WORDS // 50)
        ]
        pages.append("\n".join(lines))
        size -= len(pages[-1].encode())
    return pages


def make_lists(
    draw: random.Random, folder: Path, examples: int
) -> tuple[UrlBlocklist, WordBlocklist, Decontamination]:
    names = {f"{word(draw)}{word(draw)}.example" for _ in range(100_000)}
    (folder / "sites.txt").write_text("\n".join(sorted(names)))
    listed = {f"x{word(draw)} {word(draw)}" for _ in range(500)}
    (folder / "words.txt").write_text("\n".join(sorted(listed)))
    with (folder / "evaluation.jsonl").open("w") as file:
        for _ in range(examples):
            file.write(json.dumps({"text": " ".join(word(draw) for _ in range(60))}) + "\n")
    return (
        UrlBlocklist(files=(Path("sites.txt"),)).with_files(folder),
        WordBlocklist(files=(Path("words.txt"),), min_entries=1, min_share=None).with_files(folder),
        Decontamination(files=(Path("evaluation.jsonl"),), ngram=13, min_words=8).with_files(
            folder
        ),
    )


def speed(check: Callable[[str], object], texts: Sequence[str]) -> float:
    """Megabytes of texts by CPU second, without compilation."""
    check(texts[0][:100])
    start = time.process_time()
    for text in texts:
        check(text)
    seconds = time.process_time() - start
    return sum(len(text.encode()) for text in texts) / 1e6 / seconds


if __name__ == "__main__":
    sys.exit(main())
