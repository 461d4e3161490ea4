"""Clusters of real pages and their near-duplicates, against the exact similarity of every pair."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from data_pipeline.dedup import deduplicate

SHARED = Path(__file__).parents[5] / "shared"


@pytest.mark.skipif(not (SHARED / "tools").is_dir(), reason="needs ../shared (real pages)")
def test_duplicates_of_real_pages_are_found(tmp_path):
    subprocess.run(
        [
            *(sys.executable, SHARED / "tools/make_crawl.py"),
            *("--pages", SHARED / "data/pages-dev.warc.gz"),
            *("--out", tmp_path / "crawl", "--seed", "1", "--docs", "800"),
        ],
        check=True,
        capture_output=True,
    )
    deduplicate([tmp_path / "crawl/docs.jsonl.gz"], tmp_path / "out")
    rows = {row["id"]: row for row in pq.read_table(tmp_path / "out/clusters.parquet").to_pylist()}
    with gzip.open(tmp_path / "crawl/pairs.jsonl.gz", "rt") as lines:
        pairs = {(pair["a"], pair["b"]): pair["j"] for pair in map(json.loads, lines)}

    similar = [pair for pair, similarity in pairs.items() if similarity >= 0.8]
    found = [rows[a]["cluster"] == rows[b]["cluster"] for a, b in similar]
    assert len(found) > 100
    assert sum(found) >= 0.99 * len(found)

    component = {name: {name} for name in rows}
    for a, b in similar:
        merged = component[a] | component[b]
        component.update(dict.fromkeys(merged, merged))
    for row in rows.values():
        if not row["kept"]:
            assert row["id"] in component[row["twin"]]
            similarity = pairs[min(row["id"], row["twin"]), max(row["id"], row["twin"])]
            assert row["jaccard"] == pytest.approx(similarity, abs=1e-5)
