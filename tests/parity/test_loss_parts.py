"""In every layout, the loss by source and by position is that of those tokens, and adds up."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.parity.loss_parts_case import BUCKET, SOURCE
from tests.parity.models import MODELS, SIZES, schedule
from tests.ranks import run_on_ranks

RANKS, SEQ_LEN = 4, 256
SCRIPT = Path(__file__).with_name("loss_parts_case.py")
CASES = {
    "whole rows": ["parallel.dp_shard=4"],
    "shared vocabulary in a pipeline": [
        "parallel.pp=2",
        "parallel.tp=2",
        "train.microbatch=1",
        schedule("zbv"),
    ],
    # 27 tokens do not divide those of a rank.
    "shared rows": ["parallel.cp=2", "parallel.tp=2", "train.loss_chunk=27"],
    "segments": [
        "parallel.cp=2",
        "parallel.dp_shard=2",
        "context.segments=4",
        "context.gradient=2",
    ],
    "lanes": ["parallel.dp_shard=4", "context.lane_rows=4", *MODELS["sliding"]],
}


@pytest.fixture(scope="module")
def found(parity_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """Of each case, what each rank measured."""
    folder = tmp_path_factory.mktemp("loss-parts")
    sources = [{"path": str(parity_shards / name)} for name in ("packed", "whole")]
    common = [
        *SIZES,
        f"data.shards={json.dumps(sources)}",
        f"data.seq_len={SEQ_LEN}",
        "train.microbatch=2",
    ]
    cases = {name: [*common, *overrides] for name, overrides in CASES.items()}
    run_on_ranks(RANKS, SCRIPT, str(folder), json.dumps(cases))
    return {
        name: [json.loads((folder / f"{name}-{rank}.json").read_text()) for rank in range(RANKS)]
        for name in CASES
    }


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("parts", ["by_source", "by_position"])
def test_parts_add_up_to_the_loss(parts: str, case: str, found: dict[str, list[Any]]) -> None:
    for rank in found[case]:
        assert sum(tokens for _, tokens in rank[parts]) == rank["loss_tokens"]
        total = math.fsum(loss * tokens for loss, tokens in rank[parts] if tokens)
        assert total / rank["loss_tokens"] == pytest.approx(rank["loss"], rel=1e-12)
        assert all(math.isnan(loss) == (not tokens) for loss, tokens in rank[parts])


@pytest.mark.parametrize("case", [case for case in CASES if case != "lanes"])
def test_a_part_is_the_loss_of_its_tokens_alone(case: str, found: dict[str, list[Any]]) -> None:
    for rank in found[case]:
        loss, tokens = rank["of_source"]
        assert rank["by_source"][SOURCE] == [pytest.approx(loss, rel=1e-6), tokens]
        loss, tokens = rank["of_bucket"]
        assert rank["by_position"][BUCKET] == [pytest.approx(loss, rel=1e-6), tokens]
        assert 0 < tokens < rank["loss_tokens"] / 2


def test_rows_that_go_on_with_a_document_know_how_much_came_before(
    found: dict[str, list[Any]],
) -> None:
    longest = SEQ_LEN.bit_length()
    for rank in found["lanes"]:
        assert sum(tokens for _, tokens in rank["by_position"][longest:]) > 0
    assert len(found["whole rows"][0]["by_position"]) == longest


def test_ranks_of_a_pipeline_wait_for_each_other(found: dict[str, list[Any]]) -> None:
    for rank in found["shared vocabulary in a pipeline"]:
        assert 0 < rank["pipeline_bubble"] < 1
    for of_ranks in found.values():
        assert all(rank["exposed_communication_s"] > 0 for rank in of_ranks)
        assert len({rank["exposed_communication_s"] for rank in of_ranks}) == 1
