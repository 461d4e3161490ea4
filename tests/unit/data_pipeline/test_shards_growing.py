"""Shards that are read while they are written, by runs that may be killed."""

import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.errors import DataError
from data_pipeline.run_folder import exclusive
from data_pipeline.shards import Manifest, TokenReader, growth, load_manifest, write_shards, writer
from data_pipeline.tokenize import train_tokenizer
from tests.files import contents

DOCUMENTS = [(f"id-{i}", f"Document {i} " + "says more. " * (i % 7)) for i in range(60)]
GROWING = "manifest.growing.json"


class Killed(BaseException):
    """What nobody handles."""


def killed_after(documents: int) -> Iterator[tuple[str, str]]:
    yield from DOCUMENTS[:documents]
    raise Killed


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    train_tokenizer([text for _, text in DOCUMENTS], 300, folder / "bpe.json")
    write(iter(DOCUMENTS), folder / "data", folder)
    return folder


def write(documents: Iterator[tuple[str, str]], out: Path, whole: Path, extra: int = 1) -> Manifest:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data_pipeline.shards.writer.DOCUMENTS_PER_ENCODING", 5)
        return write_shards(
            documents, whole / "bpe.json", out, tokens_per_shard=200, extra={"a": extra}
        )


def kill_after(documents: int, out: Path, whole: Path) -> None:
    with pytest.raises(Killed):
        write(killed_after(documents), out, whole)


@given(kills=st.lists(st.integers(0, len(DOCUMENTS)), max_size=5))
@settings(max_examples=25, deadline=None)
def test_kills_leave_a_prefix_and_no_trace(
    whole: Path, tmp_path_factory: pytest.TempPathFactory, kills: list[int]
) -> None:
    out = tmp_path_factory.mktemp("killed") / "data"
    finished = load_manifest(whole / "data")
    for documents in kills:
        kill_after(documents, out, whole)
        growing = load_manifest(out, growing=True)
        assert not growing.is_finished
        count = len(growing.shards)
        assert growing.shards == finished.shards[:count]
        assert growing.sha256 == finished.prefix_sha256(count)
        assert sum(shard.documents for shard in growing.shards) <= max(kills)
    write(iter(DOCUMENTS), out, whole)
    assert contents(out) == contents(whole / "data")
    assert load_manifest(out).is_finished


STEPS = [
    (writer.np, "save"),
    (writer.pq, "write_table"),
    (os, "fsync"),
    (Path, "rename"),
    (Path, "unlink"),
    (Path, "write_bytes"),
]


@given(kills=st.lists(st.integers(1, 20), min_size=1, max_size=4))
@settings(max_examples=40, deadline=None)
def test_kills_before_any_step_leave_a_prefix_and_no_trace(
    whole: Path, tmp_path_factory: pytest.TempPathFactory, kills: list[int]
) -> None:
    out = tmp_path_factory.mktemp("killed") / "data"
    finished = load_manifest(whole / "data")
    for steps in kills:
        with pytest.MonkeyPatch.context() as patch, suppress(Killed):
            left = itertools.count(steps, -1)
            for owner, name in STEPS:
                patch.setattr(owner, name, killing(getattr(owner, name), left))
            write(iter(DOCUMENTS), out, whole)
        if not (out / "manifest.json").exists() and not (out / GROWING).exists():
            continue
        found = load_manifest(out, growing=True)
        assert found.shards == finished.shards[: len(found.shards)]
        TokenReader(found)
    write(iter(DOCUMENTS), out, whole)
    assert contents(out) == contents(whole / "data")


def killing(step: Callable[..., Any], left: Iterator[int]) -> Callable[..., Any]:
    def killed_or_done(*arguments: Any, **options: Any) -> Any:
        if next(left) == 0:
            raise Killed
        return step(*arguments, **options)

    return killed_or_done


def test_what_is_listed_stays_where_it_is(whole: Path, tmp_path: Path) -> None:
    kill_after(45, tmp_path / "data", whole)
    listed = load_manifest(tmp_path / "data", growing=True).shards
    assert len(listed) == 2
    paths = [tmp_path / "data" / name for name in ("tokenizer.json", *(s.path for s in listed))]
    before = [(path.stat().st_ino, path.stat().st_mtime_ns) for path in paths]
    write(iter(DOCUMENTS), tmp_path / "data", whole)
    assert [(path.stat().st_ino, path.stat().st_mtime_ns) for path in paths] == before


@pytest.mark.parametrize("name", ["shard-00001.tar", "shard-00001.index.npy", "shard-00001.ids"])
def test_a_listed_shard_that_is_damaged_is_made_again(
    whole: Path, tmp_path: Path, name: str
) -> None:
    kill_after(45, tmp_path / "data", whole)
    (path,) = (tmp_path / "data/shards").glob(f"{name}*")
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    write(iter(DOCUMENTS), tmp_path / "data", whole)
    assert contents(tmp_path / "data") == contents(whole / "data")


def test_other_documents_or_settings_keep_nothing_that_differs(whole: Path, tmp_path: Path) -> None:
    others = [*DOCUMENTS[:20], ("other", "one"), *DOCUMENTS[21:]]
    for folder in ("killed", "fresh"):
        if folder == "killed":
            kill_after(45, tmp_path / folder, whole)
        write(iter(others), tmp_path / folder, whole)
    assert contents(tmp_path / "killed") == contents(tmp_path / "fresh")
    kill_after(45, tmp_path / "extra", whole)
    write(iter(DOCUMENTS), tmp_path / "extra", whole, extra=2)
    assert load_manifest(tmp_path / "extra").extra == {"a": 2}


def test_an_unfinished_manifest_is_refused_where_it_is_not_asked_for(
    whole: Path, tmp_path: Path
) -> None:
    kill_after(45, tmp_path / "data", whole)
    with pytest.raises(DataError, match=rf"{GROWING}: not finished, \d shards so far: .*growing"):
        load_manifest(tmp_path / "data")
    with pytest.raises(DataError, match=r"manifest\.json: no such file; nor is there"):
        load_manifest(tmp_path / "none", growing=True)


@contextmanager
def written(out: Path, whole: Path) -> Iterator[None]:
    """Somebody goes on with the shards, while the context lasts."""

    def work() -> None:
        with exclusive(out):
            write(iter(DOCUMENTS), out, whole)

    (out / "plan.json").touch()
    thread = Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        thread.join()


def test_a_reader_waits_for_what_is_written(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(growth, "POLL_S", 0.001)
    kill_after(25, tmp_path / "data", whole)
    reader = TokenReader(load_manifest(tmp_path / "data", growing=True))
    expected = TokenReader(load_manifest(whole / "data"))
    begun = len(reader.lengths)
    before = reader.manifest
    assert 0 < begun < len(DOCUMENTS)
    with written(tmp_path / "data", whole):
        reader.wait_for(len(before.shards))
        assert reader.manifest is before
        reader.wait_for(len(before.shards) + 1)
        assert len(reader.lengths) > begun
        reader.wait_for(1000)
    assert reader.manifest.is_finished
    for name in ("lengths", "first_token", "shard_documents"):
        assert getattr(reader, name).tolist() == getattr(expected, name).tolist()
    for document in (0, begun, len(DOCUMENTS) - 1):
        whole_document = expected.read(document, 0, 999).tolist()
        assert reader.read(document, 0, 999).tolist() == whole_document


class Clock:
    """Time that passes only while somebody sleeps."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(growth, "monotonic", lambda: self.now)
        monkeypatch.setattr(growth, "sleep", self.sleep)

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_nobody_waits_for_a_writer_that_is_gone(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock(monkeypatch)
    kill_after(25, tmp_path / "data", whole)
    reader = TokenReader(load_manifest(tmp_path / "data", growing=True))
    beats: list[float] = []
    with pytest.raises(DataError, match=r"shards are listed, .* no process writes it: start"):
        reader.wait_for(99, lambda: beats.append(clock.now))
    assert clock.now == growth.ABANDONED_S
    assert beats[:3] == [0.0, growth.POLL_S, 2 * growth.POLL_S]


def test_a_writer_that_took_its_time_may_be_started_again(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    out = tmp_path / "data"
    kill_after(25, out, whole)
    (out / "plan.json").touch()
    reader = TokenReader(load_manifest(out, growing=True))
    idle_s = 10 * growth.ABANDONED_S
    with ExitStack() as writer:
        writer.enter_context(exclusive(out))

        def start_again() -> None:
            if clock.now == idle_s:
                writer.close()
            if clock.now == idle_s + growth.ABANDONED_S - growth.POLL_S:
                write(iter(DOCUMENTS), out, whole)

        reader.wait_for(99, start_again)
    assert reader.manifest.is_finished


def test_one_waits_for_a_writer_that_takes_its_time_and_says_so(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock(monkeypatch)
    kill_after(25, tmp_path / "data", whole)
    reader = TokenReader(load_manifest(tmp_path / "data", growing=True))
    (tmp_path / "data/plan.json").touch()
    count = len(reader.manifest.shards)

    def finish() -> None:
        if clock.now >= 10 * growth.STALLED_S:
            write(iter(DOCUMENTS), tmp_path / "data", whole)

    with exclusive(tmp_path / "data"):
        reader.wait_for(99, finish)
    assert reader.manifest.is_finished
    assert f"{tmp_path}/data: waiting for shard 99, {count} are finished" in caplog.text
    assert len(caplog.messages) <= 10 * growth.STALLED_S / growth.REPORT_S


def test_a_store_whose_writer_cannot_be_seen_is_given_up_later(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    kill_after(25, tmp_path / "data", whole)
    manifest = load_manifest(tmp_path / "data", growing=True)
    monkeypatch.setattr(manifest.store, "has_writer", lambda: None)
    with pytest.raises(DataError, match="none has been added for 30 minutes"):
        TokenReader(manifest).wait_for(99)
    assert clock.now == growth.STALLED_S


def test_shards_that_change_while_they_are_read_are_refused(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Clock(monkeypatch)
    kill_after(45, tmp_path / "data", whole)
    reader = TokenReader(load_manifest(tmp_path / "data", growing=True))
    path = tmp_path / "data" / GROWING
    content = json.loads(path.read_text())
    content["shards"][0]["sha256"] = "0" * 64
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"data: the shards have changed while they were read"):
        reader.wait_for(99)


def test_a_manifest_that_a_new_start_has_shortened_is_waited_for(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Clock(monkeypatch)
    out = tmp_path / "data"
    kill_after(45, out, whole)
    reader = TokenReader(load_manifest(out, growing=True))
    count = len(reader.manifest.shards)
    shutil.rmtree(out)
    kill_after(25, out, whole)

    def finish() -> None:
        write(iter(DOCUMENTS), out, whole)

    reader.wait_for(count + 1, finish)
    assert reader.manifest.shards == load_manifest(whole / "data").shards
