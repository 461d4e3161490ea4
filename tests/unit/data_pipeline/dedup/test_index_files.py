"""The folder of an index: what it refuses, what a kill leaves, and how much memory it takes."""

import fcntl
import json
import os
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bench.dedup import write_documents
from data_pipeline.dedup.index import (
    checked_settings,
    deduplicate_with_index,
    export_clusters,
    parse_memory,
    remove_documents,
)
from data_pipeline.dedup.index.columns import Column, ColumnWriter
from data_pipeline.dedup.index.folder import Index
from data_pipeline.errors import DataError
from tests.files import contents
from tests.unit.data_pipeline.dedup.corpus import (
    clusters_of,
    documents_of,
    make_corpus,
    write_jsonl,
)

DEFAULT = {"threshold": 0.8, "bands": None, "rows": None, "ngram": 5, "keep": "longest"}


@pytest.fixture(autouse=True)
def no_power_is_lost(monkeypatch):
    """Waiting for a busy disk takes longer than all else; a process that is killed needs it not."""
    monkeypatch.setattr("os.fsync", lambda file: None)


def add(folder, documents, out="out", **settings):
    source = write_jsonl(folder / "dump.jsonl", documents)
    checked = checked_settings(**{**DEFAULT, **settings})
    return deduplicate_with_index([source], folder / out, folder / "ix", checked, memory=1 << 20)


@pytest.fixture
def corpus():
    return make_corpus(seed=5)


def test_values_come_back_from_columns(tmp_path):
    rng = np.random.default_rng(1)
    for kind, rows in ((np.uint8, 9000), (np.uint32, 1020), (np.int64, 5101), ("S16", 256)):
        values = rng.integers(0, 256, rows * np.dtype(kind).itemsize, np.uint8).view(kind)
        with ColumnWriter(tmp_path / "column", kind) as writer:
            for piece in np.split(values, [1, 3, 900]):
                writer.append(piece)
        column = Column(tmp_path / "column", kind)
        assert len(column) == rows
        assert (column.read(5, rows - 3) == values[5:-3]).all()
        wanted = rng.integers(0, rows, 300)
        assert (column.take(wanted) == values[wanted]).all()
        assert len(column.read(7, 7)) == len(column.take(np.empty(0, np.int64))) == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bands": 16, "rows": 7}, r"index of bands=14 .*asked for: 16.*, rows=8 .*asked for: 7"),
        ({"ngram": 3}, r"an index of ngram=5 \(asked for: 3\): use its settings, or another --ind"),
        ({"threshold": 0.9}, r"an index of threshold=0\.8 \(asked for: 0\.9\)"),
        ({"threshold": None}, r"an index of threshold=0\.8 \(asked for: None\)"),
        ({"keep": "first"}, r"an index of keep=longest \(asked for: first\)"),
    ],
)
def test_other_settings_are_refused(tmp_path, corpus, settings, message):
    add(tmp_path, corpus[:9])
    before = contents(tmp_path / "ix")
    with pytest.raises(DataError, match=message):
        add(tmp_path, corpus[9:], **settings)
    assert contents(tmp_path / "ix") == before


def test_an_index_of_another_version_is_refused(tmp_path, corpus, monkeypatch):
    add(tmp_path, corpus[:9])
    monkeypatch.setattr("data_pipeline.dedup.index.folder.PERMUTATION_SEED", 7)
    with pytest.raises(DataError, match=r"another version, with format 1 and seed 2022"):
        add(tmp_path, corpus[9:])


def test_ids_of_earlier_dumps_are_refused(tmp_path, corpus):
    add(tmp_path, corpus[:40])
    before = contents(tmp_path / "ix")
    again = {"id": corpus[7]["id"], "text": "another text"}
    with pytest.raises(DataError, match=r"id `d7` is one of dump 0 of the index already"):
        add(tmp_path, [*corpus[40:], again])
    with pytest.raises(DataError, match=r"id `twice` stands twice in the inputs"):
        add(tmp_path, [{"id": "twice", "text": "one"}, {"id": "twice", "text": "two"}])
    assert contents(tmp_path / "ix") == before


def test_documents_without_an_id_are_named(tmp_path):
    source = tmp_path / "in.parquet"
    pq.write_table(pa.table({"id": ["1", None], "text": ["a", "b"]}), source)
    checked = checked_settings(**DEFAULT)
    with pytest.raises(DataError, match=r"document 1 .*in\.parquet has no `id`; add it"):
        deduplicate_with_index([source], tmp_path / "out", tmp_path / "ix", checked, memory=1 << 20)


def test_the_same_dump_is_not_added_again(tmp_path, corpus):
    add(tmp_path, corpus[:50])
    first = add(tmp_path, corpus[50:], "second")
    assert (first.dump, first.is_new) == (1, True)
    before = contents(tmp_path / "ix")
    again = add(tmp_path, corpus[50:], "again")
    assert again == type(first)(**{**vars(first), "is_new": False})
    assert contents(tmp_path / "ix") == before
    for table in ("clusters.parquet", "superseded.parquet"):
        second, repeated = (pq.read_table(tmp_path / out / table) for out in ("second", "again"))
        assert second.equals(repeated)
    assert documents_of(tmp_path / "second") == documents_of(tmp_path / "again")
    # Of the first one less is kept than when it came.
    assert add(tmp_path, corpus[:50], "again").kept < len(documents_of(tmp_path / "out"))


def test_damage_is_named(tmp_path, corpus):
    add(tmp_path, corpus[:60])

    def read_all():
        export_clusters(tmp_path / "ix", tmp_path / "all.parquet")
        add(tmp_path, corpus[60:])

    paths = [path for path in (tmp_path / "ix").rglob("*-*/*") if path.stat().st_size]
    assert len(paths) > 20
    for path in paths:
        whole = path.read_bytes()
        for damaged in (whole[:100] + bytes([whole[100] ^ 1]) + whole[101:], whole[:-1]):
            path.write_bytes(damaged)
            with pytest.raises(DataError, match=rf"{path.name}: the index is damaged here, .*copy"):
                read_all()
        path.write_bytes(whole)
    paths[0].unlink()
    with pytest.raises(DataError, match=f"{paths[0].name}: the index is damaged here, No such"):
        read_all()


def test_a_damaged_list_of_contents_is_named(tmp_path, corpus):
    add(tmp_path, corpus[:9])
    path = tmp_path / "ix/index.json"
    path.write_bytes(path.read_bytes().replace(b'"ngram": 5', b'"ngram": 6'))
    with pytest.raises(DataError, match=r"index\.json: damaged, its sha256 is not"):
        add(tmp_path, corpus[9:])


def test_only_one_process_may_have_an_index(tmp_path, corpus):
    add(tmp_path, corpus[:9])
    with (tmp_path / "ix/.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(DataError, match=r"ix is in use by another process: wait for it"):
            add(tmp_path, corpus[9:])
    add(tmp_path, corpus[9:])


def test_other_folders_are_refused(tmp_path, corpus):
    (tmp_path / "ix").mkdir()
    with pytest.raises(DataError, match=r"ix: no index, as it has no index\.json"):
        export_clusters(tmp_path / "ix", tmp_path / "all.parquet")
    (tmp_path / "ix/thesis.txt").touch()
    with pytest.raises(DataError, match=r"ix: has thesis\.txt but no index\.json, so it is no"):
        add(tmp_path, corpus)
    with pytest.raises(DataError, match="is the folder of the index; name another --out"):
        add(tmp_path, corpus, out="ix")


def test_dumps_that_lie_in_the_folder_are_not_taken_for_its_own(tmp_path, corpus):
    folder = tmp_path / "ix"
    (folder / "dump-2025").mkdir(parents=True)
    (folder / "state-of-things").touch()
    source = write_jsonl(folder / "dump-2024.jsonl", corpus[:9])
    before = contents(folder)
    with pytest.raises(
        DataError, match=r"ix: has dump-2024\.jsonl but no index\.json, so it is no"
    ):
        add(tmp_path, corpus)
    assert contents(folder) == before
    assert (folder / "dump-2025").is_dir()
    source.rename(tmp_path / "dump-2024.jsonl")
    (folder / "dump-2025").rmdir()
    (folder / "state-of-things").unlink()
    add(tmp_path, corpus[:9])
    source = write_jsonl(source, corpus[9:])
    add(tmp_path, corpus[9:])
    assert source.exists()


def test_unknown_ids_remove_nothing(tmp_path, corpus):
    add(tmp_path, corpus[:9])
    before = contents(tmp_path / "ix")
    with pytest.raises(DataError, match=r"id `n\d` \(and 1 more\): the index has no such document"):
        remove_documents(tmp_path / "ix", ["d1", "n1", "n2"], tmp_path / "c", memory=1 << 20)
    assert contents(tmp_path / "ix") == before


def test_nothing_is_removed_without_a_file_that_tells_what_changed(tmp_path, corpus, monkeypatch):
    add(tmp_path, corpus[:9])
    before = contents(tmp_path / "ix")
    with pytest.raises(DataError, match="out: is a folder; name the file to write"):
        remove_documents(tmp_path / "ix", ["d1"], tmp_path / "out", memory=1 << 20)
    assert contents(tmp_path / "ix") == before
    commit = Index.commit

    def die_behind(self, segments, state, dumps):
        commit(self, segments, state, dumps)
        raise KeyboardInterrupt

    monkeypatch.setattr(Index, "commit", die_behind)
    with pytest.raises(KeyboardInterrupt):
        remove_documents(tmp_path / "ix", ["d1"], tmp_path / "changes.parquet", memory=1 << 20)
    assert contents(tmp_path / "ix") != before
    assert (tmp_path / "changes.parquet").exists()


def test_what_changed_is_on_disk_before_the_removal_is(tmp_path, corpus, monkeypatch):
    add(tmp_path, corpus[:9])
    synced = set()
    monkeypatch.setattr("os.fsync", lambda file: synced.add(os.fstat(file).st_ino))
    commit = Index.commit

    def look_and_commit(self, segments, state, dumps):
        assert (tmp_path / "changes.parquet").stat().st_ino in synced
        commit(self, segments, state, dumps)

    monkeypatch.setattr(Index, "commit", look_and_commit)
    remove_documents(tmp_path / "ix", ["d1"], tmp_path / "changes.parquet", memory=1 << 20)


def test_memory_is_written_with_its_unit():
    assert [parse_memory(text) for text in ("500MB", "1.5 GB")] == [500_000_000, 1_500_000_000]
    for text in ("500", "2gb", "GB"):
        with pytest.raises(DataError, match=rf"memory={text} is not allowed: .* 500MB or 2GB"):
            parse_memory(text)


KILLED = """
import json, os, signal, sys
from pathlib import Path
from data_pipeline.dedup.index import checked_settings, deduplicate_with_index

folder, name, calls, settings = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]

def kill(frame, event, argument):
    global calls
    if event == "call" and frame.f_code.co_qualname.endswith(name):
        calls -= 1
        if calls == 0:
            os.kill(os.getpid(), signal.SIGKILL)

checked = checked_settings(**json.loads(settings))
sys.setprofile(kill)
inputs = [folder / "dump.jsonl"]
deduplicate_with_index(inputs, folder / "out", folder / "ix", checked, memory=1 << 20)
"""


@pytest.mark.parametrize(
    ("place", "is_in"),
    [
        (("ColumnWriter.close", 12), False),  # in the middle of a segment
        (("Index.commit", 1), False),  # all is written
        (("_write_results", 1), True),  # before the results are
    ],
)
def test_a_kill_leaves_the_old_index_or_the_new_one(tmp_path, corpus, place, is_in):
    add(tmp_path, corpus[:60], "first")
    old = contents(tmp_path / "ix")
    write_jsonl(tmp_path / "dump.jsonl", corpus[60:])
    name, calls = place
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, tmp_path, name, str(calls), json.dumps(DEFAULT)], check=False
    )
    assert killed.returncode == -9
    assert not (tmp_path / "out/clusters.parquet").exists()
    export_clusters(tmp_path / "ix", tmp_path / "all.parquet")
    assert pq.read_metadata(tmp_path / "all.parquet").num_rows == (len(corpus) if is_in else 60)
    assert is_in or contents(tmp_path / "ix") == old
    report = add(tmp_path, corpus[60:])
    assert report.is_new is not is_in
    assert report.dump == 1
    assert len(clusters_of(tmp_path / "out")) == len(corpus) - 60
    assert len(documents_of(tmp_path / "out")) == report.kept


MEASURED = """
import json, sys
from pathlib import Path
from data_pipeline.dedup.index import checked_settings, deduplicate_with_index

folder, settings = Path(sys.argv[1]), checked_settings(**json.loads(sys.argv[2]))

def peak(number):
    Path("/proc/self/clear_refs").write_text("5")
    source, out = folder / f"{number}.parquet", folder / "out"
    deduplicate_with_index([source], out, folder / "ix", settings, memory=8_000_000)
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

print(json.dumps([peak(number) for number in range(8)]))
"""


def test_memory_does_not_grow_with_the_index(tmp_path):
    write_documents(tmp_path / "all.parquet", 80_000)
    table = pq.read_table(tmp_path / "all.parquet", columns=["id", "text"])
    table = table.take(np.random.default_rng(1).permutation(len(table)))
    for number in range(8):
        part = table.slice(number * 10_000, 10_000)
        pq.write_table(part, tmp_path / f"{number}.parquet", row_group_size=1000)
    command = [sys.executable, "-c", MEASURED, tmp_path, json.dumps(DEFAULT)]
    # Other allocators keep what was freed.
    frugal = os.environ | {"ARROW_DEFAULT_MEMORY_POOL": "system", "MALLOC_ARENA_MAX": "1"}
    output = subprocess.run(command, check=True, capture_output=True, text=True, env=frugal).stdout
    kilobytes = json.loads(output)
    size = sum(path.stat().st_size for path in (tmp_path / "ix").rglob("*") if path.is_file())
    assert size > 60_000_000
    assert (tmp_path / "ix/index.json").read_text().count("segment-") > 10
    assert max(kilobytes[4:]) - max(kilobytes[:2]) < 30_000
