"""The configuration of a run: one typed tree, defaults < recipe (YAML) < dotted overrides.

Neither this module nor anything it imports needs torch: a configuration is read, checked and
printed before anything heavy is loaded.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError

from parallel.heartbeat import longest_silence_s
from parallel.verdict import VERDICT_S
from pretrain.context_config import ContextConfig, check_context
from pretrain.curriculum import Phase, PhaseConfig, resolve_phases
from pretrain.data_config import DataConfig
from pretrain.errors import AttemptError, UserError
from pretrain.eval_config import EvalConfig, check_eval
from pretrain.model.config import AttentionConfig, LayerKind, ModelConfig, Positions
from pretrain.parallel_config import ParallelConfig, check_offload
from pretrain.run_dir import RunDirectory
from pretrain.settings import Decay, NonNegative, Positive, Section, Share
from pretrain.yaml_files import nearest, nearest_key, path_of, read_mapping, shipped_names

RECIPES = Path(__file__).parent / "recipes"


def _outlasting(hang_timeout_s: int) -> int:
    """Seconds after which all ranks know which of them hangs."""
    return math.ceil(longest_silence_s(hang_timeout_s) + VERDICT_S)


class TrainConfig(Section):
    engine: Literal["native", "megatron", "deepspeed"] = Field(
        "native",
        description="What trains: farspan's own layers and parallelism, megatron-core's, or "
        "DeepSpeed's ZeRO; the last two are extras.",
    )
    steps: Positive = 1000
    global_batch: Positive = Field(8, description="Sequences per optimizer step, over all ranks.")
    microbatch: Positive = Field(1, description="Sequences per forward pass of one rank.")
    seed: NonNegative = Field(0, description="Decides the initial weights.")
    log_every: Positive = Field(
        1, description="Steps between two rows of metrics.jsonl; checkpoints have one as well."
    )
    survey_every: Positive = Field(
        10, description="Every so many of these rows tell of weights, updates and memory, too."
    )
    peak_tflops: Annotated[float, Field(gt=0)] | None = Field(
        None, description="Of a device, dense, in train.dtype, for MFU [what its data sheet says]."
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        "bfloat16", description="Of the computation; weights and reductions stay float32."
    )
    deterministic: bool = Field(
        False,
        description="On GPUs, take kernels that give the same bits each time, some of them slower: "
        "an attempt on the same layout then goes on bit for bit. CPUs always do.",
    )
    loss_chunk: Positive = Field(
        2048, description="Tokens whose logits exist at a time in the cross-entropy."
    )
    hang_timeout_s: Positive = Field(
        300,
        description="How long a phase of a step (data, forward and backward, optimizer) may take "
        "before all ranks end, with the one that is stuck named: so long, or twice as long as ever "
        "before, up to four times as long; and that when it happens first, and for a checkpoint.",
    )
    collective_timeout_s: Positive = Field(
        default_factory=lambda known: max(1800, _outlasting(known.get("hang_timeout_s", 0))),
        description="How long a rank waits for the others before the attempt is given up, whoever "
        "is to blame; at least four times train.hang_timeout_s and a minute.",
    )


class OptimConfig(Section):
    name: Literal["adamw"] = "adamw"
    lr: Annotated[float, Field(gt=0)] = 3e-4
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    clip: Annotated[float, Field(gt=0)] | None = Field(
        1.0, description="Largest global gradient norm; null: any."
    )
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    state_dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="Of the stored moments; the update is computed in float32."
    )
    in_backward: bool = Field(
        False,
        description="Update a weight as soon as the backward pass has its gradient, and free that: "
        "without clipping, pipeline or several microbatches of a rank.",
    )


class ScheduleConfig(Section):
    name: Literal["constant", "cosine", "wsd"] = "cosine"
    warmup_steps: NonNegative = 0
    decay_share: Share = Field(0.2, description="wsd: how much of the steps after warmup decays.")
    min_lr: Share = Field(0.1, description="Final learning rate as a share of optim.lr.")
    from_step: NonNegative = Field(
        0, description="Step at which warmup begins; in a phase, its first by default."
    )
    to_step: Positive | None = Field(
        None,
        description="Step at which the decay ends [where a phase sets the rate anew, train.steps].",
    )


class CheckpointConfig(Section):
    dir: str | None = Field(
        None,
        description="Where they go: a folder, or a URL such as s3://bucket/run [RUN/checkpoints].",
    )
    every: Positive = Field(100, description="Steps between checkpoints; the last step always is.")
    keep: Positive = Field(2, description="How many of the newest stay.")
    keep_every: Positive | None = Field(
        None, description="Also those of steps that this divides stay."
    )
    keep_best: NonNegative = Field(
        0, description="Also so many with the least mean loss since the one before stay."
    )
    asynchronous: bool = Field(
        True, description="Training waits for the copy only; files are written in the background."
    )


class GuardConfig(Section):
    spike_sigmas: Annotated[float, Field(gt=0)] | None = Field(
        12.0,
        description="A loss or gradient norm so far above the median of the window, in robust "
        "standard deviations, rolls the run back; null: never.",
    )
    window: Positive = Field(128, description="Steps that a step is compared with.")
    history: Positive = Field(32, description="Steps before which nothing counts as a spike.")
    max_rollbacks: NonNegative = Field(
        4, description="Rollbacks without a window of good steps between them before the run ends."
    )
    max_skips: NonNegative = Field(
        8, description="Batches in a row without a finite loss and gradient before the run ends."
    )
    max_weight: Annotated[float, Field(gt=0)] = Field(
        1e4, description="The run ends, and saves nothing, when a weight is larger than that."
    )


class WandbConfig(Section):
    mode: Literal["offline", "online", "disabled"] = "offline"
    project: str = "farspan"
    entity: str | None = Field(None, description="The user or team [the account's default].")
    samples: NonNegative = Field(
        4,
        description="Rows of the first batch of each attempt that are shown as text; 0: W&B gets "
        "no text of the data.",
    )


class RunConfig(Section):
    dir: str | None = Field(None, description="Everything of the run lies here.")


class Config(Section):
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    context: ContextConfig = ContextConfig()
    train: TrainConfig = TrainConfig()
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    phases: tuple[PhaseConfig, ...] = Field(
        (), description="Settings that change at a step of the run."
    )
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    guard: GuardConfig = GuardConfig()
    eval: EvalConfig = EvalConfig()
    wandb: WandbConfig = WandbConfig()
    run: RunConfig = RunConfig()

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def recipe_names() -> list[str]:
    """The shipped recipes."""
    return shipped_names(RECIPES)


def load_config(recipe: str, overrides: Sequence[str] = ()) -> Config:
    """The resolved configuration of a recipe (a shipped name or a YAML file) and overrides.

    Args:
        overrides: `key=value`, the key dotted (`optim.lr=1e-3`), the value YAML.

    Raises:
        UserError: an unknown recipe or key, or a value that is not allowed; the message names
            the field, the value, what is allowed and the nearest name.
    """
    tree = read_mapping(path_of("recipe", recipe, RECIPES), "train: {steps: 100}")
    for override in overrides:
        _apply_override(tree, override)
    config = parse_config(tree)
    _check_timeouts(config.train)
    return config


def overridden(config: Config, overrides: Sequence[str]) -> Config:
    """The configuration with `key=value` overrides, as `load_config`. Raises UserError."""
    tree = config.model_dump(mode="json")
    for override in overrides:
        _apply_override(tree, override)
    return parse_config(tree)


def parse_config(tree: Mapping[str, Any]) -> Config:
    """Check a nested mapping against the typed tree. Raises UserError."""
    config = _parse(tree)
    check_eval(config, phases_of(config))
    return config


def phases_of(config: Config) -> list[Phase]:
    """The phases of a run; one, if its configuration has none. Raises UserError."""
    return resolve_phases(config, _parse)


def _parse(tree: Mapping[str, Any]) -> Config:
    """A configuration whose phases are not looked at."""
    _refuse_unknown_keys(Config, tree, ())
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        raise UserError(_describe(error)) from None
    _check_model(config.model)
    check_context(config)
    _check_optimizer(config.optim, config.parallel)
    check_offload(config.parallel, config.context.segments)
    guard = config.guard
    if guard.spike_sigmas is not None and guard.history > guard.window:
        raise UserError(
            f"guard.history = {guard.history}: must be at most guard.window = {guard.window}, or "
            "nothing ever counts as a spike (guard.spike_sigmas=null says so)"
        )
    schedule = config.schedule
    if schedule.to_step is not None and schedule.to_step <= schedule.from_step:
        raise UserError(
            f"schedule.to_step = {schedule.to_step}: must be above schedule.from_step = "
            f"{schedule.from_step}"
        )
    return config


def check_setting(name: str) -> None:
    """Raise UserError, with the nearest name, unless `name` is that of a single setting."""
    names = set(_dotted_keys(Config))
    if name not in names:
        inside = sorted(other for other in names if other.startswith(f"{name}."))
        if inside:
            raise UserError(f"{name} is a section; name one of its settings: {', '.join(inside)}")
        raise UserError(f"{name} is not a setting{nearest_key(name, _dotted_keys(Config))}")


def read_run_config(run: RunDirectory, attempt: int | None = None) -> Config:
    """The resolved configuration of a run, or of one of its attempts.

    Raises:
        UserError: there is no run, or one whose configuration is not valid.
        AttemptError: it cannot be read, from here or now.
    """
    path = run.config if attempt is None else run.config_of(attempt)
    if not path.is_file():
        raise UserError(
            f"{run.root} is not a run directory (no {path.relative_to(run.root)} in it); "
            "`farspan train RECIPE --run-dir DIR` makes one"
        )
    try:
        return parse_config(yaml.safe_load(path.read_text()))
    except OSError as error:
        raise AttemptError(f"{path} cannot be read: {error.strerror}") from None
    except (UserError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path}: {error}") from None


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"override {override!r} is not of the form key=value, as in optim.lr=1e-3")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"override {key}: the value {text!r} is not valid YAML") from None
    *sections, field = key.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise UserError(f"override {key}: {section} is a value, not a section")
    tree[field] = value


def _fields(schema: Any) -> dict[str, Any] | None:
    """Name and type of each field of a section, or None where `schema` is a plain value."""
    if isinstance(schema, type) and issubclass(schema, BaseModel):
        return {name: field.annotation for name, field in schema.model_fields.items()}
    if dataclasses.is_dataclass(schema):
        return {field.name: field.type for field in dataclasses.fields(schema)}
    return None


def _refuse_unknown_keys(schema: Any, tree: Any, path: tuple[str, ...]) -> None:
    fields = _fields(schema)
    if fields is None or not isinstance(tree, Mapping):
        return
    for key, value in tree.items():
        dotted = ".".join((*path, str(key)))
        if key not in fields:
            where = f"section {'.'.join(path)}" if path else "the configuration"
            near = nearest_key(dotted, _dotted_keys(Config))
            raise UserError(f"{dotted} is not a setting{near}; {where} has: {', '.join(fields)}")
        _refuse_unknown_keys(fields[key], value, (*path, key))


def _dotted_keys(schema: Any, prefix: str = "") -> Iterator[str]:
    for name, annotation in (_fields(schema) or {}).items():
        if _fields(annotation) is None:
            yield prefix + name
        else:
            yield from _dotted_keys(annotation, f"{prefix}{name}.")


def _describe(error: ValidationError) -> str:
    lines: dict[str, str] = {}
    for problem in error.errors():
        location = [part for part in problem["loc"] if not _is_union_tag(part)]
        dotted = ".".join(map(str, location))
        wish = problem["msg"].removeprefix("Value error, ")
        wish = wish[0].lower() + wish[1:]
        if problem["type"] == "literal_error":
            allowed = re.findall(r"'([^']*)'", problem["ctx"]["expected"])
            wish += nearest(str(problem["input"]), allowed)
        if note := _description(location):
            wish += f" ({note})"
        lines.setdefault(dotted, f"{dotted} = {problem['input']!r}: {wish}")
    # What is wrong with an entry of a list says more than that the list is no single value.
    innermost = (d for d in lines if not any(other.startswith(f"{d}.") for other in lines))
    return "\n".join(lines[dotted] for dotted in innermost)


def _is_union_tag(part: Any) -> bool:
    """Whether pydantic put `part` into a location to say which member of a union it tried."""
    return part in {"str", "constrained-int"} or not re.fullmatch(r"\w+", str(part))


def _description(location: Sequence[Any]) -> str | None:
    """What the field at `location` is for, where that is written down."""
    section: Any = Config
    field = None
    for name in location:
        field = getattr(section, "model_fields", {}).get(name)
        section = field.annotation if field else None
    return field.description if field else None


def _check_timeouts(train: TrainConfig) -> None:
    """Refuse what lets NCCL abort the ranks (SIGABRT) before they know which of them hangs."""
    least = _outlasting(train.hang_timeout_s)
    if train.collective_timeout_s < least:
        raise UserError(
            f"train.collective_timeout_s = {train.collective_timeout_s}: must be at least {least}, "
            f"which is four times train.hang_timeout_s = {train.hang_timeout_s} and a minute, or "
            "NCCL ends the ranks before they find out which of them hangs: raise it, or lower "
            "train.hang_timeout_s"
        )


# Where bfloat16 is coarsest, a moment has to move by more than this share of itself to move at all.
_BFLOAT16_STEP = 2**-8


def _check_optimizer(optim: OptimConfig, parallel: ParallelConfig) -> None:
    """Refuse what would need a gradient that is gone, or moments that cannot follow."""
    if optim.in_backward and optim.clip is not None:
        raise UserError(
            f"optim.in_backward = true with optim.clip = {optim.clip}: the global gradient norm is "
            "known when all weights have been updated already; set optim.clip=null"
        )
    if optim.in_backward and parallel.pp > 1:
        raise UserError(
            f"optim.in_backward = true with parallel.pp = {parallel.pp}: stages need their weights "
            "for the microbatches to come; set parallel.pp=1"
        )
    if optim.state_dtype == "bfloat16" and max(optim.betas) > 1 - _BFLOAT16_STEP:
        raise UserError(
            f"optim.betas = {list(optim.betas)} with optim.state_dtype = bfloat16: a moment that "
            f"changes by a share of 1 - beta, less than {_BFLOAT16_STEP:.2g}, is rounded back to "
            f"what it was; use at most {1 - _BFLOAT16_STEP:.3f}, or optim.state_dtype=float32"
        )


def _check_model(model: ModelConfig) -> None:
    """Refuse sizes that no layer can have."""
    for dotted, value in _numbers(model, "model"):
        may_be_zero = dotted.rsplit(".", 1)[-1] in _MAY_BE_ZERO
        if not math.isfinite(value) or value < 0 or (value == 0 and not may_be_zero):
            wish = "zero or more" if may_be_zero else "more than zero"
            raise UserError(f"{dotted} = {value}: must be {wish}, and finite")
    attention, linear, moe = model.attention, model.linear, model.moe
    if not model.layer_pattern:
        kinds = ", ".join(get_args(LayerKind))
        raise UserError(f"model.layer_pattern is empty: name at least one of {kinds}")
    for many, few, what in (
        (attention.n_heads, attention.n_kv_heads, "model.attention.n_heads, n_kv_heads"),
        (linear.n_value_heads, linear.n_key_heads, "model.linear.n_value_heads, n_key_heads"),
    ):
        if many % few:
            raise UserError(f"{what} = {many}, {few}: the first must be a multiple of the second")
    rotary = attention.head_dim * attention.rope_fraction
    if not 0 < attention.rope_fraction <= 1 or rotary % 2:
        raise UserError(
            f"model.attention.rope_fraction = {attention.rope_fraction}: it must turn an even "
            f"number of the head's {attention.head_dim} dimensions, and not more than all"
        )
    _check_positions(attention)
    if moe.n_experts:
        # grouped_mm wants rows of a multiple of 16 bytes, which is 8 elements in bfloat16.
        for dotted, width in (("d_model", model.d_model), ("moe.d_expert", moe.d_expert)):
            if width % 8:
                raise UserError(f"model.{dotted} = {width}: must be a multiple of 8 with experts")
    if moe.n_experts and moe.top_k > moe.n_experts:
        raise UserError(
            f"model.moe.top_k = {moe.top_k}: a token cannot go to more experts than the "
            f"{moe.n_experts} of model.moe.n_experts"
        )


def _check_positions(attention: AttentionConfig) -> None:
    yarn = attention.yarn
    if not attention.positions:
        kinds = ", ".join(get_args(Positions))
        raise UserError(f"model.attention.positions is empty: name at least one of {kinds}")
    if yarn.factor < 1:
        raise UserError(
            f"model.attention.yarn.factor = {yarn.factor}: must be 1 or more, the new length over "
            f"model.attention.yarn.original_length = {yarn.original_length}"
        )
    if yarn.beta_fast <= yarn.beta_slow:
        raise UserError(
            f"model.attention.yarn.beta_fast, beta_slow = {yarn.beta_fast}, {yarn.beta_slow}: the "
            "first must be above the second"
        )


_MAY_BE_ZERO = {"n_experts", "d_shared_expert", "aux_loss", "z_loss", "d_ff", "init_std"}


def _numbers(section: Any, path: str) -> Iterator[tuple[str, float]]:
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            yield from _numbers(value, f"{path}.{field.name}")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{path}.{field.name}", value
