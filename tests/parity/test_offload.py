"""What layers keep may wait in a file, on every layout."""

from pathlib import Path

import pytest

from tests.parity.conftest import STEPS, TOLERANCE
from tests.parity.matrix import Ranks, difference
from tests.parity.models import Setting, schedule

LAYOUTS = [
    Setting(
        "hybrid-moe", "packed", "dp_shard=2 cp=2 ep=2", ("parallel.recompute=[full, selective]",)
    ),
    Setting("tied-moe", "packed", "pp=2 tp=2", (schedule("zbv"), "parallel.recompute=full")),
]


@pytest.mark.parametrize("setting", LAYOUTS, ids=str)
def test_a_layout_equals_one_rank(
    setting: Setting, ranks: Ranks, parity_shards: Path, tmp_path: Path
) -> None:
    disk = ["parallel.offload=disk", f"parallel.offload_dir={tmp_path}"]
    one_rank = ranks.run(1, setting.of_one_rank(parity_shards), STEPS)
    ours = ranks.run(setting.ranks, [*setting.overrides(parity_shards), *disk], STEPS)
    worst = difference(ours, one_rank)
    assert worst.error <= TOLERANCE, worst
