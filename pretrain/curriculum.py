"""A run in phases: settings that change at a step of it, such as the length of its sequences.

Each phase is a configuration as a run of its own would have it. What it needs of the configuration
tree it is given, so that the tree can be checked with it (`pretrain.config.phases_of`).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from pretrain.data_config import CurriculumPhase
from pretrain.errors import UserError
from pretrain.settings import NonNegative, Tokens

if TYPE_CHECKING:
    from pretrain.config import Config

# Settings and sections that give the model no other weights, and the documents no other order.
MAY_CHANGE = (
    "data.seq_len",
    "train.global_batch",
    "train.microbatch",
    "train.loss_chunk",
    "optim.lr",
    "schedule.",
    "model.attention.rope_base",
    "model.attention.yarn.",
    "model.attention.window",
    "context.",
    "parallel.",
    "checkpoint.every",
)
# With one of them, the learning rate begins anew, with a schedule of its own bounds.
OF_THE_RATE = ("optim.lr", "schedule.")


class PhaseConfig(BaseModel):
    """Settings from a step on, by their dotted names; later phases keep what earlier ones set."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)

    from_step: NonNegative | None = Field(None, description="After so many steps of the run,")
    from_tokens: Tokens | None = Field(
        None, description="or after the step that brings it to so many tokens,"
    )
    weights: dict[str, Annotated[float, Field(ge=0)]] = Field(
        default={}, description="these weights of the sources hold,"
    )

    def settings(self) -> dict[str, Any]:
        """Dotted name -> value; sections may have been given as mappings."""
        return dict(_leaves(self.model_extra or {}, ""))


@dataclass(frozen=True)
class Phase:
    """Steps of a run that have one configuration.

    Attributes:
        number: from 1.
        first: how many steps come before it.
        first_token: how many tokens these have, unless batches are skipped.
        stop: the first step of the next phase; None where there is none.
        changed: what it sets.
        config: without phases, as a run that goes on with it would have it.
    """

    number: int
    first: int
    first_token: int
    stop: int | None
    changed: Mapping[str, Any]
    config: "Config"

    def has(self, step: int) -> bool:
        """Whether the step after so many belongs to it."""
        return self.first <= step and (self.stop is None or step < self.stop)

    def __str__(self) -> str:
        changed = ", ".join(f"{name}={value}" for name, value in self.changed.items())
        return f"phase {self.number} from step {self.first:,}" + (changed and f": {changed}")


def phase_at(phases: Sequence[Phase], step: int) -> Phase:
    """The phase of the step after so many."""
    return next(phase for phase in reversed(phases) if phase.first <= step)


def phase_of_checkpoint(phases: Sequence[Phase], steps: int) -> Phase:
    """The phase that a checkpoint of so many steps was trained in last."""
    return phase_at(phases, max(0, steps - 1))


def tokens_until(phases: Sequence[Phase], steps: int) -> int:
    """How many tokens so many steps have."""
    phase = phase_of_checkpoint(phases, steps)
    return phase.first_token + (steps - phase.first) * _tokens_per_step(phase.config)


def step_sizes(phases: Sequence[Phase], steps: int) -> str:
    """How many tokens the steps have, for people to read."""
    sizes = [_tokens_per_step(phase.config) for phase in phases if phase.first < steps]
    return ", then ".join(f"{size:,}" for size in dict.fromkeys(sizes))


def steps_within(phases: Sequence[Phase], tokens: int) -> int:
    """How many steps so many tokens are enough for."""
    phase = next(phase for phase in reversed(phases) if phase.first_token <= tokens)
    return phase.first + (tokens - phase.first_token) // _tokens_per_step(phase.config)


def resolve_phases(config: "Config", parse: Callable[[dict[str, Any]], "Config"]) -> list[Phase]:
    """The phases of a configuration; one, if it has none.

    Args:
        parse: makes a configuration of a tree, or raises UserError.

    Raises:
        UserError: a phase makes no sense; the message says which.
    """
    if not config.phases:
        return [Phase(1, 0, 0, None, {}, config)]
    phases = _chain(config, parse)
    return _with_weights(_with_schedules(phases), config)


def _chain(config: "Config", parse: Callable[[dict[str, Any]], "Config"]) -> list[Phase]:
    """Each phase with the settings of those before."""
    plain = config.model_copy(update={"phases": ()})
    tree = plain.model_dump(mode="json")
    phases: list[Phase] = []
    if config.phases[0].from_step != 0:
        phases.append(Phase(1, 0, 0, None, {}, plain))
    for number, asked in enumerate(config.phases):
        name = f"phases[{number}]"
        first, first_token = _begin(asked, name, phases)
        try:
            changed = asked.settings()
            if first and _begins_rate(changed):
                # The bounds given before are those of the schedule before.
                tree = _with_settings(tree, {"schedule.from_step": first, "schedule.to_step": None})
            tree = _with_settings(tree, changed)
            of_phase = parse(tree)
            _refuse_fixed(changed)
            if phases:
                _refuse_other_lanes(phases[-1].config, of_phase)
        except UserError as error:
            raise UserError(f"{name}, from step {first:,}: {error}") from None
        if asked.weights:
            changed["weights"] = asked.weights
        phases.append(Phase(len(phases) + 1, first, first_token, None, changed, of_phase))
    stops = [phase.first for phase in phases[1:]]
    return [replace(phase, stop=stop) for phase, stop in zip(phases, [*stops, None], strict=True)]


def _begin(asked: PhaseConfig, name: str, before: Sequence[Phase]) -> tuple[int, int]:
    """Steps and tokens before a phase."""
    if (asked.from_step is None) == (asked.from_tokens is None):
        raise UserError(f"{name}: give either from_step or from_tokens")
    if not before:
        return 0, 0
    last = before[-1]
    per_step = _tokens_per_step(last.config)
    if asked.from_step is None:
        assert asked.from_tokens is not None
        first = last.first + -((last.first_token - asked.from_tokens) // per_step)
        given = f"token {asked.from_tokens:,}"
    else:
        first, given = asked.from_step, f"step {asked.from_step:,}"
    if first <= last.first:
        raise UserError(
            f"{name} begins at {given}, and the phase before it at step {last.first:,} (token "
            f"{last.first_token:,}): give them in order, and each at least one step"
        )
    return first, last.first_token + (first - last.first) * per_step


def _with_settings(tree: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a tree with these settings."""
    result = deepcopy(dict(tree))
    for name, value in settings.items():
        *sections, field = name.split(".")
        branch = result
        for depth, section in enumerate(sections, 1):
            branch = branch.setdefault(section, {})
            if not isinstance(branch, dict):
                value_at = ".".join(sections[:depth])
                raise UserError(f"{name} is not a setting: {value_at} is a value, not a section")
        branch[field] = value
    return result


def _refuse_fixed(settings: Mapping[str, Any]) -> None:
    fixed = [name for name in settings if not _is_one_of(name, MAY_CHANGE)]
    if fixed:
        allowed = ", ".join(name + "*" * name.endswith(".") for name in MAY_CHANGE)
        raise UserError(
            f"{', '.join(fixed)} cannot change between phases; what can: {allowed}, and weights"
        )


def _refuse_other_lanes(before: "Config", now: "Config") -> None:
    """After a skipped batch, lanes of rows end at another step than the phase was planned for."""
    if before.context.lane_rows == 1:
        return

    def shape(config: "Config") -> tuple[int, int, int]:
        return config.context.lane_rows, config.data.seq_len, config.train.global_batch

    if shape(before) != shape(now):
        raise UserError(
            f"the phase before has context.lane_rows = {before.context.lane_rows}: after that, "
            "context.lane_rows, data.seq_len and train.global_batch stay as they are; set "
            "context.lane_rows in the last phase that changes one of them"
        )


def _with_schedules(phases: Sequence[Phase]) -> list[Phase]:
    """A schedule ends where the next one begins, or before.

    Raises:
        UserError: bounds are given that lie beyond that.
    """
    begins = [phase for phase in phases if phase.number == 1 or _begins_rate(phase.changed)]
    result = []
    for phase in phases:
        owner = next(other for other in reversed(begins) if other.first <= phase.first)
        after = next((other for other in begins if other.first > phase.first), None)
        _check_bounds(owner, after)
        schedule = phase.config.schedule
        if after and schedule.to_step is None:
            schedule = schedule.model_copy(update={"to_step": after.first})
        result.append(_update(phase, schedule=schedule))
    return result


def _check_bounds(owner: Phase, after: Phase | None) -> None:
    """Refuse bounds of a schedule outside the steps from `owner`, that sets it, to `after`."""
    schedule, name = owner.config.schedule, f"phase {owner.number} from step {owner.first}"
    if schedule.from_step < owner.first:
        raise UserError(
            f"{name}: schedule.from_step = {schedule.from_step}: must be at least "
            f"{owner.first}, the phase's first step; leave it out for that"
        )
    if after is None:
        return
    ends = f"as the rate begins anew at step {after.first} (phase {after.number})"
    if schedule.to_step is not None and schedule.to_step > after.first:
        raise UserError(
            f"{name}: schedule.to_step = {schedule.to_step}: must be at most {after.first}, "
            f"{ends}; leave it out for that, or give it in that phase if it is meant for it"
        )
    if schedule.from_step >= after.first:
        raise UserError(
            f"{name}: schedule.from_step = {schedule.from_step}: must be below {after.first}, "
            f"{ends}; give it in that phase if it is meant for it"
        )


def _begins_rate(changed: Mapping[str, Any]) -> bool:
    return any(_is_one_of(name, OF_THE_RATE) for name in changed)


def _with_weights(phases: Sequence[Phase], config: "Config") -> list[Phase]:
    """The weights of all phases, as each of them has to know them."""
    changing = [phase for phase in phases if "weights" in phase.changed]
    if not changing:
        return list(phases)
    if config.data.curriculum:
        raise UserError("phases have weights, and so has data.curriculum: give them in one place")
    if changing[0].first == 0:
        raise UserError("phases[0]: weights from step 0 on are set in data.shards, not here")
    curriculum = tuple(
        CurriculumPhase(tokens=phase.first_token, weights=phase.changed["weights"])
        for phase in changing
    )
    return [
        _update(phase, data=phase.config.data.model_copy(update={"curriculum": curriculum}))
        for phase in phases
    ]


def _update(phase: Phase, **sections: Any) -> Phase:
    return replace(phase, config=phase.config.model_copy(update=sections))


def _tokens_per_step(config: "Config") -> int:
    return config.train.global_batch * config.data.seq_len


def _is_one_of(name: str, settings: Sequence[str]) -> bool:
    return any(
        name == other or (other.endswith(".") and name.startswith(other)) for other in settings
    )


def _leaves(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
