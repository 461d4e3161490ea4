"""The held-out text of a run, as its configuration names it."""

from collections import Counter
from urllib.parse import urlsplit

from data_pipeline.stream import (
    DataError,
    OnceThrough,
    TokenStream,
    load_manifest,
    without_credentials,
)
from pretrain.config import Config, phases_of
from pretrain.data import cache_of, source_names
from pretrain.errors import UserError
from pretrain.eval_config import evaluated_length

# Beside the shards to train on, where `farspan data hold-out` puts it.
FOLDER = "held-out"


def open_held_out(config: Config, stream: TokenStream) -> dict[str, OnceThrough]:
    """The sources of held-out text, by name; none if the run never evaluates.

    Args:
        config: of the whole run.
        stream: that the run trains on.

    Raises:
        DataError: shards are missing or damaged.
        UserError: they are of another tokenizer, have one name, or are trained on.
    """
    if not config.eval.every:
        return {}
    named = _named(config)
    name, count = Counter(name for name, _ in named).most_common(1)[0]
    if count > 1:
        raise UserError(
            f"eval.sources: {count} sources are called {name!r}; give each a `name` of its own"
        )
    length = evaluated_length(config, phases_of(config))
    trained = _hashes_of_training(config)
    opened = {name: _open(config, path, length) for name, path in named}
    for name, source in opened.items():
        path = source.manifest.store.name
        if source.manifest.tokenizer.read_bytes() != stream.tokenizer.read_bytes():
            raise UserError(
                f"eval.sources: {path} has another tokenizer than {stream.tokenizer}, which the "
                "run trains with: make its shards with that one, as `farspan data tokenize --like` "
                "does"
            )
        if source.manifest.sha256 in trained:
            raise UserError(
                f"eval.sources: {path} ({name}) holds the same tokens as "
                f"{trained[source.manifest.sha256]} of data.shards: the run would be evaluated on "
                "what it is trained on. `farspan data hold-out` divides shards in two"
            )
    return opened


def _named(config: Config) -> list[tuple[str, str]]:
    """Name and path of each source."""
    asked = config.eval.sources
    if asked is None:
        return [
            (name, _beside(source.path))
            for name, source in zip(source_names(config.data), config.data.sources(), strict=True)
        ]
    if isinstance(asked, str):
        return [(_last_part(asked), asked)]
    return [(source.name or _last_part(source.path), source.path) for source in asked]


def _beside(path: str) -> str:
    """The address of the held-out text of shards."""
    if "://" not in path:
        return f"{path.rstrip('/')}/{FOLDER}"
    parts = urlsplit(path)
    return parts._replace(path=f"{parts.path.rstrip('/')}/{FOLDER}").geturl()


def _last_part(path: str) -> str:
    address = without_credentials(path)
    return address.rstrip("/").rpartition("/")[2] or address


def _open(config: Config, path: str, length: int) -> OnceThrough:
    cache = cache_of(config.data)
    try:
        return OnceThrough(path, length, most_tokens=config.eval.tokens, cache=cache)
    except DataError as error:
        if config.eval.sources is not None:
            raise
        raise UserError(
            f"eval.every = {config.eval.every}, but there is no held-out text for a source of "
            f"data.shards: {error}. Hold some back with `farspan data hold-out`, name other shards "
            "in eval.sources, or set eval.every=0"
        ) from None


def _hashes_of_training(config: Config) -> dict[str, str]:
    """The paths of sources by what they hold; growing ones are not known yet."""
    cache = cache_of(config.data)
    manifests = [
        load_manifest(source.path, cache=cache)
        for source in config.data.sources()
        if not source.growing
    ]
    return {manifest.sha256: manifest.store.name for manifest in manifests}
