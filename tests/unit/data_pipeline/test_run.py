"""A run accounts for every document and gives the same bytes however it is executed."""

import json
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from warcio.archiveiterator import ArchiveIterator
from warcio.exceptions import ArchiveLoadFailed

from data_pipeline.errors import DataError
from data_pipeline.recipe import load_recipe
from data_pipeline.run import run
from data_pipeline.sample import SampleReport, make_sample_crawl
from data_pipeline.shards import load_manifest

VOCAB_SIZE = 600
OPTIONS = ["--recipe", "demo", "--vocab-size", str(VOCAB_SIZE)]


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> SampleReport:
    return make_sample_crawl(tmp_path_factory.mktemp("sample"), pages=80, files=4, seed=3)


@pytest.fixture(scope="module")
def finished(sample: SampleReport, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "data"
    run(_inputs(sample), out, load_recipe("demo"), vocab_size=VOCAB_SIZE)
    return out


def _inputs(sample: SampleReport) -> list[str]:
    return [str(path) for path in sample.files]


def _audit(out: Path) -> list[dict[str, Any]]:
    return [
        row
        for path in sorted((out / "audit").glob("*.parquet"))
        for row in pq.read_table(path).to_pylist()
    ]


def _planted(sample: SampleReport) -> dict[str, str]:
    """What each record id of the crawl was planted as."""
    kinds = {}
    for path in sample.files:
        with path.open("rb") as file:
            try:
                for record in ArchiveIterator(file):
                    if record.rec_type == "response":
                        kinds[record.rec_headers["WARC-Record-ID"]] = record.rec_headers[
                            "X-Planted"
                        ]
                        record.content_stream().read()
            except (ArchiveLoadFailed, EOFError):
                pass
    return kinds


def _files(out: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()
    }


def test_every_document_has_one_audit_row(sample: SampleReport, finished: Path) -> None:
    rows = _audit(finished)
    kinds = _planted(sample)
    assert len(rows) == sample.documents
    assert Counter(row["id"] for row in rows if row["reason"] != "truncated") == Counter(
        dict.fromkeys(kinds, 1)
    )
    assert {row["decision"] for row in rows} == {"kept", "dropped"}
    assert all((row["decision"] == "kept") == (row["stage"] == "shards") for row in rows)
    assert all(row["reason"] and row["file"] and row["offset"] >= 0 for row in rows)


def test_what_was_planted_meets_its_end(sample: SampleReport, finished: Path) -> None:
    kinds = _planted(sample)
    ends = Counter(
        (kinds.get(row["id"], "cut"), row["stage"], row["reason"]) for row in _audit(finished)
    )
    planted = sample.planted
    assert ends["cut", "crawl", "truncated"] == 1
    assert ends["empty", "crawl", "empty"] == planted["empty"]
    assert ends["not found", "crawl", "status"] == planted["not found"]
    assert ends["binary", "extract", "binary"] == planted["binary"]
    for language in ("de", "es", "fr", "ja"):
        kind = f"language {language}"
        assert ends[kind, "language", language] == planted[kind]
    by_stage = Counter((kind, stage) for kind, stage, _ in ends.elements())
    assert by_stage["spam", "quality"] == planted["spam"]
    copies = planted["mirror"] + planted["edited"] + planted["shortened"]
    duplicates = sum(count for (_, stage), count in by_stage.items() if stage == "dedup")
    assert duplicates >= 0.7 * copies
    assert by_stage["page", "shards"] >= 0.6 * planted["page"]


def test_a_duplicate_names_a_kept_twin_of_its_cluster(finished: Path) -> None:
    rows = {row["id"]: row for row in _audit(finished)}
    duplicates = [row for row in rows.values() if row["stage"] == "dedup"]
    assert duplicates
    for row in duplicates:
        twin = rows[row["twin"]]
        assert (twin["decision"], twin["cluster"]) == ("kept", row["cluster"])
        assert row["jaccard"] >= 0.8
        assert (row["jaccard"] == 1.0) == (row["reason"] == "exact duplicate")


def test_shards_hold_the_kept_documents_in_order(finished: Path) -> None:
    kept = [row["id"] for row in _audit(finished) if row["decision"] == "kept"]
    in_shards = [
        name
        for path in sorted((finished / "shards").glob("*.ids.parquet"))
        for name in pq.read_table(path).column(0).to_pylist()
    ]
    assert in_shards == kept


def test_the_manifest_says_where_the_data_comes_from(sample: SampleReport, finished: Path) -> None:
    manifest = load_manifest(finished)
    funnel = Counter((row["stage"], row["reason"]) for row in _audit(finished))
    assert {
        (row["stage"], row["reason"]): row["documents"] for row in manifest.extra["funnel"]
    } == funnel
    assert [entry["path"] for entry in manifest.extra["inputs"]] == _inputs(sample)
    assert sum(entry["documents"] for entry in manifest.extra["inputs"]) == sample.documents
    assert manifest.extra["recipe"]["gopher_quality"]["min_words"] == 50


def _command(sample: SampleReport, out: Path, workers: int) -> list[str]:
    program = "from launch.cli import main; main()"
    arguments = ["data", "run", *_inputs(sample), "--out", str(out), "--workers", str(workers)]
    return [sys.executable, "-c", program, *arguments, *OPTIONS]


@pytest.mark.parametrize("stage", ["clean: 1 of 4", "dedup: 1 of 1", "tokenizer: 1 of 1"])
def test_a_killed_run_ends_with_the_same_bytes_for_any_workers(
    sample: SampleReport, finished: Path, tmp_path: Path, stage: str
) -> None:
    out = tmp_path / "data"
    process = subprocess.Popen(_command(sample, out, 2), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(stage):
            process.send_signal(signal.SIGKILL)
            break
    assert process.wait() == -signal.SIGKILL
    assert not (out / "manifest.json").exists()
    again = subprocess.run(_command(sample, out, 2), capture_output=True, text=True, check=True)
    assert "clean: 0 of 4" not in again.stdout
    assert _files(out) == _files(finished)


def test_a_finished_run_is_said_to_be_and_left_alone(sample: SampleReport, finished: Path) -> None:
    before = _files(finished)
    result = run(_inputs(sample), finished, load_recipe("demo"), vocab_size=VOCAB_SIZE)
    assert not result.is_new
    assert _files(finished) == before


def test_another_run_in_the_same_folder_is_refused_with_the_difference(
    sample: SampleReport, finished: Path
) -> None:
    with pytest.raises(DataError, match=r"vocab_size: 600 -> 700"):
        run(_inputs(sample), finished, load_recipe("demo"), vocab_size=700)
    with pytest.raises(DataError, match=r"sample-00003\.warc\.gz.* -> absent"):
        run(_inputs(sample)[:3], finished, load_recipe("demo"), vocab_size=VOCAB_SIZE)
    with pytest.raises(DataError, match=r"gopher_quality"):
        run(_inputs(sample), finished, load_recipe("minimal"), vocab_size=VOCAB_SIZE)


def test_an_input_with_new_content_is_noticed(tmp_path: Path, sample: SampleReport) -> None:
    source = tmp_path / "crawl.warc.gz"
    source.write_bytes(sample.files[0].read_bytes())
    run([str(source)], tmp_path / "out", load_recipe("demo"), vocab_size=VOCAB_SIZE)
    source.write_bytes(sample.files[1].read_bytes())
    with pytest.raises(DataError, match=r"crawl\.warc\.gz"):
        run([str(source)], tmp_path / "out", load_recipe("demo"), vocab_size=VOCAB_SIZE)


def test_a_tokenizer_of_the_users_own(tmp_path: Path, sample: SampleReport, finished: Path) -> None:
    brought = tmp_path / "tokenizer.json"
    brought.write_bytes((finished / "tokenizer.json").read_bytes())
    result = run(_inputs(sample)[:1], tmp_path / "out", load_recipe("demo"), tokenizer=brought)
    assert result.manifest.vocab_size == load_manifest(finished).vocab_size
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == brought.read_bytes()


def test_an_empty_archive_is_an_outcome(tmp_path: Path) -> None:
    archive = tmp_path / "empty.warc.gz"
    archive.touch()
    out = tmp_path / "out"
    command = [sys.executable, "-c", "from launch.cli import main; main()", "data", "run"]
    done = subprocess.run(
        [*command, str(archive), "--out", str(out)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "empty.warc.gz: no documents" in done.stdout
    assert json.loads((out / "manifest.json").read_text())["documents"] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.warc.gz", "--out", "out"], "missing.warc.gz: no such file"),
        (["--recipe", "c4-gophr", "{archive}", "--out", "out"], "did you mean 'c4-gopher'?"),
        (["--tokenizer", "none.json", "{archive}", "--out", "out"], "none.json: no such file"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(
    tmp_path: Path, sample: SampleReport, arguments: list[str], message: str
) -> None:
    filled = [argument.format(archive=sample.files[0]) for argument in arguments]
    command = [sys.executable, "-c", "from launch.cli import main; main()", "data", "run"]
    done = subprocess.run(
        [*command, *filled], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()
