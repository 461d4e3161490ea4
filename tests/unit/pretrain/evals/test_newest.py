"""An evaluation asks one checkpoint, with the settings that it was trained with, on all ranks."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.synthetic import Task
from data_pipeline.synthetic.shards import make_synthetic
from pretrain.config import load_config
from tests.ranks import run_on_ranks

SCRIPT = Path(__file__).with_name("newest_case.py")
SETTINGS = (
    "model.vocab_size=64",
    "model.d_model=32",
    "model.n_layers=2",
    "model.attention={n_heads: 2, n_kv_heads: 1, head_dim: 16}",
    "data.seq_len=64",
    "train.global_batch=2",
    "train.microbatch=1",
    "checkpoint.keep=9",
    "phases=[{from_step: 1, data.seq_len: 128, parallel.cp: 2}]",
)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank has found."""
    folder = tmp_path_factory.mktemp("newest")
    shards, run, results = folder / "shards", folder / "run", folder / "results.pt"
    make_synthetic(Task(name="multi_key"), shards, length=64, documents=20, vocab_size=64, seed=0)
    run.mkdir()
    shutil.copy(shards / "tokenizer.json", run)
    config = load_config("tiny", [*SETTINGS, f"data.shards={shards}"])
    (run / "config.yaml").write_text(config.to_yaml())
    run_on_ranks(2, SCRIPT, str(run), str(results))
    return torch.load(results)


def test_all_ranks_take_what_rank_0_finds_while_a_run_saves(found: list[dict[str, Any]]) -> None:
    assert [of_rank["whole"] for of_rank in found] == [(2, (128,))] * 2


def test_a_damaged_checkpoint_leaves_its_phase_to_itself(found: list[dict[str, Any]]) -> None:
    assert [of_rank["damaged"] for of_rank in found] == [(1, (64,))] * 2


def test_another_checkpoint_than_the_one_that_was_found_is_refused(
    found: list[dict[str, Any]],
) -> None:
    for of_rank in found:
        assert "checkpoint of step 2 in" in of_rank["removed"]
        assert "a run that goes on removes old ones" in of_rank["removed"]


def test_what_could_not_be_kept_is_not_evaluated(found: list[dict[str, Any]]) -> None:
    for of_rank in found:
        assert (
            "evals cannot be written, where evaluations are kept: File exists"
            in (of_rank["unkept"])
        )
