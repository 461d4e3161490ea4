"""What a persistent index costs, dump after dump, against doing everything again.

    pip install datasketch
    python -m bench.index [--documents 50000] [--memory 100MB] [--skip-datasketch]

Eight dumps of equal size, of the documents of `bench.dedup` (500 characters, 76 shingles) in a
random order, so that a twin is mostly in another dump. Each dump is added in a process of its own;
beside it stand a deduplication of all dumps so far, in memory and with all texts read again, and
datasketch's MinHashLSH, which stays in the memory of one process that sees each dump once (and
verifies nothing). Seconds are of CPU, of the whole process less those of a run over a hundred
documents; of datasketch, of the dump alone. Memory is the peak of the process. Bytes are those of
the index per document, with and without the shingles.

Exit code 1: the index does not have the outcome of one run over all dumps, its process takes a
quarter more memory for the last dump than for the second, or the last dump costs more CPU than
doing everything again.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from bench.dedup import BANDS, ROWS, THRESHOLD, shingles, write_documents

DUMPS = 8
SHOWN = (1, 2, 4, 8)
MEMORY_GROWTH = 1.25


def write_dumps(folder: Path, documents: str, inputs: Sequence[Path]) -> None:
    """Dumps of so many documents, and one of a hundred to warm up with."""
    whole = folder / "whole.parquet"
    rows = int(documents)
    write_documents(whole, len(inputs) * rows)
    table = pq.read_table(whole, columns=["id", "text"])
    table = table.take(np.random.default_rng(1).permutation(len(table)))
    for number, path in enumerate(inputs):
        pq.write_table(table.slice(number * rows, rows), path, row_group_size=10_000)
    pq.write_table(table.slice(0, 100), folder / "few.parquet")


def add_dump(folder: Path, memory: str, inputs: Sequence[Path]) -> None:
    from data_pipeline.dedup.index import checked_settings, deduplicate_with_index, parse_memory

    deduplicate_with_index(
        inputs,
        folder / "out",
        folder / "ix",
        checked_settings(THRESHOLD, BANDS, ROWS, 5, "longest"),
        memory=parse_memory(memory),
    )


def all_again(folder: Path, memory: str, inputs: Sequence[Path]) -> None:
    from data_pipeline.dedup import deduplicate

    deduplicate(inputs, folder / "again")


def datasketch_dumps(folder: Path, memory: str, inputs: Sequence[Path]) -> None:
    """Prints the seconds and the peak memory after each dump."""
    from datasketch import MinHash, MinHashLSH

    index = MinHashLSH(num_perm=BANDS * ROWS, params=(BANDS, ROWS))
    for path in inputs:
        start = time.process_time()
        for row in pq.read_table(path).to_pylist():
            signature = MinHash(num_perm=BANDS * ROWS)
            signature.update_batch([shingle.encode() for shingle in shingles(row["text"])])
            index.query(signature)
            index.insert(row["id"], signature)
        lines = Path("/proc/self/status").read_text().splitlines()
        peak = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
        print(json.dumps([time.process_time() - start, peak / 1e3]), flush=True)


PARTS = {
    "write": write_dumps,
    "index": add_dump,
    "again": all_again,
    "datasketch": datasketch_dumps,
}


def run_apart(
    part: str, folder: Path, setting: str, inputs: Sequence[Path]
) -> tuple[float, float, str]:
    """Seconds of CPU and peak megabytes of a process of its own, and what it prints."""
    command = [sys.executable, "-m", "bench.index", "--part", part, str(folder), setting]
    process = subprocess.Popen([*command, *map(str, inputs)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{part} failed with exit code {process.returncode}")
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1e3, output


def index_bytes(folder: Path) -> tuple[int, int]:
    """Bytes of an index, and of its shingles."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    sizes = {path: path.stat().st_size for path in files}
    return sum(sizes.values()), sum(sizes[path] for path in files if path.name == "shingles")


def same_outcome(folder: Path) -> bool:
    """Whether the index has what the run over all dumps has."""
    from data_pipeline.dedup.index import export_clusters

    export_clusters(folder / "ix", folder / "all.parquet")
    one, many = (
        pq.read_table(path).select(["id", "kept", "exact", "twin", "jaccard", "cluster"])
        for path in (folder / "again/clusters.parquet", folder / "all.parquet")
    )
    clusters = [
        np.unique(table["cluster"].to_numpy(), return_inverse=True)[1] for table in (one, many)
    ]
    pairs = zip(one.columns[:-1], many.columns[:-1], strict=True)
    return bool((clusters[0] == clusters[1]).all()) and all(
        a.to_pylist() == b.to_pylist() for a, b in pairs
    )


def report(folder: Path, documents: int, memory: str, with_datasketch: bool) -> bool:
    dumps = [folder / f"dump-{number}.parquet" for number in range(DUMPS)]
    # Apart, as the peak of a process counts from that of the one that starts it.
    run_apart("write", folder, str(documents), dumps)
    few = [folder / "few.parquet"]
    for name in ("index", "again"):
        run_apart(name, folder / "compiles", memory, few)
    start = {name: run_apart(name, folder / "start", memory, few)[0] for name in ("index", "again")}
    peers = []
    if with_datasketch:
        output = run_apart("datasketch", folder, memory, dumps)[2]
        peers = [json.loads(line) for line in output.splitlines()]
    print(
        f"Dumps of {documents:,} documents, --memory {memory}, one thread\n\n"
        "| dumps | bytes a document | without shingles | adding the last: s | MB "
        "| all again: s | MB | datasketch, the last: s | MB |\n"
        "|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
        flush=True,
    )
    peaks, is_faster = [], True
    for number, dump in enumerate(dumps, 1):
        seconds, peak, _ = run_apart("index", folder, memory, [dump])
        peaks.append(peak)
        if number not in SHOWN:
            continue
        again, again_peak, _ = run_apart("again", folder, memory, dumps[:number])
        size, of_shingles = (count / number / documents for count in index_bytes(folder / "ix"))
        cells = [f"{value:.1f} | {mb:.0f}" for value, mb in peers[number - 1 : number]] or ["| "]
        print(
            f"| {number} | {size:.0f} | {size - of_shingles:.0f} "
            f"| {seconds - start['index']:.1f} | {peak:.0f} "
            f"| {again - start['again']:.1f} | {again_peak:.0f} | {cells[0]} |",
            flush=True,
        )
        is_faster = seconds - start["index"] < again - start["again"]
    is_same = same_outcome(folder)
    print(f"\nThe outcome is {'' if is_same else 'NOT '}that of one run over all dumps.")
    return is_same and is_faster and peaks[-1] < MEMORY_GROWTH * peaks[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, default=50_000, help="of a dump")
    parser.add_argument("--memory", default="100MB")
    parser.add_argument("--skip-datasketch", action="store_true")
    parser.add_argument("--part", nargs="+", metavar="PART FOLDER MEMORY INPUT")
    options = parser.parse_args()
    if options.part:
        part, folder, memory, *inputs = options.part
        PARTS[part](Path(folder), memory, [Path(name) for name in inputs])
        return 0
    with tempfile.TemporaryDirectory() as name:
        is_good = report(Path(name), options.documents, options.memory, not options.skip_datasketch)
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
