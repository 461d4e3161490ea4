"""What a model predicts is the same in every layout: that of the whole model in one process."""

import shutil
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_pipeline.synthetic import Task
from data_pipeline.synthetic.shards import make_synthetic
from pretrain.config import load_config
from tests.ranks import run_on_ranks

SCRIPT = Path(__file__).with_name("sharded_cases.py")
MODEL = [
    "model.vocab_size=64",
    "model.d_model=32",
    "model.n_layers=4",
    "model.layer_pattern=[linear, softmax, linear, sliding]",
    "model.attention={n_heads: 4, n_kv_heads: 2, head_dim: 16, rope_base: 10000.0, window: 20}",
    "model.linear={n_key_heads: 2, n_value_heads: 4, key_dim: 16, value_dim: 16}",
    "model.moe={n_experts: 8, top_k: 2, d_expert: 32, d_shared_expert: 32, aux_loss: 0.01}",
    "model.init_std=0.2",
    "data.seq_len=128",
    "train.global_batch=4",
    "train.microbatch=2",
]
RESET = "context.segments=2 context.carry=false"
OFFLOAD = f"context.segments=2 parallel.offload=disk parallel.offload_dir={tempfile.gettempdir()}"
NO_ROOM = f"{OFFLOAD} parallel.offload_gib=1e-6"
LAYOUTS = {
    1: ["", "context.segments=2", RESET, OFFLOAD],
    2: [
        "parallel.cp=2 parallel.ep=2",
        "parallel.cp=2 parallel.ep=2 context.segments=2",
        "parallel.tp=2 parallel.dp_shard=1",
        "parallel.pp=2 parallel.pipeline.schedule=zbv",
    ],
    4: ["parallel.cp=2 parallel.tp=2 parallel.ep=4", "parallel.dp_shard=2 parallel.pp=2"],
}
ALL = [layout for layouts in LAYOUTS.values() for layout in layouts]
Found = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    folder = tmp_path_factory.mktemp("sharded")
    shards, run = folder / "shards", folder / "run"
    task = Task(name="multi_key", spread=True)
    make_synthetic(task, shards, length=64, documents=20, vocab_size=64, seed=0)
    run.mkdir()
    shutil.copy(shards / "tokenizer.json", run)
    config = load_config("tiny-hybrid-moe", [*MODEL, f"data.shards={shards}"])
    (run / "config.yaml").write_text(config.to_yaml())
    results: Found = {}
    for ranks, layouts in LAYOUTS.items():
        found, first = folder / f"{ranks}.pt", ["save"] if ranks == 1 else []
        no_room = [NO_ROOM] if ranks == 1 else []
        run_on_ranks(ranks, SCRIPT, str(run), str(found), *first, *layouts, *no_room)
        results |= torch.load(found, weights_only=False)
    return results


def test_predictions_are_those_of_all_logits_in_one_process(found: Found) -> None:
    expected = found["one process"]
    for predicted, _ in expected.values():
        assert len(set(predicted.tolist())) > 20, "no constant would do"
    for layout, documents in product(ALL, ("whole", "packed")):
        if layout == RESET:
            continue
        where = f"{documents} rows, {layout or 'one rank'}"
        (predicted, loss), (ours, our_loss) = expected[documents], found[layout][documents]
        np.testing.assert_array_equal(ours, predicted, err_msg=where)
        np.testing.assert_allclose(our_loss, loss, rtol=1e-4, err_msg=where)
    whole, packed, cut = (expected[name][0] for name in ("whole", "packed", "cut"))
    assert (whole != packed).any(), "documents matter"
    assert (whole != cut).any(), "what is carried over matters"
    np.testing.assert_array_equal(found[RESET]["whole"][0], cut)


def test_tasks_have_the_results_of_one_rank(found: Found) -> None:
    expected = found[""]["cells"]
    for layout in ALL[1:]:
        # A document that is one segment is the same for a model that begins each one anew.
        first = 1 if layout == RESET else 0
        for cell, wanted in zip(found[layout]["cells"][first:], expected[first:], strict=True):
            assert (cell.questions, cell.right) == (wanted.questions, wanted.right), layout
            assert cell.loss == pytest.approx(wanted.loss, rel=1e-4), layout


def test_loss_by_position_is_that_of_one_rank(found: Found) -> None:
    expected = found[""]["buckets"]
    # Rows of two documents with four answers each.
    assert sum(bucket.tokens for bucket in expected) == 3 * 2 * 4
    assert max(bucket.last for bucket in expected) <= 63
    for layout in ALL[1:]:
        for bucket, wanted in zip(found[layout]["buckets"], expected, strict=True):
            assert (bucket.first, bucket.tokens) == (wanted.first, wanted.tokens), layout
            assert bucket.loss == pytest.approx(wanted.loss, rel=1e-4), layout


def test_what_segments_hand_on_waits_where_the_run_says(found: Found) -> None:
    assert "no room to offload" in found[NO_ROOM]["error"]
