"""What a model predicts is the same in every layout: that of the whole model in one process."""

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
    "data.seq_len=64",
    "train.global_batch=4",
    "train.microbatch=2",
]
LAYOUTS = {
    2: [
        "parallel.cp=2 parallel.ep=2",
        "parallel.tp=2 parallel.ep=2",
        "parallel.dp_shard=2",
        "parallel.pp=2",
        "parallel.pp=2 parallel.pipeline.schedule=zbv",
    ],
    4: ["parallel.cp=2 parallel.tp=2 parallel.ep=4"],
}
ON_SEVERAL_RANKS = [layout for layouts in LAYOUTS.values() for layout in layouts]
Found = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    folder = tmp_path_factory.mktemp("sharded")
    shards, run = folder / "shards", folder / "run"
    task = Task(name="multi_key", spread=True)
    make_synthetic(task, shards, length=64, documents=20, vocab_size=64, seed=0)
    run.mkdir()
    config = load_config("tiny-hybrid-moe", [*MODEL, f"data.shards={shards}"])
    (run / "config.yaml").write_text(config.to_yaml())
    run_on_ranks(1, SCRIPT, str(run), str(folder / "1.pt"), "save")
    for ranks, layouts in LAYOUTS.items():
        run_on_ranks(ranks, SCRIPT, str(run), str(folder / f"{ranks}.pt"), *layouts)
    results: Found = {}
    for ranks in (1, *LAYOUTS):
        results |= torch.load(folder / f"{ranks}.pt", weights_only=False)
    return results


def test_predictions_are_those_of_all_logits_in_one_process(found: Found) -> None:
    expected = found["one process"]
    for documents, (predicted, loss) in expected.items():
        assert len(set(predicted.tolist())) > 20, "no constant would do"
        for layout in ["", *ON_SEVERAL_RANKS]:
            ours, our_loss = found[layout][documents]
            where = f"{documents} rows, {layout or 'one rank'}"
            np.testing.assert_array_equal(ours, predicted, err_msg=where)
            np.testing.assert_allclose(our_loss, loss, rtol=1e-4, err_msg=where)
    whole, packed = (expected[documents][0] for documents in ("whole", "packed"))
    assert (whole != packed).any(), "documents matter"


def test_tasks_have_the_results_of_one_rank(found: Found) -> None:
    expected = found[""]["cells"]
    for layout in ON_SEVERAL_RANKS:
        for cell, on_one_rank in zip(found[layout]["cells"], expected, strict=True):
            assert (cell.questions, cell.right) == (on_one_rank.questions, on_one_rank.right), (
                layout
            )
            assert cell.loss == pytest.approx(on_one_rank.loss, rel=1e-4), layout
