"""A run that is killed while it writes one of several shards ends with the bytes of any other."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_pipeline.sample import make_sample_crawl
from data_pipeline.shards.manifest import GROWING, Shard
from tests.files import contents
from tests.ranks import ROOT, TIMEOUT_S

PROGRAM = """
import data_pipeline.run
from launch.cli import main

data_pipeline.run.TOKENS_PER_SHARD = 800
main()
"""


def _start(crawl: Path, out: Path, workers: int) -> "subprocess.Popen[str]":
    options = ["--recipe", "demo", "--vocab-size", "600", "--workers", str(workers)]
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "data", "run", str(crawl), "--out", str(out), *options],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        start_new_session=True,
    )


def _listed(out: Path) -> list[Shard]:
    if not (out / GROWING).exists():
        return []
    return [Shard(**shard) for shard in json.loads((out / GROWING).read_text())["shards"]]


@pytest.mark.slow
def test_a_kill_between_two_shards_changes_no_byte_and_no_listed_shard(tmp_path: Path) -> None:
    make_sample_crawl(tmp_path / "crawl", pages=120, files=3, seed=8)
    whole, out = tmp_path / "whole", tmp_path / "out"
    _start(tmp_path / "crawl", whole, 2).communicate(timeout=TIMEOUT_S)
    shards = json.loads((whole / "manifest.json").read_text())["shards"]
    assert len(shards) > 20

    seen: list[Shard] = []
    for least, workers in ((1, 1), (len(shards) // 4, 2), (len(shards) // 2, 1)):
        process = _start(tmp_path / "crawl", out, workers)
        while len(_listed(out)) < least:
            assert process.poll() is None, "it has to be killed before its end"
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        assert _listed(out)[: len(seen)] == seen
        seen = _listed(out)
        assert not (out / "manifest.json").exists()
    process = _start(tmp_path / "crawl", out, 2)
    printed, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0
    told = [line for line in printed.splitlines() if line.startswith("shards: ")]
    assert f"shards: {len(shards)} of {len(shards)}" == told[-1]
    assert "shards: 0 of" not in printed
    assert contents(out) == contents(whole)
