"""The data path on real pages, and on a crawl of them with hostile records and known twins."""

import gzip
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import webdataset
from warcio.archiveiterator import ArchiveIterator
from warcio.exceptions import ArchiveLoadFailed

SHARED = Path(__file__).parents[3] / "shared"
PAGES = SHARED / "data" / "pages-dev.warc.gz"
MAKE_CRAWL = SHARED / "tools" / "make_crawl.py"
FARSPAN = [sys.executable, "-c", "from launch.cli import main; main()"]
DOCUMENT_TYPES = ("response", "revisit", "conversion", "resource")

pytestmark = pytest.mark.skipif(not PAGES.exists(), reason=f"no real pages at {PAGES}")


def farspan(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [*FARSPAN, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    return done


def json_lines(path: Path) -> list[dict[str, Any]]:
    content = path.read_bytes()
    text = gzip.decompress(content) if path.suffix == ".gz" else content
    return [json.loads(line) for line in text.splitlines()]


def audit(out: Path) -> list[dict[str, Any]]:
    return [
        row
        for path in sorted((out / "audit").glob("*.parquet"))
        for row in pq.read_table(path).to_pylist()
    ]


@pytest.fixture(scope="module")
def crawl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("crawl")
    command = [sys.executable, MAKE_CRAWL, "--pages", PAGES, "--seed", "1", "--docs", "800"]
    subprocess.run([*command, "--nasty", "--out", out], check=True, stdout=subprocess.DEVNULL)
    return out


@pytest.fixture(scope="module")
def cleaned(crawl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The crawl by the recipe without heuristics, so that only duplicates and junk are dropped."""
    out = tmp_path_factory.mktemp("cleaned")
    farspan(
        *("data", "run", crawl / "dump-0" / "*.warc.gz", "--out", out, "--recipe", "minimal"),
        *("--workers", 2, "--id-header", "X-Doc-Id", "--vocab-size", 4096),
    )
    return out


def test_every_document_of_the_crawl_has_one_audit_row(crawl: Path, cleaned: Path) -> None:
    """warcio counts the documents; it stops at the two damaged records at the end."""
    expected = 0
    for path in sorted((crawl / "dump-0").glob("*.warc.gz")):
        with path.open("rb") as file:
            try:
                for record in ArchiveIterator(file):
                    is_short = (record.rec_headers["WARC-Target-URI"] or "").endswith("/short")
                    expected += record.rec_type in DOCUMENT_TYPES and not is_short
            except (ArchiveLoadFailed, EOFError):
                pass
    damaged = [case for case in json_lines(crawl / "nasty.jsonl") if "log" in case["expect"]]
    rows = audit(cleaned)
    assert len(rows) == expected + len(damaged)
    documents = {row["id"] for row in json_lines(crawl / "docs.jsonl.gz")}
    found = Counter(row["id"] for row in rows)
    assert all(found[document] == 1 for document in documents)


@pytest.mark.parametrize(
    ("case", "stage", "reason"),
    [
        ("empty payload", "crawl", "empty"),
        ("404 page", "crawl", "status"),
        ("pdf payload", "crawl", "type"),
        ("binary labelled text/html", "extract", "binary"),
        ("revisit", "crawl", "revisit"),
        ("record shorter than its Content-Length", "crawl", "content-length"),
        ("file cut inside its last gzip member", "crawl", "truncated"),
    ],
)
def test_nasty_records_are_dropped_with_a_reason(
    crawl: Path, cleaned: Path, case: str, stage: str, reason: str
) -> None:
    (nasty,) = (row for row in json_lines(crawl / "nasty.jsonl") if row["case"] == case)
    rows = [
        row
        for row in audit(cleaned)
        if row["url"] == nasty["url"] and row["file"].endswith(nasty["file"])
    ]
    assert [(row["stage"], row["reason"], row["decision"]) for row in rows] == [
        (stage, reason, "dropped")
    ]


@pytest.mark.parametrize("mode", ["fast", "accurate"])
def test_nasty_pages_give_their_text(crawl: Path, tmp_path: Path, mode: str) -> None:
    """One page of each kind that hides its text, read from the crawl's files by themselves."""
    river = "A perfectly ordinary paragraph about rivers, boats and the people who live"
    texts = {}
    for number in range(3):
        out = tmp_path / f"{number}.jsonl"
        source = tmp_path / f"nasty-{number}.warc.gz"
        source.write_bytes(_nasty_records(crawl / "dump-0" / f"crawl-{number:05d}.warc.gz"))
        farspan("data", "extract", source, "--out", out, "--mode", mode)
        texts |= {row["url"].rpartition("/")[2]: row["text"] for row in json_lines(out)}
    for name in ("nul", "deep", "chunked", "notype"):
        assert texts[name].startswith(river), name
        assert "\0" not in texts[name]
    assert texts["sjis"].startswith("日本語の文章です。川と船と人々についての普通の段落。")
    assert texts["long"] == "a" * 8_000_000
    assert set(texts) == {"nul", "deep", "chunked", "notype", "sjis", "long"}


def _nasty_records(archive: Path) -> bytes:
    """The archive from the first hostile record on, cut out of the file at its offset."""
    with archive.open("rb") as file:
        records = ArchiveIterator(file)
        for record in records:
            if "//nasty.example/" in (record.rec_headers["WARC-Target-URI"] or ""):
                start = records.get_record_offset()
                break
    return archive.read_bytes()[start:]


def test_damage_is_told_with_file_and_offset(crawl: Path, cleaned: Path) -> None:
    again = farspan(
        *("data", "run", crawl / "dump-0" / "*.warc.gz", "--out", cleaned, "--recipe", "minimal"),
        *("--id-header", "X-Doc-Id", "--vocab-size", 4096),
    )
    assert "finished already" in again.stdout
    damaged = [row for row in audit(cleaned) if row["reason"] in ("content-length", "truncated")]
    assert len(damaged) == 2
    for row in damaged:
        assert f"{row['file']}, byte {row['offset']}:" in again.stdout


def test_twins_of_the_crawl_are_found(crawl: Path, cleaned: Path) -> None:
    """Of documents made near-equal on purpose, all but a few fall into one cluster."""
    clusters = {row["id"]: row["cluster"] for row in audit(cleaned)}
    pairs = [
        (pair["a"], pair["b"])
        for pair in json_lines(crawl / "pairs.jsonl.gz")
        if pair["same_cluster"] and pair["j"] >= 0.9
    ]
    judged = [
        (clusters[a], clusters[b]) for a, b in pairs if None not in (clusters[a], clusters[b])
    ]
    assert len(judged) > 100
    assert sum(a == b for a, b in judged) >= 0.9 * len(judged)


def test_stock_webdataset_reads_the_kept_documents(cleaned: Path) -> None:
    kept = sum(row["decision"] == "kept" for row in audit(cleaned))
    tars = sorted(str(path) for path in (cleaned / "shards").glob("*.tar"))
    samples = webdataset.WebDataset(tars, shardshuffle=False).decode()
    tokens = [len(sample["npy"]) for sample in samples]
    manifest = json.loads((cleaned / "manifest.json").read_text())
    assert (len(tokens), sum(tokens)) == (kept, manifest["tokens"])
    assert kept > 400


@pytest.fixture(scope="module")
def extracted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("extracted") / "pages.jsonl"
    farspan("data", "extract", PAGES, "--out", out, "--id-header", "X-Page-Id")
    return {row["id"]: row["text"] for row in json_lines(out)}


def test_nearly_every_real_page_gives_text(extracted: dict[str, str]) -> None:
    assert len(extracted) >= 0.98 * 941


def test_main_text_agrees_with_hand_made_ground_truth(extracted: dict[str, str]) -> None:
    """Mean F1 of words over 95 articles of scrapinghub's benchmark; resiliparse reaches 0.90."""
    scores = []
    for row in json_lines(SHARED / "data" / "extraction-gt-full.jsonl.gz"):
        truth = Counter(row["articleBody"].split())
        found = Counter(extracted.get(row["id"], "").split())
        common = (truth & found).total()
        scores.append(2 * common / (truth.total() + found.total()))
    assert len(scores) == 95
    assert sum(scores) / len(scores) >= 0.88
