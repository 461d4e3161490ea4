"""A run accounts for every document and gives the same bytes however it is executed."""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from threading import current_thread, main_thread
from typing import Any

import pyarrow.parquet as pq
import pytest
from warcio.archiveiterator import ArchiveIterator
from warcio.exceptions import ArchiveLoadFailed

from data_pipeline.audit import Audit
from data_pipeline.dedup import DedupReport, deduplicate
from data_pipeline.errors import DataError
from data_pipeline.examples import CHARACTERS, CHARACTERS_READ, MASKS, PER_REASON
from data_pipeline.extract import extract_archives
from data_pipeline.funnel import read_funnel
from data_pipeline.rates import METRICS
from data_pipeline.recipe import load_recipe
from data_pipeline.run import run
from data_pipeline.sample import SampleReport, make_sample_crawl
from data_pipeline.shards import load_manifest
from pretrain.metrics.registry import check_names
from tests.files import contents

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


def test_a_run_within_a_memory_gives_the_same_bytes(
    sample: SampleReport, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept_within = []

    def noted(*arguments: Any, **settings: Any) -> DedupReport:
        kept_within.append(settings["memory"])
        return deduplicate(*arguments, **settings)

    monkeypatch.setattr("data_pipeline.run.deduplicate", noted)
    monkeypatch.setattr("data_pipeline.dedup.batches.ROWS_PER_BATCH", 7)
    out = tmp_path / "data"
    run(_inputs(sample), out, load_recipe("demo"), vocab_size=VOCAB_SIZE, memory=1 << 20)
    assert kept_within == [1 << 20]
    assert contents(out) == contents(finished)


def test_a_memory_that_cannot_be_kept_is_refused_before_archives_are_cleaned(
    sample: SampleReport, tmp_path: Path
) -> None:
    recipe = load_recipe("demo")
    by_line = recipe.model_copy(update={"dedup": recipe.dedup.model_copy(update={"exact": "line"})})
    with pytest.raises(DataError, match="exact=line is not allowed with a memory"):
        run(_inputs(sample), tmp_path / "data", by_line, memory=1 << 30)
    with pytest.raises(DataError, match="memory=5 bytes is not allowed: it is at least 1048576"):
        run(_inputs(sample), tmp_path / "data", recipe, memory=5)
    assert not (tmp_path / "data").exists()


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


def test_the_funnel_accounts_for_every_document_and_byte(
    sample: SampleReport, finished: Path
) -> None:
    steps = read_funnel(finished)
    rows = _audit(finished)
    assert steps[0]["documents_in"] == len(rows)
    assert steps[0]["bytes_in"] == sum(path.stat().st_size for path in sample.files)
    for step, following in itertools.pairwise(steps):
        assert step["documents_out"] == following["documents_in"]
        assert step["bytes_out"] == following["bytes_in"]
        dropped = sum(reason["documents"] for reason in step["dropped"])
        assert step["documents_in"] - step["documents_out"] == dropped
    for step in steps[2:]:  # what a step does not change, it passes on or drops
        if step["step"] not in ("quality", "shards"):
            dropped_bytes = sum(reason["bytes"] for reason in step["dropped"])
            assert step["bytes_in"] - step["bytes_out"] == dropped_bytes
    audit, manifest = Audit(finished), load_manifest(finished)
    kept = list(audit.with_reason("kept"))
    assert steps[-1]["kept"]["documents"] == len(kept) == manifest.documents
    assert steps[-1]["bytes_in"] == sum(len(audit.look(row).text.encode()) for row in kept)


def test_examples_are_of_their_reason_and_show_what_the_audit_shows(finished: Path) -> None:
    audit = Audit(finished)
    steps = read_funnel(finished)
    reasons = [*(reason for step in steps for reason in step["dropped"]), steps[-1]["kept"]]
    assert sum(reason["documents"] for reason in reasons) == len(_audit(finished))
    seen = set()
    for reason in reasons:
        assert len(reason["examples"]) == min(PER_REASON, reason["documents"])
        for example in reason["examples"]:
            rows = [row for row in audit.document(example["id"]) if row["url"] == example["url"]]
            assert rows[0]["reason"] == reason.get("reason", "kept")
            shown = MASKS.mask(audit.look(rows[0]).text[:CHARACTERS_READ]).text.strip()
            if reason.get("reason") != "parser":
                assert (example["excerpt"] or "") == shown[:CHARACTERS]
            seen |= {name for name, fact in example.items() if fact is not None}
    assert seen >= {"id", "url", "detail", "language", "twin", "jaccard", "excerpt"}


def test_a_run_that_was_stopped_counts_each_document_once_and_the_time_of_all_attempts(
    sample: SampleReport, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # An attempt has a row at its begin and one at its end, however slow this machine is.
    monkeypatch.setattr("data_pipeline.rates.BEAT_S", 600)

    def stop(stage: str, done: int, total: int, detail: str = "") -> None:
        if (stage, done) == ("clean", 2) and current_thread() is main_thread():
            raise KeyboardInterrupt

    def in_parts(stage: str, done: int, total: int, detail: str = "") -> None:
        if (stage, done) == ("dedup", 0):
            raise KeyboardInterrupt

    out = tmp_path / "data"
    started = partial(
        run, _inputs(sample), out, load_recipe("demo"), workers=2, vocab_size=VOCAB_SIZE
    )
    for progress in (stop, in_parts):
        with pytest.raises(KeyboardInterrupt):
            started(progress=progress)
    result = started()
    rows = [json.loads(line) for line in (out / METRICS).read_text().splitlines()]
    check_names(name for row in rows for name in row)
    totals = {row["data/stage"]: row for row in rows if "data/attempts" in row}
    assert list(totals.values()) == result.rates
    assert list(totals) == ["clean", "dedup", "tokenizer", "audit", "shards"]
    cleaned = totals["clean"]
    assert cleaned["data/attempts"] == 2
    assert cleaned["data/documents"] == sample.documents
    assert cleaned["data/bytes_in"] == sum(path.stat().st_size for path in sample.files)
    ended = [row for row in rows if row["data/stage"] == "clean" and row.get("data/share")]
    assert cleaned["data/unfinished_s"] == pytest.approx(ended[0]["data/wall_s"])
    assert [row["data/finished"] for row in ended] == [0, 1]
    assert cleaned["data/cpu_s"] == pytest.approx(sum(row["data/cpu_s"] for row in ended), abs=0.1)
    written = sum(shard.bytes for shard in result.manifest.shards)
    assert totals["shards"]["data/bytes_out"] == written
    assert contents(out) == contents(finished)


def test_a_duplicate_names_a_kept_twin_of_its_cluster(finished: Path) -> None:
    rows = {row["id"]: row for row in _audit(finished)}
    duplicates = [row for row in rows.values() if row["stage"] == "dedup"]
    assert duplicates
    for row in duplicates:
        twin = rows[row["twin"]]
        assert (twin["decision"], twin["cluster"]) == ("kept", row["cluster"])
        assert row["jaccard"] >= 0.8
        assert row["reason"] in ("exact duplicate", "near duplicate")
        assert row["jaccard"] == 1.0 or row["reason"] == "near duplicate"


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


FARSPAN = [sys.executable, "-c", "from launch.cli import main; main()"]


def _command(inputs: list[str], out: Path, workers: int) -> list[str]:
    arguments = ["data", "run", *inputs, "--out", str(out), "--workers", str(workers)]
    return [*FARSPAN, *arguments, *OPTIONS]


def _signal_at(
    stage: str, command: list[str], number: signal.Signals
) -> subprocess.CompletedProcess[str]:
    """Start a run, send it a signal once it has printed a line, and wait for its end."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    assert process.stderr is not None
    for line in process.stdout:
        if line.startswith(stage):
            process.send_signal(number)
            break
    output, errors = process.stdout.read(), process.stderr.read()
    return subprocess.CompletedProcess(command, process.wait(), output, errors)


@pytest.mark.parametrize("stage", ["clean: 1 of 4", "dedup: 1 of 1", "tokenizer: 1 of 1"])
def test_a_killed_run_ends_with_the_same_bytes_for_any_workers_and_order_of_inputs(
    sample: SampleReport, finished: Path, tmp_path: Path, stage: str
) -> None:
    out = tmp_path / "data"
    inputs = _inputs(sample)
    assert _signal_at(stage, _command(inputs, out, 2), signal.SIGKILL).returncode == -signal.SIGKILL
    assert not (out / "manifest.json").exists()
    command = _command(inputs[::-1], out, 2)
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "clean: 0 of 4" not in again.stdout
    assert contents(out) == contents(finished)


def test_damaged_files_of_a_killed_run_are_named_and_made_again(
    sample: SampleReport, finished: Path, tmp_path: Path
) -> None:
    out = tmp_path / "data"
    command = _command(_inputs(sample), out, 2)
    _signal_at("tokenizer: 1 of 1", command, signal.SIGKILL)
    damaged = [
        *(
            "pieces/00000/documents.parquet",
            "pieces/00001/audit.parquet",
            "pieces/00002/files.sha256",
        ),
        *("dedup/clusters.parquet", "tokenizer/tokenizer.json"),
    ]
    for name in damaged:
        content = bytearray((out / "work" / name).read_bytes())
        content[len(content) // 2] ^= 1
        (out / "work" / name).write_bytes(content)
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    for name in damaged:
        assert f"warning: {out / 'work' / name} is damaged" in again.stderr
    assert "clean: 1 of 4" in again.stdout
    assert contents(out) == contents(finished)


@pytest.mark.parametrize(
    ("stage", "workers", "number"),
    [
        ("clean: 0", 1, signal.SIGTERM),
        ("clean: 1", 2, signal.SIGTERM),
        ("clean: 0", 2, signal.SIGINT),
        ("dedup: 0", 2, signal.SIGTERM),
    ],
)
def test_a_stopped_run_says_how_to_continue(
    sample: SampleReport, tmp_path: Path, stage: str, workers: int, number: signal.Signals
) -> None:
    done = _signal_at(stage, _command(_inputs(sample), tmp_path / "data", workers), number)
    assert done.returncode == 75
    assert done.stderr == "stopped; the same command continues\n"
    assert not (tmp_path / "data" / "manifest.json").exists()


def test_a_finished_run_is_said_to_be_and_left_alone(sample: SampleReport, finished: Path) -> None:
    before = contents(finished)
    result = run(_inputs(sample), finished, load_recipe("demo"), vocab_size=VOCAB_SIZE)
    assert not result.is_new
    assert contents(finished) == before


def test_another_run_in_the_same_folder_is_refused_with_the_difference(
    sample: SampleReport, finished: Path
) -> None:
    with pytest.raises(DataError, match=r"vocab_size: 600 -> 700"):
        run(_inputs(sample), finished, load_recipe("demo"), vocab_size=700)
    with pytest.raises(DataError, match=r"sample-00003\.warc\.gz.* -> absent"):
        run(_inputs(sample)[:3], finished, load_recipe("demo"), vocab_size=VOCAB_SIZE)
    with pytest.raises(DataError, match=r"^[^\n]*gopher_quality[^\n]* \(and \d+ more\)[^\n]*$"):
        run(_inputs(sample), finished, load_recipe("minimal"), vocab_size=VOCAB_SIZE)


def test_one_changed_byte_of_an_input_is_noticed(tmp_path: Path, sample: SampleReport) -> None:
    source = tmp_path / "crawl.warc.gz"
    content = bytearray(sample.files[0].read_bytes())
    source.write_bytes(content)
    run([str(source)], tmp_path / "out", load_recipe("demo"), vocab_size=VOCAB_SIZE)
    content[len(content) // 2] ^= 1
    source.write_bytes(content)
    with pytest.raises(DataError, match=r"crawl\.warc\.gz"):
        run([str(source)], tmp_path / "out", load_recipe("demo"), vocab_size=VOCAB_SIZE)


def test_two_spellings_of_an_input_are_one(
    sample: SampleReport, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = sample.files[0].parent
    monkeypatch.chdir(folder)
    spelled = [path.name for path in sample.files] + [f"../{folder.name}"]
    assert not run(spelled, finished, load_recipe("demo"), vocab_size=VOCAB_SIZE).is_new


@pytest.mark.parametrize("name", ["audit", "shards", "work", "tokenizer.json", "manifest.json"])
def test_what_is_not_of_a_run_is_never_replaced(
    sample: SampleReport, tmp_path: Path, name: str
) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(DataError, match=rf"holds {name}"):
        run(_inputs(sample), tmp_path, load_recipe("demo"), vocab_size=VOCAB_SIZE)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_second_process_in_the_folder_is_told_of_the_first(
    sample: SampleReport, tmp_path: Path
) -> None:
    out = tmp_path / "data"

    def start_another(stage: str, done: int, total: int, detail: str = "") -> None:
        if (stage, done) == ("clean", 1):
            command = _command(_inputs(sample), out, 1)
            other = subprocess.run(command, capture_output=True, text=True, check=False)
            assert other.returncode == 2
            assert f"{out} is in use by process {os.getpid()} on" in other.stderr
            assert len(other.stderr.splitlines()) == 1

    result = run(
        _inputs(sample), out, load_recipe("demo"), vocab_size=VOCAB_SIZE, progress=start_another
    )
    assert result.is_new


def test_a_tokenizer_of_the_users_own(tmp_path: Path, sample: SampleReport, finished: Path) -> None:
    brought = tmp_path / "tokenizer.json"
    brought.write_bytes((finished / "tokenizer.json").read_bytes())
    result = run(_inputs(sample)[:1], tmp_path / "out", load_recipe("demo"), tokenizer=brought)
    assert result.manifest.vocab_size == load_manifest(finished).vocab_size
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == brought.read_bytes()


@pytest.mark.parametrize(
    ("name", "message"), [("texts.jsonl.gz", "plain JSONL"), ("folder.jsonl", "is a folder")]
)
def test_texts_are_extracted_to_a_jsonl_file_only(
    tmp_path: Path, sample: SampleReport, name: str, message: str
) -> None:
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(DataError, match=message) as error:
        extract_archives(_inputs(sample), tmp_path / name)
    assert str(tmp_path / name) in str(error.value)


def test_an_empty_archive_leaves_nothing_to_shard(tmp_path: Path) -> None:
    archive = tmp_path / "empty.warc.gz"
    archive.touch()
    out = tmp_path / "out"
    command = [*FARSPAN, "data", "run", str(archive), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "empty.warc.gz: no documents" in done.stdout
    assert "no document is left" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_run_that_drops_every_document_shows_why(tmp_path: Path, sample: SampleReport) -> None:
    command = [*_command(_inputs(sample)[:1], tmp_path / "out", 1), "--languages", "zh"]
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert re.search(r"language +. en +. +\d+", done.stdout)
        assert "no document is left" in done.stderr
        assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.warc.gz", "--out", "out"], "missing.warc.gz: no such file"),
        (["--recipe", "c4-gophr", "{archive}", "--out", "out"], "did you mean 'c4-gopher'?"),
        (["--tokenizer", "none.json", "{archive}", "--out", "out"], "none.json: no such file"),
        (["--vocab-size", "10", "{archive}", "--out", "out"], "257"),
        (["--languages", "en, eng", "{archive}", "--out", "out"], "did you mean 'en'?"),
        (["{archive}", "--out", "{archive}"], "sample-00000.warc.gz: "),
        (["{archive}", "--out", "{archive}/out"], "sample-00000.warc.gz/out"),
        (["folder.warc.gz", "--out", "out"], "folder.warc.gz: no web archive in this folder"),
        (["*.gz", "--out", "out"], "*.gz: no file matches this pattern"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(
    tmp_path: Path, sample: SampleReport, arguments: list[str], message: str
) -> None:
    filled = [argument.format(archive=sample.files[0]) for argument in arguments]
    (tmp_path / "folder.warc.gz").mkdir()
    done = subprocess.run(
        [*FARSPAN, "data", "run", *filled],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()
