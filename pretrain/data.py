"""The data of a run, as its configuration names it."""

from data_pipeline.stream import Source, TokenStream
from pretrain.config import Config
from pretrain.errors import UserError


def open_stream(config: Config) -> TokenStream:
    """The stream of a run's global batches.

    Raises:
        DataError: the shards are missing or damaged.
        UserError: the model's vocabulary is too small for their tokens.
    """
    sources = [Source(source.path, source.weight) for source in config.data.sources()]
    stream = TokenStream(sources, config.data.seq_len, config.data.seed)
    if stream.vocab_size > config.model.vocab_size:
        raise UserError(
            f"model.vocab_size = {config.model.vocab_size} is smaller than the vocabulary of "
            f"the tokenizer in {sources[0].path}, {stream.vocab_size}: set "
            f"model.vocab_size={stream.vocab_size} or more, or use other shards"
        )
    return stream
