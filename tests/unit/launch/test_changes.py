"""What may change between two attempts of a run, and what only on demand."""

import json
import os
import shutil
from pathlib import Path

import pytest

from data_pipeline.funnel import save_funnel
from data_pipeline.shards import load_manifest, write_shards
from launch.prepare import prepare_run
from pretrain.config import load_config, phases_of, read_run_config
from pretrain.errors import UserError
from pretrain.run_dir import RunDirectory


@pytest.fixture
def prepare(shards: Path, tmp_path: Path):
    def prepare(*overrides: str, allow: tuple[str, ...] = ()) -> RunDirectory:
        config = load_config("tiny", [f"data.shards={shards}", *overrides])
        return prepare_run(config, tmp_path / "run", allow)

    return prepare


def changes_of(path: Path) -> dict[str, tuple]:
    rows = map(json.loads, path.read_text().splitlines())
    return {row["setting"]: (row["before"], row["now"]) for row in rows}


def contents(run: RunDirectory) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in run.root.glob("*.*") if path.is_file()}


def test_length_logging_and_layout_may_always_change(prepare) -> None:
    run = prepare()
    prepare("train.steps=7", "train.log_every=3", "parallel.tp=2", "checkpoint.keep=9")
    assert "steps: 7" in run.config.read_text()


def test_a_run_needs_no_git(prepare, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    assert json.loads(prepare().versions.read_text())["git"] == "not a git checkout"


def test_a_relative_folder_to_offload_to_is_the_same_from_any_other(
    prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, elsewhere, link = (tmp_path / name for name in ("here", "elsewhere", "link"))
    here.mkdir()
    link.symlink_to(elsewhere)
    monkeypatch.chdir(here)
    offload = ("parallel.recompute=full", "parallel.offload=disk")
    phases = "phases=[{from_step: 5, parallel: {offload_dir: later}}, {from_step: 9, optim.lr: 1}]"
    run = prepare(*offload, "parallel.offload_dir=scratch", phases)
    monkeypatch.chdir(tmp_path)
    folders = [phase.config.parallel.offload_dir for phase in phases_of(read_run_config(run))]
    assert folders == [str(here / "scratch"), str(here / "later"), str(here / "later")]

    run = prepare(*offload, f"parallel.offload_dir={link}", allow=("phases",))
    assert read_run_config(run).parallel.offload_dir == str(link)


def test_segments_may_change_where_the_gradient_is_that_of_the_whole_row(prepare) -> None:
    long = ("data.seq_len=512", "context.segments=4")
    run = prepare(*long)
    prepare("data.seq_len=512", "context.segments=2")
    assert "segments: 2" in run.config.read_text()
    with pytest.raises(UserError, match=r"(?s)context.gradient: .*context.segments: 2 -> 4"):
        prepare(*long, "context.gradient=detach")


@pytest.mark.parametrize(
    "cut",
    [
        "context.gradient=2",
        "context.carry=false",
        "phases=[{from_step: 10, context.gradient: detach}]",
    ],
)
def test_segments_that_decide_what_is_learned_may_not_change(prepare, cut: str) -> None:
    prepare("data.seq_len=512", cut, "context.segments=4")
    with pytest.raises(UserError, match=r"context\.segments: 4 -> 2"):
        prepare("data.seq_len=512", cut, "context.segments=2")


def test_a_change_that_matters_needs_its_own_permission_and_is_written_down(
    prepare, capsys: pytest.CaptureFixture[str]
) -> None:
    run = prepare("optim.lr=1e-3", "train.global_batch=8")
    before = contents(run)
    new = ("optim.lr=2e-3", "train.global_batch=4", "train.steps=7")
    with pytest.raises(UserError) as refusal:
        prepare(*new, allow=("optim.lr",))
    assert "train.global_batch: 8 -> 4" in str(refusal.value)
    assert "--allow-change train.global_batch" in str(refusal.value)
    assert "0.002" not in str(refusal.value)
    assert contents(run) == before

    prepare(*new, allow=("optim.lr", "train.global_batch"))
    printed = capsys.readouterr().out
    assert "allowed: optim.lr: 0.001 -> 0.002\n" in printed
    assert "allowed: train.global_batch: 8 -> 4\n" in printed
    attempt = run.begin_attempt()
    noted = changes_of(run.folder_of(attempt) / "changes.jsonl")
    assert noted["optim.lr"] == (0.001, 0.002)
    assert noted["train.global_batch"] == (8, 4)
    assert "train.steps" in noted
    assert not run.changes.exists()
    prepare(*new)


@pytest.mark.parametrize(
    ("setting", "why"),
    [
        ("optim.lr", "is not needed: .* has the same value"),
        ("train.steps", "is not needed: this setting may always change"),
        ("optim.learning_rate", "is not a setting, did you mean"),
        ("model.moe", "is a section; name one of its settings: model.moe."),
    ],
)
def test_a_permission_that_nothing_needs_is_refused(prepare, setting: str, why: str) -> None:
    prepare()
    with pytest.raises(UserError, match=f"--allow-change {setting}:? .*{why}"):
        prepare(allow=(setting,))


def test_a_new_run_needs_no_permission(prepare, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"optim\.lr is not needed: .* is a new run"):
        prepare(allow=("optim.lr",))
    assert not (tmp_path / "run" / "config.yaml").exists()
    prepare()


def test_what_the_checkpoints_cannot_follow_is_refused_even_if_allowed(
    prepare, shards: Path, tmp_path: Path
) -> None:
    run = prepare()
    before = contents(run)
    other = tmp_path / "other"
    write_shards([("a", "abc def " * 99)], shards / "tokenizer.json", other, extra={})
    for override, setting, why in (
        ("data.seed=5", "data.seed", "some would be trained on twice"),
        (f"data.shards={other}", "data.shards", "some would be trained on twice"),
        (f"data.shards=[{{path: {shards}}}, {{path: {other}}}]", "data.shards", "trained on twice"),
        ("model.d_model=64", "model.d_model", r"has the shape \(.*\) and would have \(.*64"),
    ):
        with pytest.raises(UserError, match="cannot be allowed"):
            prepare(override, allow=(setting,))
        with pytest.raises(UserError, match=why):
            prepare(override, allow=(setting,))
    assert contents(run) == before


def test_weights_of_sources_and_settings_that_shape_no_weight_may_change_if_allowed(
    prepare, shards: Path
) -> None:
    run = prepare("model.attention.rope_base=1e4")
    weighted = f"data.shards=[{{path: {shards}, weight: 2}}]"
    with pytest.raises(UserError, match=r"--allow-change data\.shards"):
        prepare(weighted, "model.attention.rope_base=1e4")
    prepare(
        weighted,
        "model.attention.rope_base=1e5",
        allow=("data.shards", "model.attention.rope_base"),
    )
    prepare(weighted, "model.attention.rope_base=1e5")
    assert changes_of(run.changes)["data.shards.0.weight"] == (1.0, 2.0)


def test_a_run_directory_that_cannot_be_made_is_named(shards: Path, tmp_path: Path) -> None:
    config = load_config("tiny", [f"data.shards={shards}"])
    (tmp_path / "file").touch()
    # Nobody may create a folder in /proc, not even root.
    for parent, why in ((Path("/proc/self"), "No such file"), (tmp_path / "file", "Not a dir")):
        with pytest.raises(UserError, match=f"run cannot be made: {why}"):
            prepare_run(config, parent.resolve() / "run")


def test_a_run_that_is_about_to_start_its_ranks_again_is_not_touched(prepare) -> None:
    run = prepare()
    with run.launching():
        before = contents(run)
        with pytest.raises(UserError, match=f"is in use by process {os.getpid()} on"):
            prepare("train.steps=9")
        assert contents(run) == before


def test_shards_may_move(prepare, shards: Path, tmp_path: Path) -> None:
    prepare()
    moved = tmp_path / "moved"
    shutil.copytree(shards, moved)
    prepare(f"data.shards={moved}")


def test_a_run_keeps_the_funnel_of_its_data_and_does_without_one(
    shards: Path, prepare, tmp_path: Path
) -> None:
    web = tmp_path / "web"
    shutil.copytree(shards, web)
    sources = f"data.shards=[{{path: {web}}}, {{path: {shards}, name: books}}]"
    assert not prepare(sources).funnel.exists()
    steps = [{"step": "crawl", "documents_in": 9, "dropped": []}]
    save_funnel(steps, web)
    (kept,) = json.loads(prepare(sources).funnel.read_text())
    assert (kept["source"], kept["steps"]) == ("web", steps)
    assert kept["tokens"] == load_manifest(web).tokens
    (web / "funnel.json").write_text("{")
    assert not prepare(sources).funnel.exists()
