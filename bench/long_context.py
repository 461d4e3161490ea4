"""Steps on rows far longer than what is computed at a time: their memory and their time.

    python -m bench.long_context [--softmax] [--longest]

Steps of the recipe million-cpu on two processes that share each segment, at several lengths of the
row up to 1M tokens; `--longest` goes on to 4M. `--softmax` also takes the same model with full
attention in place of its window, up to 128k. Times are CPU seconds of the slower process, of the
second step, or the first where a step has more than 2^17 tokens; beside them seconds by the clock.
Memory is the resident peak of both processes together. Exit code 1: a requirement is missed.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch

from bench.gated_delta import cpu_model
from bench.parallel_step import write_documents
from bench.ranks import run_on_ranks

RANKS, SEGMENT = 2, 8192
K, M = 1 << 10, 1 << 20
LENGTHS = {"sliding": [64 * K, 128 * K, M], "softmax": [64 * K, 128 * K]}
LONGEST = 4 * M
# Of a step of 1M tokens: seconds, GiB, peak over that of 128k, time per token over that of 64k.
REQUIRED = {"s": 900.0, "GiB": 8.0, "peak": 1.2, "time": 1.3}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.long_context")
    parser.add_argument("--softmax", action="store_true", help="the same with full attention")
    parser.add_argument("--longest", action="store_true", help=f"with {LONGEST} tokens")
    arguments = parser.parse_args()
    print(f"{cpu_model()}; torch {torch.__version__}; {RANKS} processes of one thread\n")
    is_met = meets(table("sliding", LENGTHS["sliding"] + [LONGEST] * arguments.longest))
    if arguments.softmax:
        table("softmax", LENGTHS["softmax"])
    return int(not is_met)


def table(last_layer: str, lengths: list[int]) -> dict[int, dict[str, float]]:
    """Measure and print; by length."""
    print(f"### Three linear layers and a {last_layer} one\n")
    print("| tokens | segments | CPU s | us per token | s by the clock | GiB together | loss |")
    print("|---:|---:|---:|---:|---:|---:|---:|")
    measured = {}
    for length in lengths:
        with tempfile.TemporaryDirectory() as folder:
            shards = write_documents(Path(folder), length)
            arguments = (last_layer, str(length), str(shards), folder)
            if run_on_ranks(RANKS, "bench.long_context_step", *arguments):
                sys.exit("a process failed")
            ranks = [json.loads((Path(folder) / f"{n}.json").read_text()) for n in range(RANKS)]
        found = {
            "cpu_s": max(rank["cpu_s"] for rank in ranks),
            "s": max(rank["s"] for rank in ranks),
            "GiB": sum(rank["gib"] for rank in ranks),
        }
        measured[length] = found
        print(
            f"| {length} | {length // SEGMENT} | {found['cpu_s']:.1f} | "
            f"{1e6 * found['cpu_s'] / length:.0f} | {found['s']:.1f} | {found['GiB']:.2f} | "
            f"{ranks[0]['loss']:.4f} |",
            flush=True,
        )
    print()
    return measured


def meets(measured: dict[int, dict[str, float]]) -> bool:
    million = measured[M]
    reached = {
        "s": million["s"],
        "GiB": million["GiB"],
        "peak": million["GiB"] / measured[128 * K]["GiB"],
        "time": million["cpu_s"] / M / (measured[64 * K]["cpu_s"] / (64 * K)),
    }
    print("| of a step of 1M tokens | reached | required |\n|---|---:|---:|")
    names = {
        "s": "seconds",
        "GiB": "GiB",
        "peak": "peak / that of 128k",
        "time": "time per token / that of 64k",
    }
    for key, name in names.items():
        print(f"| {name} | {reached[key]:.2f} | {REQUIRED[key]:g} |")
    return all(reached[key] <= limit for key, limit in REQUIRED.items())


if __name__ == "__main__":
    sys.exit(main())
