"""What may change between two attempts of a run, and what only on demand."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pretrain.config import Config, check_setting, phases_of
from pretrain.errors import UserError
from pretrain.model.config import ModelConfig
from pretrain.run_dir import RunDirectory

# Settings and sections that change neither the data, nor the model, nor how it is trained.
MAY_CHANGE = (
    "train.engine",
    "train.steps",
    "train.microbatch",
    "train.log_every",
    "train.deterministic",
    "train.loss_chunk",
    "train.collective_timeout_s",
    "train.hang_timeout_s",
    "data.cache_dir",
    "data.cache_gb",
    "parallel.",
    "checkpoint.every",
    "checkpoint.keep",
    "checkpoint.keep_every",
    "checkpoint.keep_best",
    "checkpoint.asynchronous",
    "guard.",
    "eval.",
    "wandb.",
    "run.",
)

# Of a source: how much of it is used.
WEIGHTS = ("weight", "epochs", "max_epochs")
# Of a source: which documents it has, and in which order.
CONTENTS = ("shards", "tokenizer", "upsample", "growing")

Described = tuple[Config, list[dict[str, Any]]]
"""A configuration, and what is known of its data."""


@dataclass(frozen=True)
class Change:
    """A setting with another value than in the attempt before.

    Attributes:
        is_free: whether neither the data, nor the model, nor how it is trained is another.
    """

    setting: str
    before: Any
    now: Any
    is_free: bool

    def __str__(self) -> str:
        return f"{self.setting}: {self.before!r} -> {self.now!r}"

    @property
    def is_of_other_data(self) -> bool:
        """Whether the order of the documents would be another; their weights may change."""
        is_source = self.setting.startswith("data.shards.")
        is_weight = self.setting.rsplit(".", 1)[-1] in WEIGHTS
        decides = ("data.seed", "data.shuffle_shards")
        return self.setting in decides or (is_source and not is_weight)

    def is_covered_by(self, setting: str) -> bool:
        return self.setting == setting or self.setting.startswith(f"{setting}.")


def find_changes(before: Described, now: Described) -> list[Change]:
    """All settings that differ; shards are compared by what they hold, not where they lie."""
    old, new = _settings(*before), _settings(*now)
    # Then a row's gradient is the same, however it is cut.
    contexts = [phase.config.context for config, _ in (before, now) for phase in phases_of(config)]
    are_exact = all(context.gradient == "exact" and context.carry for context in contexts)
    free = {"context.segments"} if are_exact else set()
    return [
        Change(setting, old.get(setting), new.get(setting), setting in free or _is_free(setting))
        for setting in sorted(old.keys() | new.keys())
        if old.get(setting) != new.get(setting)
    ]


def allow_changes(
    run: RunDirectory,
    changes: Sequence[Change],
    allowed: Sequence[str],
    model_before: ModelConfig,
    model: ModelConfig,
) -> None:
    """Raises UserError, with a diff, unless each change is free, or allowed and possible.

    What is `allowed` has to be a setting, and to need it.
    """
    asked = [change for change in changes if not change.is_free]
    for setting in allowed:
        _check_allowed(run, setting, asked)
    refused = [
        change for change in asked if not any(change.is_covered_by(name) for name in allowed)
    ]
    if refused:
        flags = " ".join(f"--allow-change {name}" for name in _names(refused))
        raise UserError(
            f"{run.root} holds a run with other settings; resuming would change its data, its "
            "model or its training:\n  "
            + "\n  ".join(map(str, refused))
            + f"\nUse the same settings, or another --run-dir, or say that you want it: {flags}"
        )
    if other_data := [change for change in asked if change.is_of_other_data]:
        raise UserError(
            "these changes cannot be allowed:\n  "
            + "\n  ".join(map(str, other_data))
            + "\nThe order of the documents follows from the shards, their order, upsample, "
            "growing, data.shuffle_shards and data.seed: with others, some would be trained on "
            "twice and others never. Only the weights of the sources may change (and epochs, "
            "max_epochs, data.curriculum); use another --run-dir"
        )
    if any(change.setting.startswith("model.") for change in asked):
        _check_weights(asked, model_before, model)
    for change in asked:
        print(f"allowed: {change}", flush=True)


def note_changes(run: RunDirectory, changes: Sequence[Change]) -> None:
    """Write down all changes, for the attempt that will begin."""
    if changes:
        with run.changes.open("a") as file:
            file.writelines(json.dumps(asdict(change)) + "\n" for change in changes)


def _check_allowed(run: RunDirectory, setting: str, asked: Sequence[Change]) -> None:
    try:
        check_setting(setting)
    except UserError as error:
        raise UserError(f"--allow-change {setting}: {error}") from None
    if _is_free(setting):
        raise UserError(
            f"--allow-change {setting} is not needed: this setting may always change; leave it out"
        )
    if not any(change.is_covered_by(setting) for change in asked):
        raise UserError(
            f"--allow-change {setting} is not needed: {run.root} "
            + ("has the same value" if run.config.exists() else "is a new run")
            + "; leave it out"
        )


def _check_weights(asked: Sequence[Change], model_before: ModelConfig, model: ModelConfig) -> None:
    """Refuse a model whose weights are not those of the checkpoints."""
    import torch

    from pretrain.model.transformer import Transformer

    with torch.device("meta"):
        before, now = (
            {name: tuple(weight.shape) for name, weight in Transformer(config).state_dict().items()}
            for config in (model_before, model)
        )
    differ = [name for name in before.keys() | now.keys() if before.get(name) != now.get(name)]
    if differ:
        first = min(differ)
        raise UserError(
            "these changes cannot be allowed, the weights of the checkpoints would not fit:\n  "
            + "\n  ".join(str(change) for change in asked if change.setting.startswith("model."))
            + f"\n{first} has the shape {before.get(first)} and would have {now.get(first)}, one "
            f"of {len(differ)} that differ; use another --run-dir"
        )


def _names(changes: Sequence[Change]) -> list[str]:
    """The settings to allow: of the sources of data, all at once."""
    names = (
        "data.shards" if change.setting.startswith("data.shards.") else change.setting
        for change in changes
    )
    return list(dict.fromkeys(names))


def _is_free(setting: str) -> bool:
    return any(
        setting == free or (free.endswith(".") and setting.startswith(free)) for free in MAY_CHANGE
    )


def _settings(config: Config, data: Sequence[dict[str, Any]]) -> dict[str, Any]:
    tree = config.model_dump(mode="json")
    tree["data"]["shards"] = {
        str(number): {key: source[key] for key in CONTENTS + WEIGHTS if key in source}
        for number, source in enumerate(data)
    }
    return dict(_leaves(tree, ""))


def _leaves(tree: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _leaves(value, f"{prefix}.{key}" if prefix else key)
    else:
        yield prefix, tree
