"""The data of a run, as its configuration names it."""

from collections import Counter
from collections.abc import Sequence

from data_pipeline.stream import Cache, Source, TokenStream, WeightsFrom, without_credentials
from pretrain.config import Config, phases_of
from pretrain.curriculum import (
    Phase,
    phase_of_checkpoint,
    step_sizes,
    steps_within,
    tokens_until,
)
from pretrain.data_config import DataConfig
from pretrain.errors import UserError
from pretrain.objective import tokens_per_step


def open_stream(config: Config) -> TokenStream:
    """The stream of a run's global batches.

    Raises:
        DataError: the shards are missing or damaged, or their mixture makes no sense.
        UserError: the model's vocabulary is too small for their tokens.
    """
    stream = stream_of(config)
    if stream.vocab_size > config.model.vocab_size:
        path = without_credentials(config.data.sources()[0].path)
        raise UserError(
            f"model.vocab_size = {config.model.vocab_size} is smaller than the vocabulary of "
            f"the tokenizer in {path}, {stream.vocab_size}: set "
            f"model.vocab_size={stream.vocab_size} or more, or use other shards"
        )
    return stream


def stream_of(config: Config) -> TokenStream:
    """The stream that a configuration names. Raises DataError."""
    data = config.data
    return TokenStream(
        sources_of(data),
        data.seq_len,
        data.seed,
        shuffle_shards=data.shuffle_shards,
        curriculum=curriculum_of(config),
        lane_rows=config.context.lane_rows,
        cache=cache_of(data),
    )


def sources_of(data: DataConfig) -> list[Source]:
    return [Source(**source.model_dump()) for source in data.sources()]


def source_names(data: DataConfig) -> list[str]:
    """What reports call the sources, each differently: those of one name by their addresses, and
    those of one address, but for credentials, by numbers as well.
    """
    sources = sources_of(data)
    count = Counter(source.name for source in sources)
    names: list[str] = []
    for source in sources:
        name = source.name if count[source.name] == 1 else without_credentials(source.path)
        number, numbered = 1, name
        while numbered in names:
            number += 1
            numbered = f"{name} ({number})"
        names.append(numbered)
    return names


def cache_of(data: DataConfig) -> Cache:
    """Where what is fetched from other machines is kept."""
    return Cache.of(data.cache_dir, data.cache_gb)


def curriculum_of(config: Config) -> list[WeightsFrom]:
    """The weights that change on the way, those of the run's phases among them."""
    data = phases_of(config)[0].config.data
    return [WeightsFrom(phase.tokens, phase.weights) for phase in data.curriculum]


def require_enough(stream: TokenStream, config: Config) -> None:
    """Raises UserError: the data is used up before the last step."""
    phases, steps = phases_of(config), config.train.steps
    ahead = _tokens_of_last_lanes(phases, steps)
    needed = tokens_until(phases, steps) + ahead
    used = stream.outlook(needed)
    found = sum(source.tokens for source in used)
    # What is used up ends with a whole document, and shares are rounded.
    if found < tokens_until(phases, steps - 1) + ahead:
        in_lanes = " in whole lanes" if ahead else ""
        raise UserError(
            f"train.steps = {steps}, steps of {step_sizes(phases, steps)} tokens{in_lanes} take "
            f"{needed:,}, "
            f"and epochs and max_epochs of data.shards leave {found:,}: set train.steps to "
            f"{steps_within(phases, max(0, found - ahead))} or less, raise them, or add a source"
        )


def _tokens_of_last_lanes(phases: Sequence[Phase], steps: int) -> int:
    """What the lanes have that are begun last, beyond so many steps: they are begun whole."""
    last = phase_of_checkpoint(phases, steps)
    rows = last.config.context.lane_rows
    # Phases with lanes do not change them, so all go on where the first has begun them.
    first = next(phase.first for phase in phases if phase.config.context.lane_rows == rows)
    return -(steps - first) % rows * tokens_per_step(last.config)
