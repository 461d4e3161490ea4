"""A checkpoint of any layout goes on in any other."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.ranks import run_on_ranks

SCRIPT = Path(__file__).with_name("reshard_case.py")
COMMON = (
    "model.tie_embeddings=true,train.microbatch=1,data.seq_len=128,optim.clip=0.5,"
    "model.moe.balance=bias"
)
LAYOUTS = [
    "parallel.tp=2",
    "parallel.cp=2,parallel.ep=4",
    "parallel.pp=2,parallel.ep=2",
    "parallel.cp=4,parallel.ulysses=2",
    "parallel.pp=2,parallel.tp=2,parallel.pipeline.schedule=zbv",
    "parallel.ep=4",
    "parallel.dp_replicate=2,parallel.tp=2",
    "parallel.pp=4",
    "parallel.dp_shard=4",
]


@pytest.mark.slow
def test_a_run_that_changes_its_layout_at_each_step_is_the_same_run(
    shards: Path, tmp_path: Path
) -> None:
    changing = [f"{layout},{COMMON}" for layout in LAYOUTS]
    staying = [f"parallel.dp_shard=4,{COMMON}", *["keep"] * (len(LAYOUTS) - 1)]
    series = {}
    for name, steps in {"changing": changing, "staying": staying}.items():
        results = tmp_path / f"{name}.json"
        run_on_ranks(4, SCRIPT, str(shards), str(tmp_path / name), str(results), *steps)
        series[name] = json.loads(results.read_text())
    np.testing.assert_allclose(series["changing"], series["staying"], rtol=1e-5)
