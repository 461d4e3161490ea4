"""Parts of a run, cleaned at a time or one after the other, make the run that one process makes."""

import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from data_pipeline.errors import DataError
from data_pipeline.parts import Part, PartedRun, State, state_of
from data_pipeline.recipe import load_recipe
from data_pipeline.run import run
from data_pipeline.run_folder import UNKNOWN, exclusive, record_plan, shared
from data_pipeline.sample import make_sample_crawl
from data_pipeline.stage import FILES as FILES_SHA256
from data_pipeline.stage import damage_of, make_stage
from tests.files import contents
from tests.ranks import ROOT, TIMEOUT_S

PARTS = 3
FILES = 5


@pytest.fixture(scope="module")
def crawl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("crawl")
    make_sample_crawl(folder, pages=80, files=FILES, seed=4)
    return folder


@pytest.fixture(scope="module")
def whole(crawl: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("whole") / "data"
    run([str(crawl)], out, load_recipe("demo"), vocab_size=600)
    return contents(out)


def _command(crawl: Path, out: Path, *more: str) -> list[str]:
    farspan = [sys.executable, "-m", "launch.cli", "data", "run", str(crawl), "--out", str(out)]
    return [*farspan, "--recipe", "demo", "--vocab-size", "600", *more]


def test_parts_at_a_time_one_of_them_killed_and_started_again(
    crawl: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "data"
    tasks = [f"{number}/{PARTS}" for number in range(1, PARTS + 1)]
    processes = [
        subprocess.Popen(
            _command(crawl, out, "--task", task), cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        for task in tasks
    ]
    killed = processes[0]
    assert killed.stdout
    for line in killed.stdout:
        if line.startswith("clean: 0 of"):
            break
    os.kill(killed.pid, signal.SIGKILL)
    for process in processes[1:]:
        printed, _ = process.communicate(timeout=TIMEOUT_S)
        assert process.returncode == 0
        assert "cleaned part" in printed
    killed.communicate()
    for task in (tasks[0], tasks[2]):  # the one that was killed, and one that is done
        subprocess.run(_command(crawl, out, "--task", task), cwd=ROOT, check=True)
    assert sorted(path.name for path in (out / "work" / "pieces").iterdir()) == [
        f"{number:05d}" for number in range(FILES)
    ]
    rest = subprocess.run(
        _command(crawl, out), cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True
    )
    assert f"clean: {FILES} of {FILES}" in rest.stdout
    assert "clean: 0 of" not in rest.stdout
    assert contents(out) == whole


def test_a_run_does_what_parts_have_left(
    crawl: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "data"
    recipe = load_recipe("demo")
    parted = PartedRun([str(crawl)], out, recipe, vocab_size=600)
    assert parted.clean(Part(2, 3)) == 2
    assert len(list((out / "work" / "pieces").iterdir())) == 2
    run([str(crawl)], out, recipe, vocab_size=600)
    assert contents(out) == whole
    assert parted.clean(Part(1, 3)) == 2
    assert not (out / "work").exists()


def test_there_may_be_more_parts_than_archives_and_shards(
    crawl: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "data"
    none = subprocess.run(
        _command(crawl, out, "--task", "6/64"), cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert none.returncode == 0
    assert f"{out}: cleaned part 6/64, 0 archives" in none.stdout
    parted = PartedRun([str(crawl)], out, load_recipe("demo"), vocab_size=600)
    assert sum(parted.clean(Part(number, 64)) for number in range(1, 65)) == FILES
    assert parted.deduplicate() == 1
    assert [parted.write_shards(Part(number, 3)) for number in (3, 2, 1)] == [0, 0, 1]
    parted.finish()
    assert contents(out) == whole


def test_every_step_in_parts_makes_the_shards_of_one_process(
    crawl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_pipeline.run.TOKENS_PER_SHARD", 50_000)
    recipe = load_recipe("demo")
    run([str(crawl)], tmp_path / "whole", recipe, vocab_size=600)
    out = tmp_path / "data"
    parted = PartedRun([str(crawl)], out, recipe, vocab_size=600)
    assert parted.state() == State((False,) * FILES, None, is_finished=False)
    assert not out.exists()
    for number in (1, 2):
        parted.clean(Part(number, 3))
    assert parted.state() == State((True, True, False, True, True), None, is_finished=False)
    with pytest.raises(DataError, match=r"not deduplicated yet, so that nobody knows its shards"):
        parted.write_shards(Part(1, 2))
    with pytest.raises(DataError, match=r"1 of 5 archives are not cleaned, .*-00002"):
        parted.deduplicate()
    parted.clean(Part(3, 3))
    shards = parted.deduplicate()
    assert shards >= 4
    assert parted.state() == State((True,) * FILES, (False,) * shards, is_finished=False)
    assert parted.write_shards(Part(2, 3)) == len(range(1, shards, 3))
    assert parted.state().written == tuple(number % 3 == 1 for number in range(shards))
    result = parted.finish()
    assert result.is_new
    assert not parted.finish().is_new
    assert parted.state() == State((True,) * FILES, (), is_finished=True)
    assert contents(out) == contents(tmp_path / "whole")
    assert parted.deduplicate() == parted.write_shards(Part(1, 3)) == 0


def test_what_is_damaged_on_the_way_is_named_and_made_again(
    crawl: Path, whole: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parted = PartedRun([str(crawl)], tmp_path / "data", load_recipe("demo"), vocab_size=600)
    parted.clean(Part(1, 1))
    damaged = tmp_path / "data" / "work" / "pieces" / "00003" / "documents.parquet"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"1 of 5 archives are not cleaned, .*-00003"):
        parted.deduplicate()
    assert "documents.parquet is damaged" in capsys.readouterr().err
    assert parted.state().cleaned == (True, True, True, False, True)
    parted.clean(Part(4, 5))
    shards = parted.deduplicate()
    for name, step in (
        ("dedup/documents/part-00001.parquet", lambda: parted.write_shards(Part(1, 1))),
        ("dedup/clusters.parquet", parted.finish),
        ("tokenizer/tokenizer.json", parted.finish),
        ("plans/plans.json", lambda: parted.write_shards(Part(1, 1))),
    ):
        damaged = tmp_path / "data" / "work" / name
        damaged.write_bytes(damaged.read_bytes()[:-1])
        with pytest.raises(DataError, match=f"{damaged} is damaged: .*; deduplicate again, which"):
            step()
        assert parted.state().written is None
        assert parted.deduplicate() == shards
    damaged = tmp_path / "data" / "work" / "pieces" / "00003" / "audit.parquet"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"1 of 5 archives are not cleaned, .*-00003"):
        parted.finish()
    assert parted.state().cleaned == (True, True, True, False, True)
    parted.clean(Part(4, 5))
    parted.finish()
    assert contents(tmp_path / "data") == whole


def test_a_piece_of_before_there_were_examples_is_cleaned_again(
    crawl: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    def write_older(name: str) -> None:
        piece = tmp_path / "data" / "work" / "pieces" / name
        (piece / "examples.json").unlink()
        files = (piece / FILES_SHA256).read_bytes().partition(b"\n")[2]
        listed = {name: sha for name, sha in json.loads(files).items() if name != "examples.json"}
        content = json.dumps(listed).encode()
        digest = hashlib.sha256(content).hexdigest().encode()
        (piece / FILES_SHA256).write_bytes(digest + b"\n" + content)
        assert damage_of(piece) is None

    recipe = load_recipe("demo")
    parted = PartedRun([str(crawl)], tmp_path / "data", recipe, vocab_size=600)
    parted.clean(Part(1, 1))
    write_older("00002")
    with pytest.raises(DataError, match=r"1 of 5 archives are not cleaned, .*-00002"):
        parted.deduplicate()
    parted.clean(Part(3, 5))
    parted.deduplicate()
    write_older("00003")
    with pytest.raises(DataError, match=r"1 of 5 archives are not cleaned, .*-00003"):
        parted.finish()
    parted.clean(Part(4, 5))
    write_older("00001")
    run([str(crawl)], tmp_path / "data", recipe, vocab_size=600)
    assert contents(tmp_path / "data") == whole


@pytest.mark.parametrize("gone", [".", "pieces", "plans"])
def test_a_run_that_ends_while_its_state_is_read_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gone: str
) -> None:
    work = tmp_path / "work"
    (work / "pieces" / "00000").mkdir(parents=True)
    make_stage(work / "plans", lambda out: (out / "plans.json").write_text("[]"))
    is_dir, is_file = Path.is_dir, Path.is_file

    def end() -> None:
        (tmp_path / "manifest.json").touch()
        shutil.rmtree(work / gone, ignore_errors=True)

    def seen(look: Callable[[Path], bool], path: Path) -> bool:
        found = look(path)
        end()
        return found

    monkeypatch.setattr(Path, "is_dir", lambda path: seen(is_dir, path))
    monkeypatch.setattr(Path, "is_file", lambda path: seen(is_file, path))
    assert state_of(tmp_path, 1).cleaned == (True,)
    assert state_of(tmp_path, 1).written == ()


def test_a_moment_of_a_look_at_the_lock_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".lock").touch()
    look = (tmp_path / ".lock").open("rb")
    fcntl.flock(look, fcntl.LOCK_SH)
    monkeypatch.setattr("data_pipeline.run_folder.sleep", lambda seconds: look.close())
    with (
        exclusive(tmp_path),
        pytest.raises(DataError, match="is in use by process"),
        shared(tmp_path),
    ):
        pass
    assert look.closed


def test_parts_of_other_options_and_of_changed_archives_are_refused(
    crawl: Path, tmp_path: Path
) -> None:
    source, out, recipe = tmp_path / "crawl", tmp_path / "data", load_recipe("demo")
    source.mkdir()
    for path in crawl.iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    parted = PartedRun([str(source)], out, recipe, vocab_size=600)
    parted.clean(Part(1, 5))
    with pytest.raises(DataError, match="vocab_size: 600 -> 700"):
        replace(parted, vocab_size=700).clean(Part(2, 5))
    changed = min(source.iterdir())
    changed.write_bytes(changed.read_bytes() + b"\n")
    for again in (
        lambda: parted.clean(Part(1, 5)),
        lambda: run([str(source)], out, recipe, vocab_size=600),
    ):
        with pytest.raises(DataError, match=rf"{changed}: has changed since a part of this run"):
            again()


def test_the_rest_of_a_run_waits_for_its_parts(crawl: Path, tmp_path: Path) -> None:
    out = tmp_path / "data"
    with shared(out), shared(out):
        with pytest.raises(DataError, match=r"in use by process \d+ on \S+: wait for it or stop"):
            run([str(crawl)], out, load_recipe("demo"), vocab_size=600)
        record_plan(out, {"inputs": {}})
    with exclusive(out), pytest.raises(DataError, match=r"in use by process \d+ on"):
        PartedRun([str(crawl)], out, load_recipe("demo"), vocab_size=600).clean(Part(1, 2))


def test_a_plan_takes_what_it_did_not_know(tmp_path: Path) -> None:
    record_plan(tmp_path, {"inputs": {"a": UNKNOWN, "b": UNKNOWN}, "size": 1})
    record_plan(tmp_path, {"inputs": {"a": {"sha256": "1"}, "b": UNKNOWN}, "size": 1})
    record_plan(tmp_path, {"inputs": {"a": UNKNOWN, "b": {"sha256": "2"}}, "size": 1})
    expected = {"inputs": {"a": {"sha256": "1"}, "b": {"sha256": "2"}}, "size": 1}
    assert json.loads((tmp_path / "plan.json").read_text()) == expected
    with pytest.raises(DataError, match=r"inputs\.b\.sha256: 2 -> 3"):
        record_plan(tmp_path, {"inputs": {"a": UNKNOWN, "b": {"sha256": "3"}}, "size": 1})
    with pytest.raises(DataError, match=r"inputs\.c: absent -> \?"):
        record_plan(tmp_path, {"inputs": {"a": UNKNOWN, "b": UNKNOWN, "c": UNKNOWN}, "size": 1})
    assert json.loads((tmp_path / "plan.json").read_text()) == expected


@pytest.mark.parametrize("task", ["0/3", "4/3", "1", "a/b", "1/-2", "1/2/3"])
def test_a_part_that_does_not_exist_is_refused(crawl: Path, tmp_path: Path, task: str) -> None:
    from launch.data import _parse_part

    with pytest.raises(DataError, match=f"task={task} is not allowed: it is I/N"):
        _parse_part(task, "native")
    with pytest.raises(DataError, match="task=1/2 with engine=ray"):
        _parse_part("1/2", "ray")
