"""The matrix is worth something: a collective that is broken on purpose never passes it."""

import pytest

from tests.parity.conftest import STEPS, TOLERANCE, Compare
from tests.parity.models import Setting, schedule

PIPELINE = Setting("tied-moe", "packed", "pp=2", (schedule("1f1b"),))
TENSOR = Setting("linear-moe", "packed", "tp=2")
CONTEXT = Setting("hybrid-moe", "packed", "cp=2")
BROKEN = {
    "own_gradients_in_fsdp": Setting("hybrid-moe", "packed", "dp_shard=2"),
    "own_gradients_in_hsdp": Setting("tied", "whole", "dp_replicate=2"),
    "own_part_of_activations": TENSOR,
    "shards_in_the_wrong_order": TENSOR,
    "own_gradients_of_replicas": TENSOR,
    "rows_of_other_tokens": Setting("linear-moe", "packed", "dp_shard=2 ep=2"),
    "forgotten_halo": CONTEXT,
    "state_not_reset": CONTEXT,
    "state_of_the_wrong_block": Setting("linear", "whole", "cp=4"),
    "lse_not_merged": CONTEXT,
    "keys_that_do_not_travel": CONTEXT,
    "stale_activations": PIPELINE,
    "stale_gradients": PIPELINE,
    "own_gradients_of_tied_copies": PIPELINE,
}


@pytest.mark.parametrize("breaks", BROKEN)
def test_a_broken_collective_is_noticed(breaks: str, compare: Compare) -> None:
    assert compare(BROKEN[breaks], STEPS, breaks).error > 100 * TOLERANCE
