import pytest

from pretrain.config import load_config
from pretrain.errors import UserError
from pretrain.layouts import resolve_layout
from pretrain.parallel_config import fewest_ranks


@pytest.mark.parametrize(
    ("settings", "ranks"),
    [
        ([], 1),
        (["parallel.tp=2"], 2),
        (["parallel.tp=2", "parallel.ep=2"], 2),
        (["parallel.ep=4"], 4),
        (["parallel.pp=2", "parallel.ep=2"], 4),
        (["parallel.dp_replicate=2", "parallel.tp=2", "parallel.ep=4"], 8),
        (["parallel.dp_shard=4", "parallel.cp=2"], 8),
    ],
)
def test_a_layout_can_be_on_so_few_ranks(settings: list[str], ranks: int) -> None:
    config = load_config("tiny-hybrid-moe", [*settings, "train.global_batch=8"])
    assert fewest_ranks(config.parallel) == ranks
    resolve_layout(config, ranks)


HOST = ["parallel.offload=host", "parallel.recompute=none"]


def test_offload_is_refused_where_nothing_would_be_offloaded() -> None:
    with pytest.raises(UserError, match=r"set parallel\.recompute=full, or context\.segments"):
        load_config("tiny-hybrid-moe", [*HOST, "context.lane_rows=2"])
    load_config("tiny-hybrid-moe", [*HOST, "data.seq_len=128", "context.segments=2"])
