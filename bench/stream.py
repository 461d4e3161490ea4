"""Tokens per CPU second through the whole stream, from local shards to rows ready to train on.

    python -m bench.stream [--megatron PYTHON] [--mosaicml PYTHON] [--tokens N]

Documents have log-normal lengths around 700 tokens and a Pareto tail, the same for all. farspan's
number has everything in it: the mixture of 1, 3 and 10 sources, the permutation, the packing, the
copy of tokens, labels and positions, and each shard's sha256 before its first use. The peers
read the documents of the single source: webdataset the same tars (shuffle buffer 1000),
mosaicml-streaming and megatron-core, where a PYTHON has them, their own files, whose index is made
before the clock starts. Each runs in a process of its own, in three rounds; the middle one counts.
Exit code 1: below 40 million tokens per CPU second.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from data_pipeline.shards.writer import write_token_shards
from data_pipeline.stream import Source, TokenStream
from data_pipeline.tokenize import train_tokenizer

ROOT = Path(__file__).parents[1]
VOCABULARY, SEQ_LEN, ROWS = 4096, 4096, 128
COUNTS, ROUNDS, REQUIRED = (1, 3, 10), 3, 40.0
TOKENS_PER_SHARD = 1 << 22


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megatron", type=Path, metavar="PYTHON", help="has megatron-core")
    parser.add_argument("--mosaicml", type=Path, metavar="PYTHON", help="has mosaicml-streaming")
    parser.add_argument("--tokens", type=int, default=64_000_000)
    options = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, Python {platform.python_version()}")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make(root, options.tokens)
        own = {count: [sys.executable, __file__, str(root), str(count)] for count in COUNTS}
        commands = {f"farspan, {count} sources": command for count, command in own.items()}
        peers = {
            "webdataset": sys.executable,
            "mosaicml": options.mosaicml,
            "megatron": options.megatron,
        }
        for peer, python in peers.items():
            if python:
                script = [str(ROOT / "bench" / "stream_peers.py"), peer, str(root / "1" / "0")]
                rows = options.tokens // SEQ_LEN // (4 if peer == "megatron" else 16)
                commands[peer] = [str(python), *script, str(rows), str(SEQ_LEN)]
        speeds: dict[str, list[float]] = {name: [] for name in commands}
        run(own[1])  # compiles, once on a machine
        for _ in range(ROUNDS):
            for name, command in commands.items():
                speeds[name].append(run(command))
    middle = {name: statistics.median(found) for name, found in speeds.items()}
    first = middle["farspan, 1 sources"]
    for name, speed in middle.items():
        spread = f"{min(speeds[name]):.1f} to {max(speeds[name]):.1f}"
        print(f"{name:20} {speed:8.1f} Mtok/CPU s ({spread}), {first / speed:6.1f} x slower")
    return int(min(speed for name, speed in middle.items() if "farspan" in name) < REQUIRED)


def run(command: list[str]) -> float:
    """Million tokens per CPU second."""
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
    tokens, seconds = done.stdout.split()[-2:]
    return float(tokens) / float(seconds) / 1e6


def make(root: Path, tokens: int) -> None:
    """ROOT/COUNT/NUMBER: the documents in so many sources."""
    train_tokenizer([], 300, root / "small.json")
    tree = json.loads((root / "small.json").read_text())
    # As large a vocabulary as ids are drawn from.
    known = len(tree["model"]["vocab"]) + 1
    tree["model"]["vocab"] |= {f"word{n}": n for n in range(known, VOCABULARY)}
    tokenizer = root / "tokenizer.json"
    tokenizer.write_text(json.dumps(tree))
    write_token_shards([("0", next(draw(1)))], tokenizer, root / "small", extra={})
    for count in COUNTS:
        for number in range(count):
            documents = islice(draw(tokens), number, None, count)
            named = ((str(i), document) for i, document in enumerate(documents))
            write_token_shards(
                named,
                tokenizer,
                root / str(count) / str(number),
                tokens_per_shard=TOKENS_PER_SHARD,
                extra={},
            )
    single = list(draw(tokens))
    np.save(root / "1" / "0" / "tokens.npy", np.concatenate(single))
    np.save(root / "1" / "0" / "lengths.npy", np.array([len(document) for document in single]))


def draw(tokens: int) -> Iterator[np.ndarray]:
    """Documents of random ids, and 0 at the end of each."""
    random = np.random.default_rng(0)
    made = 0
    while made < tokens:
        is_long = random.random() < 0.02
        length = 4000 * (1 + random.pareto(1.5)) if is_long else random.lognormal(6.3, 0.8)
        document = random.integers(1, VOCABULARY, int(np.clip(length, 2, 1 << 20)), np.uint16)
        document[-1] = 0
        made += len(document)
        yield document


def measure(root: Path, count: int) -> None:
    """One epoch's tokens, by weights in proportion to 1, 2, 3..."""
    small = TokenStream([Source(str(root / "small"))], SEQ_LEN, seed=0)
    small.read(small.next_batch(1), [0])
    began = time.process_time()
    sources = [Source(str(root / str(count) / str(n)), 1.0 + n) for n in range(count)]
    stream = TokenStream(sources, SEQ_LEN, seed=0)
    batches = stream.total_tokens // (ROWS * SEQ_LEN)
    for _ in range(batches):
        stream.read(stream.next_batch(ROWS), range(ROWS))
    print(batches * ROWS * SEQ_LEN, time.process_time() - began)


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[2].isdecimal() and not sys.argv[1].startswith("-"):
        measure(Path(sys.argv[1]), int(sys.argv[2]))
    else:
        raise SystemExit(main())
