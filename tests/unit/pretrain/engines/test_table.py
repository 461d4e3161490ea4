"""docs/engines.md says of each engine what its checks say."""

import pytest

from pretrain.engines.table import PROBES, Probe, answer, table
from tests.ranks import ROOT


def test_the_page_has_what_the_command_prints() -> None:
    page = (ROOT / "docs/engines.md").read_text()
    assert table() in page, "it has another table than `python -m pretrain.engines.table` prints"


@pytest.mark.parametrize("probe", PROBES, ids=lambda probe: probe.title)
def test_one_engine_at_least_can_do_what_is_asked(probe: Probe) -> None:
    assert "yes" in {answer(engine, probe) for engine in ("native", "megatron", "deepspeed")}


def test_an_answer_has_the_reason_of_each_problem_once() -> None:
    probe = Probe("", ("parallel.tp=2", "parallel.ep=2", "context.segments=2"))
    refused = answer("deepspeed", probe)
    assert refused.count("ZeRO shares out whole layers") == 1
    assert refused.endswith("and it computes rows whole")
    assert "parallel.tp=1" not in refused
