"""A run in phases: what each of them is, and which make no sense."""

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pretrain.config import Config, load_config, parse_config, phases_of
from pretrain.curriculum import phase_at, phase_of_checkpoint, steps_within, tokens_until
from pretrain.errors import UserError
from pretrain.layouts import resolve_layouts
from pretrain.schedule import learning_rate

BASE = {
    "data": {"seq_len": 64},
    "train": {"steps": 100, "global_batch": 8},
    "optim": {"lr": 1e-3},
    "schedule": {"name": "cosine", "warmup_steps": 5},
}


def with_phases(*phases: dict, **sections: dict) -> Config:
    return parse_config(BASE | sections | {"phases": list(phases)})


def rates(config: Config) -> list[float]:
    phases = phases_of(config)
    configs = [phase_at(phases, step).config for step in range(config.train.steps)]
    return [
        learning_rate(step, of.train.steps, of.optim.lr, of.schedule)
        for step, of in enumerate(configs)
    ]


def test_a_phase_has_the_settings_of_those_before_and_its_own() -> None:
    config = with_phases(
        {"from_step": 10, "data.seq_len": 128, "model.attention.rope_base": 1e6},
        {"from_step": 20, "data": {"seq_len": 256}, "train": {"global_batch": 2}},
        {"from_step": 40, "model.attention.yarn": {"factor": 4, "original_length": 256}},
    )
    phases = phases_of(config)

    assert [(phase.first, phase.stop) for phase in phases] == [
        (0, 10),
        (10, 20),
        (20, 40),
        (40, None),
    ]
    seen = [
        (
            phase.config.data.seq_len,
            phase.config.train.global_batch,
            phase.config.model.attention.rope_base,
            phase.config.model.attention.yarn.factor,
        )
        for phase in phases
    ]
    assert seen == [(64, 8, 1e7, 1), (128, 8, 1e6, 1), (256, 2, 1e6, 1), (256, 2, 1e6, 4)]
    assert all(phase.config.phases == () for phase in phases)
    assert [phase.config.train.steps for phase in phases] == [100] * 4


def test_a_configuration_with_phases_comes_back_from_its_file() -> None:
    second = {"from_tokens": 2e4, "optim.lr": 1, "weights": {"a": 2}}
    config = with_phases({"from_step": 10, "data.seq_len": 128}, second)
    again = parse_config(yaml.safe_load(config.to_yaml()))
    assert again == config
    assert phases_of(again) == phases_of(config)


def test_the_first_phase_may_begin_at_the_beginning() -> None:
    (only,) = phases_of(with_phases({"from_step": 0, "data.seq_len": 32}))
    assert (only.first, only.config.data.seq_len) == (0, 32)


def test_a_checkpoint_at_a_switch_is_of_the_phase_before() -> None:
    phases = phases_of(with_phases({"from_step": 10, "data.seq_len": 128}))
    assert [phase_of_checkpoint(phases, step).number for step in (0, 9, 10, 11)] == [1, 1, 1, 2]
    assert [phase_at(phases, step).number for step in (0, 9, 10, 11)] == [1, 1, 2, 2]


@given(
    steps=st.lists(st.integers(1, 30), min_size=1, max_size=4),
    sizes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 300)), min_size=4, max_size=4),
    at=st.integers(0, 200),
)
def test_tokens_are_the_sum_of_what_the_steps_have(
    steps: list[int], sizes: list[tuple[int, int]], at: int
) -> None:
    begins = [sum(steps[:n]) for n in range(1, len(steps))]
    config = with_phases(
        {"from_step": 0, "train.global_batch": sizes[0][0], "data.seq_len": sizes[0][1]},
        *(
            {"from_step": first, "train.global_batch": batch, "data.seq_len": length}
            for first, (batch, length) in zip(begins, sizes[1:], strict=False)
        ),
    )
    phases = phases_of(config)
    of_step = [batch * length for batch, length in sizes[: len(phases)]]
    number = [sum(first <= step for first in begins) for step in range(at)]

    assert tokens_until(phases, at) == sum(of_step[n] for n in number)
    assert steps_within(phases, tokens_until(phases, at)) == at


def test_a_phase_from_a_token_begins_with_the_first_step_after_it() -> None:
    # A step has 512 tokens, and of the second phase 1,024.
    phases = phases_of(
        with_phases(
            {"from_tokens": 512 * 4, "data.seq_len": 128},
            {"from_tokens": 512 * 4 + 1024 * 2 + 1, "optim.lr": 1e-4},
        )
    )
    assert [phase.first for phase in phases] == [0, 4, 7]
    assert [phase.first_token for phase in phases] == [0, 2048, 2048 + 3 * 1024]


def test_the_rate_begins_anew_where_a_phase_sets_it_and_only_there() -> None:
    got = rates(
        with_phases(
            {"from_step": 20, "data.seq_len": 128},
            {"from_step": 40, "optim.lr": 5e-4, "schedule.warmup_steps": 2},
            {"from_step": 60, "schedule": {"name": "constant", "warmup_steps": 0}},
        )
    )
    schedule = parse_config(BASE).schedule
    assert got[:40] == [learning_rate(step, 40, 1e-3, schedule) for step in range(40)]
    assert got[39] < 1.1e-4
    assert got[40:43] == pytest.approx([2.5e-4, 5e-4, 5e-4])
    assert got[59] < 6e-5
    assert got[60:] == [5e-4] * 40


def test_bounds_are_those_of_the_schedule_they_are_given_with() -> None:
    got = rates(
        with_phases(
            {"from_step": 50, "optim.lr": 1e-4, "schedule.from_step": 55},
            {"from_step": 70, "data.seq_len": 128},
            {"from_step": 80, "optim.lr": 1e-5, "schedule.to_step": 90},
            schedule={"name": "cosine", "to_step": 40},
        )
    )

    def cosine(first: int, end: int, peak: float, steps: range) -> list[float]:
        schedule = parse_config({"schedule": {"from_step": first, "to_step": end}}).schedule
        return [learning_rate(step, 100, peak, schedule) for step in steps]

    assert got[:50] == cosine(0, 40, 1e-3, range(50))
    assert got[40:50] == pytest.approx([1e-4] * 10)
    assert got[50:80] == cosine(55, 80, 1e-4, range(50, 80))
    assert got[50:56] == [1e-4] * 6
    assert got[80:] == cosine(80, 90, 1e-5, range(80, 100))
    assert got[90:] == pytest.approx([1e-6] * 10)


@pytest.mark.parametrize(
    ("bounds", "second", "message"),
    [
        ({"to_step": 60}, {}, r"phase 1 from step 0: schedule\.to_step = 60: must be at most 50,"),
        ({"from_step": 50}, {}, r"phase 1 .*from_step = 50: must be below 50, as .*\(phase 2\)"),
        ({}, {"from_step": 49}, r"phase 2 .*from_step = 49: must be at least 50"),
        ({}, {"to_step": 50}, r"phases\[0\].*to_step = 50: must be above .*from_step = 50"),
        ({}, {"to_step": 81}, r"phase 2 .*to_step = 81: must be at most 80, as .*\(phase 3\)"),
        ({}, {"from_step": 80}, r"phase 2 .*from_step = 80: must be below 80"),
    ],
)
def test_bounds_outside_their_schedule_are_refused(
    bounds: dict, second: dict, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        with_phases(
            {"from_step": 50, "optim.lr": 1e-4, "schedule": second},
            {"from_step": 80, "optim.lr": 1e-5},
            schedule={"name": "cosine", **bounds},
        )


def test_weights_of_phases_hold_from_the_tokens_they_begin_with() -> None:
    config = with_phases(
        {"from_step": 10, "weights": {"long": 3}, "data.seq_len": 128},
        {"from_step": 20, "weights": {"long": 9}},
    )
    of_phases = [phase.config.data.curriculum for phase in phases_of(config)]
    assert [(phase.tokens, phase.weights) for phase in of_phases[0]] == [
        (5120, {"long": 3}),
        (5120 + 10 * 1024, {"long": 9}),
    ]
    assert of_phases[0] == of_phases[1] == of_phases[2]


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        ([{"from_step": 9}, {"from_step": 9}], r"phases\[1\] begins at step 9.*in order"),
        ([{"from_step": 9}, {"from_step": 3}], r"phases\[1\] begins at step 3.*at step 9"),
        ([{"from_step": 9}, {"from_tokens": 512}], r"phases\[1\] begins at token 512.*4,608"),
        ([{"data.seq_len": 128}], r"phases\[0\]: give either from_step or from_tokens"),
        ([{"from_step": 1, "from_tokens": 512}], r"phases\[0\]: give either"),
        ([{"from_step": -1}], r"phases\.0\.from_step = -1"),
        (
            [{"from_step": 5, "data.seqlen": 128}],
            r"phases\[0\], from step 5: data\.seqlen is not a setting, did you mean data\.seq_len",
        ),
        ([{"from_step": 5, "seq_len": 128}], r"seq_len is not .*did you mean data\.seq_len"),
        ([{"from_step": 5, "data.seq_len.x": 1}], r"data\.seq_len is a value, not a section"),
        ([{"from_step": 5, "data.seq_len": 0}], r"from step 5: data\.seq_len = 0: .*1"),
        (
            [{"from_step": 5, "model.d_model": 64}],
            r"model\.d_model cannot change between phases; what can: data\.seq_len",
        ),
        ([{"from_step": 5, "data.seed": 1}], r"data\.seed cannot change"),
        (
            [{"from_step": 5, "context.lane_rows": 4}, {"from_step": 9, "data.seq_len": 128}],
            r"phases\[1\], from step 9: the phase before has context\.lane_rows = 4",
        ),
        ([{"from_step": 5, "model.attention.yarn.factor": 0.5}], r"yarn\.factor = 0\.5"),
        ([{"from_step": 0, "weights": {"a": 1}}], r"phases\[0\]: weights .* data\.shards"),
        ([{"from_step": 5, "weights": {"a": -1}}], r"weights\.a = -1"),
        ([{"from_step": 5, "phases": []}], r"phases cannot change"),
    ],
)
def test_a_phase_that_makes_no_sense_is_refused(phases: list[dict], message: str) -> None:
    with pytest.raises(UserError, match=message):
        with_phases(*phases)


def test_weights_in_two_places_are_refused() -> None:
    data = {"seq_len": 64, "curriculum": [{"tokens": 100, "weights": {"a": 1}}]}
    with pytest.raises(UserError, match=r"data\.curriculum: give them in one place"):
        with_phases({"from_step": 5, "weights": {"a": 2}}, data=data)


def test_a_length_that_a_layout_does_not_divide_is_refused_with_its_phase(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(BASE | {"phases": [{"from_step": 5, "data.seq_len": 130}]}))
    config = load_config(str(recipe), ["parallel.cp=4"])
    with pytest.raises(UserError, match=r"phase 2 from step 5: data\.seq_len=130: layout refused"):
        resolve_layouts(config, 4)


@pytest.mark.parametrize("bounds", ["schedule.to_step=5", "schedule.to_step=0"])
def test_a_schedule_ends_after_it_begins(bounds: str) -> None:
    with pytest.raises(UserError, match=r"schedule\.to_step = "):
        load_config("tiny", ["schedule.from_step=5", bounds])
