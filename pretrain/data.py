"""The data of a run, as its configuration names it."""

from data_pipeline.stream import Cache, Phase, Source, TokenStream
from pretrain.config import Config
from pretrain.data_config import DataConfig
from pretrain.errors import UserError


def open_stream(config: Config) -> TokenStream:
    """The stream of a run's global batches.

    Raises:
        DataError: the shards are missing or damaged, or their mixture makes no sense.
        UserError: the model's vocabulary is too small for their tokens, or they are too few.
    """
    stream = stream_of(config.data)
    if stream.vocab_size > config.model.vocab_size:
        raise UserError(
            f"model.vocab_size = {config.model.vocab_size} is smaller than the vocabulary of "
            f"the tokenizer in {config.data.sources()[0].path}, {stream.vocab_size}: set "
            f"model.vocab_size={stream.vocab_size} or more, or use other shards"
        )
    _require_enough(stream, config)
    return stream


def stream_of(data: DataConfig) -> TokenStream:
    """The stream that a data section names. Raises DataError."""
    return TokenStream(
        sources_of(data),
        data.seq_len,
        data.seed,
        shuffle_shards=data.shuffle_shards,
        curriculum=curriculum_of(data),
        cache=cache_of(data),
    )


def sources_of(data: DataConfig) -> list[Source]:
    return [Source(**source.model_dump()) for source in data.sources()]


def cache_of(data: DataConfig) -> Cache:
    """Where what is fetched from other machines is kept."""
    return Cache.of(data.cache_dir, data.cache_gb)


def curriculum_of(data: DataConfig) -> list[Phase]:
    return [Phase(phase.tokens, phase.weights) for phase in data.curriculum]


def _require_enough(stream: TokenStream, config: Config) -> None:
    per_step = config.train.global_batch * config.data.seq_len
    needed = config.train.steps * per_step
    used = stream.outlook(needed)
    found = sum(source.tokens for source in used)
    # What is used up ends with a whole document, and shares are rounded.
    if found < needed - per_step:
        raise UserError(
            f"train.steps = {config.train.steps} steps of {per_step:,} tokens take {needed:,}, and "
            f"epochs and max_epochs of data.shards leave {found:,}: set train.steps to "
            f"{found // per_step} or less, raise them, or add a source"
        )
