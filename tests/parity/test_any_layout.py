"""What the configuration accepts is equal to one rank: any model, on any layout of 2 or 4 ranks."""

import json
import random
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, assume, given, note, settings
from hypothesis import strategies as st

from pretrain.config import load_config
from pretrain.errors import UserError
from pretrain.layouts import resolve_layout
from tests.parity.conftest import STEPS, TOLERANCE
from tests.parity.matrix import Ranks, difference
from tests.parity.models import SCHEDULES, SIZES

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "ulysses", "ep", "tp")
# They arrange ranks that other axes have.
FOLDED = ("ulysses", "ep")
# The same examples in every run: without `derandomize`, pytest meets new ones.
SETTINGS = settings(
    derandomize=True,
    deadline=None,
    database=None,
    print_blob=True,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


def multiple_of(few: int, times: int) -> dict[str, int]:
    return {"few": few, "many": few * times}


def has_router_gradient(mixture: dict[str, Any]) -> bool:
    """Not so where the weight of a token's only expert is always 1: there is but rounding."""
    return mixture["top_k"] > 1 or not mixture["renormalise_top_k"]


def has_more_than_one_gate(heads: dict[str, int]) -> bool:
    """The gradient of one number, A_log or dt_bias, may be a sum that cancels: with chunks of 16
    tokens instead of 64, one rank alone differs from itself by more than the tolerance.
    """
    return heads["many"] > 1


HEADS = st.builds(multiple_of, st.sampled_from([2, 1, 4, 3]), st.sampled_from([2, 1, 4]))
DIMS = st.sampled_from([8, 16])
KINDS = st.lists(st.sampled_from(["linear", "softmax", "sliding"]), min_size=1, max_size=3)
ATTENTION = st.fixed_dictionaries(
    {
        "head_dim": DIMS,
        "output_gate": st.booleans(),
        "rope_fraction": st.sampled_from([0.5, 1.0]),
        "window": st.sampled_from([3, 20, 100]),
    }
)
LINEAR = st.fixed_dictionaries(
    {"key_dim": DIMS, "value_dim": DIMS, "conv_width": st.sampled_from([2, 4])}
)
MIXTURE = st.fixed_dictionaries(
    {
        "n_experts": st.sampled_from([4, 6, 8]),
        "top_k": st.sampled_from([1, 2, 3]),
        "d_expert": st.sampled_from([16, 24]),
        "d_shared_expert": st.sampled_from([0, 12, 16]),
        "renormalise_top_k": st.booleans(),
        "aux_loss": st.sampled_from([0.0, 0.01]),
        "z_loss": st.sampled_from([0.0, 0.001]),
        "balance": st.sampled_from(["batch", "sequence", "bias"]),
        "capacity_factor": st.sampled_from([None, 1.0, 1.5]),
    }
).filter(has_router_gradient)


@st.composite
def models(draw: st.DrawFn) -> list[str]:
    """Overrides that describe a model and its batches."""
    queries, keys = draw(HEADS), draw(HEADS.filter(has_more_than_one_gate))
    model = {
        "vocab_size": draw(st.sampled_from([512, 512, 512, 509])),
        "d_model": draw(st.sampled_from([32, 40, 64])),
        "n_layers": draw(st.integers(2, 5)),
        "layer_pattern": draw(KINDS),
        "d_ff": draw(st.sampled_from([40, 96])),
        "attention": {
            **draw(ATTENTION),
            "n_heads": queries["many"],
            "n_kv_heads": queries["few"],
            "rope_base": 10000.0,
        },
        "linear": {
            **draw(LINEAR),
            "n_key_heads": keys["few"],
            "n_value_heads": keys["many"],
        },
        "moe": draw(st.one_of(st.just({"n_experts": 0}), MIXTURE)),
        "tie_embeddings": draw(st.booleans()),
        "zero_centered_norm": draw(st.booleans()),
    }
    return [
        *(size for size in SIZES if not size.startswith("model.")),
        f"model={json.dumps(model)}",
        f"data.seq_len={draw(st.sampled_from([40, 64, 96]))}",
        f"train.global_batch={draw(st.sampled_from([4, 8]))}",
    ]


def accepted_layouts(model: list[str], ranks: int) -> list[list[str]]:
    """The overrides of all layouts that the configuration does not refuse."""
    powers = [n for n in (1, 2, 4) if n <= ranks]
    accepted = []
    for sizes in product(powers, repeat=len(AXES)):
        own_ranks = [n for axis, n in zip(AXES, sizes, strict=True) if axis not in FOLDED]
        if prod(own_ranks) != ranks:
            continue
        layout = [f"parallel.{axis}={size}" for axis, size in zip(AXES, sizes, strict=True)]
        for name in SCHEDULES if sizes[0] > 1 else SCHEDULES[:1]:
            overrides = [*layout, f"parallel.pipeline.schedule={name}", "train.microbatch=1"]
            try:
                resolve_layout(load_config("tiny-hybrid-moe", [*model, *overrides]), ranks)
            except UserError:
                continue
            accepted.append(overrides)
    return accepted


@st.composite
def cases(draw: st.DrawFn) -> tuple[int, list[str], list[str]]:
    """Ranks, a model, and a layout that it is accepted on."""
    ranks = draw(st.sampled_from([4, 2]))
    model = draw(models())
    accepted = accepted_layouts(model, ranks)
    by_axis = [
        [layout for layout in accepted if f"parallel.{axis}=1" not in layout] for axis in AXES
    ]
    assume(any(by_axis))
    # Drawn by hypothesis, most layouts would be the first of all.
    chance = random.Random(str(model))
    layout = chance.choice(chance.choice([some for some in by_axis if some]))
    modes = st.lists(st.sampled_from(["none", "selective", "full"]), min_size=1, max_size=3)
    recompute = json.dumps(draw(modes))
    return ranks, model, [*layout, f"parallel.recompute={recompute}"]


def check(case: tuple[int, list[str], list[str]], data: Path, ranks: Ranks) -> None:
    n_ranks, model, layout = case
    model = [*model, f"data.shards={data}"]
    one_rank = ranks.run(1, model, STEPS, routing="record")
    ours = ranks.run(n_ranks, [*model, *layout], STEPS, routing=str(one_rank.folder))
    worst = difference(ours, one_rank)
    note(f"{worst}")
    assert worst.error <= TOLERANCE


@settings(SETTINGS, max_examples=6)
@given(case=cases())
def test_accepted_means_equal(case: Any, parity_shards: Path, ranks: Ranks) -> None:
    check(case, parity_shards / "packed", ranks)


@pytest.mark.slow
@pytest.mark.parametrize("data", ["packed", "whole"])
@settings(SETTINGS, max_examples=15)
@given(case=cases())
def test_accepted_means_equal_for_many(
    case: Any, data: str, parity_shards: Path, ranks: Ranks
) -> None:
    check(case, parity_shards / data, ranks)
