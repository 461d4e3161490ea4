"""What rows tell of weights, against the weights themselves."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from pretrain.config import TrainConfig
from pretrain.metrics.registry import check_names
from pretrain.metrics.survey import is_survey_due
from tests.ranks import run_on_ranks

RANKS = 2
SIZES = "data.seq_len=64 optim.lr=0.01 optim.weight_decay=0.5 schedule.warmup_steps=0"
CASES = {
    "ordinary": "",
    "in backward": "optim.in_backward=true optim.clip=null train.microbatch=4 "
    "model.moe.balance=bias",
    "bfloat16": "optim.state_dtype=bfloat16 model.moe.n_experts=0",
}


@pytest.fixture(scope="module")
def rows(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    folder = tmp_path_factory.mktemp("survey")
    cases = [f"{name}:{SIZES} {overrides}" for name, overrides in CASES.items()]
    script = Path(__file__).with_name("survey_cases.py")
    run_on_ranks(RANKS, script, str(shards), str(folder), *cases)
    return {
        name: [json.loads((folder / f"{name}-{rank}.json").read_text()) for rank in range(RANKS)]
        for name in CASES
    }


@pytest.mark.parametrize("name", CASES)
def test_updates_and_weights_are_those_that_are_there(
    name: str, rows: dict[str, list[Any]]
) -> None:
    # Stored moments in bfloat16 have been rounded after they were used.
    close = 3e-3 if name == "bfloat16" else 1e-4
    for rank in rows[name]:
        row = rank["row"]
        check_names(row)
        assert row["train/weight_norm"] == pytest.approx(rank["weight_norm"], rel=1e-6)
        update = row["train/update_ratio"] * row["train/weight_norm"]
        assert update == pytest.approx(rank["update_norm"], rel=close)
        # The embedding comes before the layers.
        of_layer = row["train/update_ratio_by_layer"][2]
        assert of_layer == pytest.approx(rank["of_layer_1"] / rank["weight_of_layer_1"], rel=close)
        for kind in ("train/weight_norm", "train/grad_norm"):
            squares = math.fsum(part**2 for part in row[f"{kind}_by_layer"])
            assert squares == pytest.approx(row[kind] ** 2, rel=1e-12)


def test_ranks_agree_on_all_but_their_clocks(rows: dict[str, list[Any]]) -> None:
    by_clock = {"perf/step_s", "perf/data_wait_share", "perf/exposed_communication_share"}
    by_clock |= {"perf/tokens_per_s", "perf/tokens_per_s_per_device", "perf/tflops_per_device"}
    for first, second in rows.values():
        keys = first["row"].keys() - by_clock
        assert {key: first["row"][key] for key in keys} == {key: second["row"][key] for key in keys}


def test_routers_are_told_of_where_there_are_any(rows: dict[str, list[Any]]) -> None:
    with_bias, without = rows["in backward"][0]["row"], rows["ordinary"][0]["row"]
    # Two steps of 0.001 up or down.
    assert 0 < with_bias["moe/selection_bias_range"] <= 0.004 + 1e-6
    assert "moe/selection_bias_range" not in without
    for row in (with_bias, without):
        assert 0.9 * math.log(8) < row["moe/router_entropy"] <= math.log(8)
    assert not {"moe/router_entropy", "moe/load"} & rows["bfloat16"][0]["row"].keys()


def test_tokens_are_counted_where_they_are_predicted(rows: dict[str, list[Any]]) -> None:
    row = rows["ordinary"][0]["row"]
    assert 8 * 64 - 100 < row["train/loss_tokens"] < 8 * 64
    assert row["perf/tokens_per_s"] == pytest.approx(RANKS * row["perf/tokens_per_s_per_device"])
    assert 0 <= row["perf/data_wait_share"] < 1
    assert row["perf/memory_peak"] > 100e6


def test_every_so_many_rows_tell_of_weights() -> None:
    train = TrainConfig(log_every=3, survey_every=2)
    assert [step for step in range(1, 20) if is_survey_due(step, train)] == [6, 12, 18]


def test_what_is_sent_is_told_by_axis(rows: dict[str, list[Any]]) -> None:
    row = rows["ordinary"][0]["row"]
    by_axis = row["perf/sent_bytes_by_axis"]
    assert by_axis.keys() == {"fsdp"}
    assert by_axis["fsdp"].keys() == {"all_gather", "reduce_scatter"}
    assert row["perf/sent_bytes"] == sum(by_axis["fsdp"].values()) > 0
