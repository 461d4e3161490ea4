"""A document that takes too long or kills its process is dropped, and nothing else is."""

import faulthandler
import hashlib
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from data_pipeline import audit, clean
from data_pipeline.crawl import Page
from data_pipeline.extract import (
    ExtractError,
    Mode,
    archives,
    extract_archives,
    extract_text,
    text,
)
from data_pipeline.recipe import Recipe, load_recipe
from data_pipeline.run import run
from data_pipeline.workers import WorkerDiedError, do_each
from tests.files import contents
from tests.unit.data_pipeline.warc_records import record

ENDLESS, DEADLY, HARMLESS = 2, 4, 6
Extract = Callable[[Page, Mode], str]


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    path = tmp_path / "crawl.warc.gz"
    bodies = [f"<html><body><p>Page {number} of the lot.</p></body></html>" for number in range(8)]
    path.write_bytes(b"".join(record(n, body.encode()) for n, body in enumerate(bodies)))
    return path


@pytest.fixture
def recipe() -> Recipe:
    minimal = load_recipe("minimal")
    extract = minimal.extract.model_copy(update={"max_seconds": 0.5})
    return minimal.model_copy(update={"extract": extract})


def _run(archive: Path, recipe: Recipe, out: Path, workers: int = 1) -> dict[str, bytes]:
    run([str(archive)], out, recipe, workers=workers, id_header="X-Doc-Id", vocab_size=300)
    return contents(out)


def _hostile(page: Page, mode: Mode) -> str:
    if page.id == f"doc-{ENDLESS}":  # native code, which no handler of Python's interrupts
        hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
    if page.id == f"doc-{DEADLY}":
        faulthandler.disable()  # pytest's, which would print where
        os.kill(os.getpid(), signal.SIGSEGV)
    return extract_text(page, mode)


def test_they_are_dropped_and_named(
    archive: Path, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clean, "extract_text", _hostile)
    files = _run(archive, recipe, tmp_path / "out")
    assert _run(archive, recipe, tmp_path / "again", workers=2) == files
    rows = pq.read_table(tmp_path / "out" / "audit").to_pylist()
    assert [row["id"] for row in rows] == [f"doc-{number}" for number in range(8)]
    dropped = {row["id"]: row for row in rows if row["reason"] in ("too slow", "crashed")}
    assert {row["decision"] for row in rows if row["id"] not in dropped} == {"kept"}
    assert dropped.keys() == {f"doc-{ENDLESS}", f"doc-{DEADLY}"}
    slow, crashed = dropped[f"doc-{ENDLESS}"], dropped[f"doc-{DEADLY}"]
    assert (slow["stage"], slow["reason"]) == ("extract", "too slow")
    assert slow["detail"] == "over 0.5 seconds of CPU"
    assert (crashed["stage"], crashed["reason"]) == ("extract", "crashed")
    assert crashed["detail"] == "ended by SIGSEGV, 2 times"
    assert 0 < slow["offset"] < crashed["offset"]


def test_the_audit_shows_their_source_and_lives_on(
    archive: Path, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clean, "extract_text", _hostile)
    _run(archive, recipe, tmp_path / "out")

    def refuse(page: Page, mode: Mode) -> str:
        raise AssertionError(f"{page.id} is extracted again")

    monkeypatch.setattr(audit, "extract_text", refuse)
    run_audit = audit.Audit(tmp_path / "out")
    for number in (ENDLESS, DEADLY):
        (row,) = run_audit.document(f"doc-{number}")
        assert f"<p>Page {number} of the lot.</p>" in run_audit.look(row).text


def test_extracting_leaves_them_out_and_names_them(
    archive: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(archives, "extract_text", _hostile)
    other, out = tmp_path / "other.warc.gz", tmp_path / "texts.jsonl"
    other.write_bytes(record(8) + record(9, b"%PDF-"))
    outcomes = extract_archives(
        [str(archive), str(other)], out, id_header="X-Doc-Id", max_seconds=0.5
    )
    assert outcomes == {
        "pages": 7,
        "extract: too slow": 1,
        "extract: crashed": 1,
        "extract: binary": 1,
    }
    left = [n for n in range(9) if n not in (ENDLESS, DEADLY)]
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["id"] for row in rows] == [f"doc-{number}" for number in left]
    again, slow, crashed = capsys.readouterr().err.splitlines()
    assert again.startswith(f"warning: {archive}: its process was ended by ")
    assert slow.startswith(f"warning: {archive}, byte ")
    assert f"doc-{ENDLESS} (http://example.org/{ENDLESS}): too slow, over 0.5 seconds" in slow
    assert f"doc-{DEADLY} (http://example.org/{DEADLY}): crashed, ended by SIGSEGV" in crashed


def test_a_page_without_text_is_counted_where_each_is_read_by_itself(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hostile(page: Page, mode: Mode) -> str:
        if page.id == f"doc-{HARMLESS}":
            raise ExtractError("no text", "the page has no main text")
        return _hostile(page, mode)

    monkeypatch.setattr(archives, "extract_text", hostile)
    outcomes = extract_archives(
        [str(archive)], tmp_path / "texts.jsonl", id_header="X-Doc-Id", max_seconds=0.5
    )
    assert outcomes["extract: no text"] == 1


def test_a_worker_that_is_killed_once_changes_no_byte(
    archive: Path,
    recipe: Recipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    undisturbed = _run(archive, recipe, tmp_path / "undisturbed")
    has_died = tmp_path / "has died"

    def die_once(page: Page, mode: Mode) -> str:
        if page.id == f"doc-{HARMLESS}" and not has_died.exists():
            has_died.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return extract_text(page, mode)

    monkeypatch.setattr(clean, "extract_text", die_once)
    assert _run(archive, recipe, tmp_path / "out") == undisturbed
    assert has_died.exists()
    warning = f"warning: {archive}: its process was ended by SIGKILL; it is done again"
    assert warning in capsys.readouterr().err


def _die(name: str, is_careful: bool = False) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_task_that_dies_twice_is_named() -> None:
    with pytest.raises(WorkerDiedError, match=r"^crawl\.warc\.gz: .* SIGKILL.*same command again"):
        list(do_each(_die, [("crawl.warc.gz",)], 2))


def _fail(name: str) -> None:
    raise ValueError(name)


def test_an_exception_of_a_task_comes_back_with_where_it_was_raised() -> None:
    with pytest.raises(ValueError, match="crawl") as error:
        list(do_each(_fail, [("crawl",)], 1))
    assert "in _fail" in error.value.__notes__[0]


def test_a_parser_that_reads_nothing_ends_the_run_before_every_page_is_dropped(
    archive: Path, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(decoded: str, mode: Mode) -> str:
        raise ImportError("no such kernel")

    monkeypatch.setattr(text, "_main_text", fail)
    with pytest.raises(RuntimeError, match="fails on a good page: ImportError: no such kernel"):
        _run(archive, recipe, tmp_path / "out")
