"""How fast near-duplicates are found, against Daft, rensa and datasketch.

    pip install rensa datasketch
    python -m bench.dedup [--documents 100000] [--skip-large]

Kernel: MinHash signatures of 112 word 5-grams, from Python strings, of documents of 500 and of
5,000 characters: lower-casing, words, shingles, hashes and minima; MB of UTF-8 per second of CPU
time, median of 3. Daft splits at spaces instead of `\\w+`; rensa and datasketch get shingles made
by `re` and `zip`, which counts, as nothing they ship makes them.

Whole: Parquet in, Parquet with the kept documents out, a process for each number, by the clock
without imports and compilation, and the peak memory of the process. Daft's recipe is MinHash,
bands, groups and the documents that are left; it verifies nothing, and as it has no connected
components these are made in Python from its groups. It uses all processors.

The documents are made at run time: random words, of which every tenth document has an exact and
four others a near twin of known Jaccard similarity. Exit code 1: the kernel is slower than 60 MB/s,
two workers take longer than Daft or ten times the documents longer than twelve times that, a pair
below the threshold is joined, or fewer pairs above it are found than 14 bands of 8 rows promise.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

MEGABYTES_PER_SECOND = 60
TIMES_DAFT = 12
BANDS, ROWS, NGRAM = 14, 8, 5
THRESHOLD = 0.8
REPEATS = 3
WORDS_PER_DOCUMENT = 80
KERNEL_BYTES = 10_000_000
CHUNK = 10_000


def make_texts(number: int, words: int, seed: int) -> list[str]:
    random = np.random.default_rng(seed)
    vocabulary = make_vocabulary()
    return [
        " ".join(vocabulary[ids]) for ids in random.integers(0, len(vocabulary), (number, words))
    ]


def make_vocabulary() -> np.ndarray:
    """Different words of 2 to 9 letters, so that a document of 80 has about 500 characters."""
    random = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    lengths = random.integers(2, 10, 60_000)
    words = sorted({"".join(random.choice(letters, length)) for length in lengths})
    return np.array([word.title() if i % 10 == 0 else word for i, word in enumerate(words)], object)


def write_documents(path: Path, documents: int) -> None:
    """Groups of ten documents: five alone, an exact pair less one, four of two near pairs.

    The column `twin` is the place of the document that one was made from, or -1; `similarity`
    theirs. A near twin begins as its original does and goes on with words of its own.
    """
    vocabulary = make_vocabulary()
    shingles = WORDS_PER_DOCUMENT - NGRAM + 1
    with pq.ParquetWriter(path, SCHEMA) as writer:
        for start in range(0, documents, CHUNK):
            random = np.random.default_rng([1, start])
            ids = random.integers(0, len(vocabulary), (CHUNK, WORDS_PER_DOCUMENT))
            twin = np.full(CHUNK, -1)
            similarity = np.zeros(CHUNK)
            for copy, original in ((5, 0), (6, 1), (7, 2)):
                twin[copy::10] = np.arange(original, CHUNK, 10)
                shared = np.full(CHUNK // 10, shingles)
                if copy > 5:
                    wanted = random.uniform(0.5, 1, CHUNK // 10)
                    shared = np.round(2 * shingles * wanted / (1 + wanted)).astype(int)
                same = np.arange(WORDS_PER_DOCUMENT) < shared[:, None] + NGRAM - 1
                own = np.where(ids[copy::10] == ids[original::10], 0, ids[copy::10])
                ids[copy::10] = np.where(same, ids[original::10], own)
                similarity[copy::10] = shared / (2 * shingles - shared)
            order = random.permutation(CHUNK)
            place = np.argsort(order)
            texts = [" ".join(vocabulary[ids[i]]) for i in order]
            columns = {
                "id": [f"document-{start + i}" for i in range(CHUNK)],
                "text": texts,
                "twin": np.where(twin[order] < 0, -1, start + place[twin[order]]),
                "similarity": similarity[order],
            }
            writer.write_table(pa.table(columns, SCHEMA))


SCHEMA = pa.schema(
    {"id": pa.string(), "text": pa.string(), "twin": pa.int64(), "similarity": pa.float64()}
)


def farspan_kernel(texts: list[str]) -> None:
    from data_pipeline.dedup.minhash import sign

    sign(pa.array(texts), bands=BANDS, rows=ROWS, ngram=NGRAM)


def daft_kernel(texts: list[str]) -> None:
    import daft
    from daft import col

    frame = daft.from_pydict({"text": texts})
    frame.select(daft_signature(col("text"))).collect()


def daft_signature(text: Any) -> Any:
    return text.lower().minhash(
        num_hashes=BANDS * ROWS, ngram_size=NGRAM, seed=1, hash_function="xxhash"
    )


def rensa_kernel(texts: list[str]) -> None:
    from rensa import RMinHash

    RMinHash.digest_matrix_from_token_sets([shingles(text) for text in texts], BANDS * ROWS, 1)


def datasketch_kernel(texts: list[str]) -> None:
    from datasketch import MinHash

    for text in texts:
        MinHash(num_perm=BANDS * ROWS).update_batch([s.encode() for s in shingles(text)])


def shingles(text: str) -> list[str]:
    words = re.findall(r"\w+", text.lower())
    return [" ".join(found) for found in zip(*(words[i:] for i in range(NGRAM)), strict=False)]


KERNELS: dict[str, Callable[[list[str]], None]] = {
    "farspan": farspan_kernel,
    "daft": daft_kernel,
    "rensa": rensa_kernel,
    "datasketch": datasketch_kernel,
}


def time_kernels(words: int) -> dict[str, float]:
    """MB of text per second of CPU time."""
    texts = make_texts(KERNEL_BYTES * WORDS_PER_DOCUMENT // 500 // words, words, seed=2)
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    times: dict[str, list[float]] = {name: [] for name in KERNELS}
    for kernel in KERNELS.values():
        kernel(texts[:10])
    for _ in range(REPEATS):
        for name, kernel in KERNELS.items():
            start = time.process_time()
            kernel(texts)
            times[name].append(time.process_time() - start)
    return {name: megabytes / median(seconds) for name, seconds in times.items()}


def farspan_whole(source: Path, out: Path, workers: int) -> dict[str, float]:
    from data_pipeline.dedup import deduplicate

    few = out.parent / "few.parquet"
    pq.write_table(pq.ParquetFile(source).read_row_group(0).slice(0, 100), few)
    deduplicate([few], out)  # compiles
    start = time.perf_counter()
    report = deduplicate([source], out, workers=workers)
    return {"seconds": time.perf_counter() - start, "kept": report.kept}


def daft_whole(source: Path, out: Path, workers: int) -> dict[str, float]:
    import daft
    from daft import col
    from daft.functions import chunk

    start = time.perf_counter()
    documents = daft.read_parquet(str(source))
    signature = daft_signature(col("text")).cast(daft.DataType.list(daft.DataType.uint32()))
    numbers = daft.lit(list(range(BANDS)))
    buckets = (
        documents.select("id", chunk(signature, ROWS).alias("band"), numbers.alias("number"))
        .explode("band", "number")
        .groupby("band", "number")
        .agg(col("id").list_agg().alias("ids"), col("id").count().alias("size"))
        .where(col("size") > 1)
        .select("ids")
        .to_pydict()["ids"]
    )
    dropped = [name for name, root in components(buckets) if name != root]
    twins = daft.from_pydict({"id": dropped})
    documents.join(twins, on="id", how="anti").write_parquet(str(out), write_mode="overwrite")
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "kept": documents.count_rows() - len(dropped)}


def components(buckets: list[list[str]]) -> Iterator[tuple[str, str]]:
    """Each document of a bucket and the root of its connected component."""
    parent: dict[str, str] = {}

    def find(name: str) -> str:
        while parent.setdefault(name, name) != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    for first, *others in buckets:
        for other in others:
            a, b = find(first), find(other)
            parent[max(a, b)] = min(a, b)
    for name in list(parent):
        yield name, find(name)


WHOLE = {"farspan": farspan_whole, "daft": daft_whole}


def run_apart(system: str, source: Path, out: Path, workers: int) -> dict[str, float]:
    """A run in a process of its own, with its peak memory in GB."""
    command = [sys.executable, "-m", "bench.dedup", "--one", system, str(source), str(out)]
    process = subprocess.Popen(
        [*command, str(workers)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{system} failed with exit code {process.returncode}: {command}")
    return {**json.loads(output.splitlines()[-1]), "gigabytes": usage.ru_maxrss / 1e6}


def recall(source: Path, out: Path) -> tuple[float, float, int]:
    """Of the planted pairs from the threshold on: the share found, expected; and wrong pairs."""
    from data_pipeline.dedup.minhash import candidate_probability

    documents = pq.read_table(source, columns=["twin", "similarity"])
    twin, similarity = documents["twin"].to_numpy(), documents["similarity"].to_numpy()
    cluster = pq.read_table(out / "clusters.parquet")["cluster"].to_numpy()
    joined = (twin >= 0) & (cluster == cluster[twin])
    similar = (twin >= 0) & (similarity >= THRESHOLD)
    # A hash a document more or less changes no expectation.
    expected = candidate_probability(similarity[similar], BANDS, ROWS).mean()
    sizes = np.bincount(cluster)
    wrong = int((joined & ~similar).sum() + (sizes[sizes > 2] - 2).sum())
    return float(joined[similar].mean()), float(expected), wrong


def report_kernels() -> bool:
    print("Signatures, MB of text per second of CPU time; how many times the peer's\n")
    print(f"| characters | {' | '.join(KERNELS)} |")
    print(f"|---:|{'---:|' * len(KERNELS)}")
    is_fast = True
    for words in (WORDS_PER_DOCUMENT, 10 * WORDS_PER_DOCUMENT):
        speeds = time_kernels(words)
        ours = speeds["farspan"]
        peers = [f"{speeds[name]:.1f} ({ours / speeds[name]:.1f}x)" for name in list(KERNELS)[1:]]
        characters = words * 500 // WORDS_PER_DOCUMENT
        print(f"| {characters} | {ours:.0f} | {' | '.join(peers)} |", flush=True)
        is_fast &= ours >= MEGABYTES_PER_SECOND
    return is_fast


def report_whole(folder: Path, documents: int, with_large: bool) -> bool:
    print("\nParquet to Parquet\n")
    print("| documents | system | workers | seconds | to Daft | peak GB | kept |")
    print("|---:|---|---:|---:|---:|---:|---:|")
    is_good = True
    daft_seconds = 0.0
    for count in (documents, 10 * documents)[: 2 if with_large else 1]:
        source = folder / f"{count}.parquet"
        write_documents(source, count)
        runs = [("farspan", 1), ("farspan", 2)]
        if count == documents:
            runs = [("daft", os.cpu_count() or 1), *runs]
        for system, workers in runs:
            out = folder / f"{system}-{count}"
            result = run_apart(system, source, out, workers)
            seconds = result["seconds"]
            daft_seconds = daft_seconds or seconds
            print(
                f"| {count} | {system} | {workers} | {seconds:.1f} | {seconds / daft_seconds:.2f} "
                f"| {result['gigabytes']:.2f} | {result['kept']} |",
                flush=True,
            )
        is_good &= seconds <= daft_seconds * (1 if count == documents else TIMES_DAFT)
        found, expected, wrong = recall(source, out)
        is_good &= found > expected - 0.01 and not wrong
        print(
            f"| | | | | | | {found:.2%} of planted pairs found, {expected:.2%} expected, "
            f"{wrong} joined wrongly |"
        )
    return is_good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, default=100_000, help="a multiple of 10,000")
    parser.add_argument("--skip-large", action="store_true", help="leave out ten times as many")
    parser.add_argument("--one", nargs=4, metavar=("SYSTEM", "SOURCE", "OUT", "WORKERS"))
    options = parser.parse_args()
    if options.one:
        system, source, out, workers = options.one
        print(json.dumps(WHOLE[system](Path(source), Path(out), int(workers))))
        return 0
    is_fast = report_kernels()
    with tempfile.TemporaryDirectory() as folder:
        is_good = report_whole(Path(folder), options.documents, not options.skip_large)
    return 0 if is_fast and is_good else 1


if __name__ == "__main__":
    sys.exit(main())
