"""A run over URLs makes what a run over the same files on this machine makes."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import s3fs

from data_pipeline.crawl import remote
from data_pipeline.crawl.remote import UnreachableError
from data_pipeline.errors import DataError
from data_pipeline.extract import extract_archives
from data_pipeline.rates import METRICS
from data_pipeline.recipe import load_recipe
from data_pipeline.run import RunResult, run
from data_pipeline.sample import make_sample_crawl
from tests.unit.data_pipeline.crawl_server import CrawlServer, Fault, serve

VOCAB_SIZE = 600


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return make_sample_crawl(tmp_path_factory.mktemp("sample"), pages=40, files=3, seed=5).files


@pytest.fixture(scope="module")
def local(files: list[Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("local") / "data"
    start([str(path) for path in files], out)
    return results(out)


@pytest.fixture
def server(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[CrawlServer]:
    monkeypatch.setattr(remote, "sleep", lambda seconds: None)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serve({f"/{path.name}": path.read_bytes() for path in files}) as server:
        yield server


def start(inputs: list[str], out: Path) -> RunResult:
    return run(inputs, out, load_recipe("demo"), vocab_size=VOCAB_SIZE)


def urls(server: CrawlServer) -> list[str]:
    return [server.url + path for path in server.files]


def results(out: Path) -> dict[str, Any]:
    """All that a run has made, without the folders and servers that its inputs came from."""
    found: dict[str, Any] = {}
    for path in sorted(out.rglob("*")):
        name = str(path.relative_to(out))
        if path.is_dir() or name in ("plan.json", ".lock", METRICS):
            continue
        found[name] = path.read_bytes()
    for name in [name for name in found if name.startswith("audit/")]:
        rows = pq.read_table(out / name).to_pylist()
        for row in rows:
            folder = row["file"].rpartition("/")[0]
            row["file"] = row["file"].removeprefix(folder)
            row["detail"] = row["detail"] and row["detail"].removeprefix(folder)
        found[name] = rows
    manifest = json.loads(found.pop("manifest.json"))
    for entry in manifest["extra"]["inputs"]:
        entry["path"] = Path(entry["path"]).name
    return found | {"manifest": manifest}


def test_the_output_is_that_of_the_same_files_on_this_machine(
    server: CrawlServer, local: dict[str, Any], tmp_path: Path
) -> None:
    server.limit = 50_000
    start(urls(server)[::-1], tmp_path / "out")
    assert results(tmp_path / "out") == local


def test_several_workers_give_the_same(
    server: CrawlServer, local: dict[str, Any], tmp_path: Path
) -> None:
    server.faults.extend([Fault(status=503), Fault(after=1)])
    code = "from launch.cli import main; main()"
    options = ["--recipe", "demo", "--vocab-size", str(VOCAB_SIZE), "--workers", "2"]
    command = ["data", "run", *urls(server), "--out", str(tmp_path / "out"), *options]
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert results(tmp_path / "out") == local


def test_buckets_and_this_machine_may_be_mixed(
    files: list[Path], local: dict[str, Any], bucket: str, tmp_path: Path
) -> None:
    s3fs.S3FileSystem().put([str(path) for path in files[1:]], f"{bucket}/crawl/")
    start([f"{bucket}/crawl/*.warc.gz", str(files[0])], tmp_path / "out")
    assert results(tmp_path / "out") == local


def test_a_run_whose_server_went_away_is_continued(
    server: CrawlServer, local: dict[str, Any], tmp_path: Path
) -> None:
    server.faults.extend([Fault(after=1)] * 3 + [Fault(after=1 << 30)] + [Fault(status=500)] * 8)
    with pytest.raises(UnreachableError, match="the same command continues"):
        start(urls(server), tmp_path / "out")
    before = len(server.requests)
    start(urls(server), tmp_path / "out")
    assert ("/sample-00000.warc.gz", "bytes=0-") not in server.requests[before:]
    assert results(tmp_path / "out") == local


def test_a_file_that_changes_between_two_starts_is_named(
    server: CrawlServer, tmp_path: Path
) -> None:
    server.faults.extend([Fault(after=1)] * 3 + [Fault(after=1 << 30)] + [Fault(status=500)] * 8)
    with pytest.raises(UnreachableError):
        start(urls(server), tmp_path / "out")
    path = "/sample-00002.warc.gz"
    server.replace(path, server.files[path][:-1])
    with pytest.raises(DataError, match=rf"inputs\..*{path}.* -> .*choose another --out"):
        start(urls(server), tmp_path / "out")


def test_a_local_file_that_changes_during_a_run_is_refused(
    files: list[Path], tmp_path: Path
) -> None:
    path = tmp_path / "a.warc.gz"
    path.write_bytes(files[0].read_bytes())

    def replace(stage: str, done: int, total: int, detail: str = "") -> None:
        if (stage, done) == ("clean", 0):
            path.write_bytes(files[1].read_bytes())

    with pytest.raises(DataError, match=r"a\.warc\.gz: the file has changed"):
        run([str(path)], tmp_path / "out", load_recipe("demo"), progress=replace)


def test_texts_are_extracted_from_urls(
    server: CrawlServer, files: list[Path], tmp_path: Path
) -> None:
    server.limit = 50_000
    extract_archives([str(path) for path in files], tmp_path / "local.jsonl")
    extract_archives(urls(server), tmp_path / "remote.jsonl")
    assert (tmp_path / "remote.jsonl").read_bytes() == (tmp_path / "local.jsonl").read_bytes()
