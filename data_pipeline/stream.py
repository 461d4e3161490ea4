"""The training side's view of the data: packed global batches, equal for every layout of ranks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from data_pipeline.errors import DataError
from data_pipeline.lanes import Lanes
from data_pipeline.mixture import DEFAULT_SHUFFLE_SHARDS, Mixture
from data_pipeline.once import OnceThrough
from data_pipeline.pack import Batch, BatchPlan, read_rows
from data_pipeline.shards import Cache, Manifest, TokenReader, load_manifest
from data_pipeline.sources import Source, WeightsFrom, without_credentials
from data_pipeline.tokenize import Tokenizer, load_tokenizer

__all__ = [
    "DEFAULT_SHUFFLE_SHARDS",
    "ORDER_VERSION",
    "Batch",
    "BatchPlan",
    "Cache",
    "DataError",
    "Manifest",
    "OnceThrough",
    "Source",
    "SourceUse",
    "TokenStream",
    "Tokenizer",
    "WeightsFrom",
    "load_manifest",
    "load_tokenizer",
    "without_credentials",
]

ORDER_VERSION = 2
"""Of the rule by which documents follow each other: a state of another one cannot be gone on from.
"""


@dataclass(frozen=True)
class SourceUse:
    """A source's part in the first tokens of a stream, as in GPT-3's table 2.2.

    Attributes:
        size: tokens of the source, so far if it grows.
        tokens: of those delivered.
    """

    name: str
    size: int
    tokens: int

    @property
    def epochs(self) -> float:
        """How often each token is delivered, on average."""
        return self.tokens / max(1, self.size)


class TokenStream:
    """Global batches of packed documents from weighted sources.

    The order is a pure function of (manifests, mixture, seed): every rank plans every global batch
    and reads only its rows. Each token of a source is delivered once per epoch, unless its document
    is up-sampled, and predicted as often unless its document begins with it, whatever the batch
    sizes and however often training resumes.

    Args:
        shuffle_shards: so many shards of a source are shuffled together.
        curriculum: weights that change at a token of the stream.
        lane_rows: rows of consecutive batches that follow each other, see `data_pipeline.lanes`.
        cache: for what is fetched from https:// and s3://; see `load_manifest`.

    Attributes:
        vocab_size: of the tokenizer that all sources share.
        eos_id: the token that ends each document.
        total_tokens: in every source once, so far if it grows.
        tokenizer: the tokenizer.json of the first source.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        seq_len: int,
        seed: int,
        *,
        shuffle_shards: int = DEFAULT_SHUFFLE_SHARDS,
        curriculum: Sequence[WeightsFrom] = (),
        lane_rows: int = 1,
        cache: Cache | None = None,
    ) -> None:
        if not sources:
            raise DataError("no data: name at least one folder of shards")
        self.seq_len = seq_len
        self.seed = seed
        self._sources = list(sources)
        cache = cache or Cache.of()
        manifests = [
            load_manifest(source.path, growing=source.growing, cache=cache) for source in sources
        ]
        first = manifests[0]
        for source, manifest in zip(sources, manifests, strict=True):
            _check(source, manifest, sources[0], first)
        self.vocab_size = first.vocab_size
        self.eos_id = first.eos_id
        self.total_tokens = sum(manifest.tokens for manifest in manifests)
        self.tokenizer = first.tokenizer
        self._readers = [TokenReader(manifest) for manifest in manifests]
        self._mixture = Mixture(
            self._readers, sources, seed, shuffle_shards=shuffle_shards, curriculum=curriculum
        )
        self._lanes = Lanes(self._mixture, lane_rows)
        self._prefetched: list[tuple[int, int]] = [(-1, -1)] * len(sources)

    @property
    def tokens(self) -> int:
        """How many were delivered since the start, in all epochs of all sources."""
        return self._lanes.tokens

    def next_batch(self, sequences: int, beat: Callable[[], None] = lambda: None) -> BatchPlan:
        """Plan the next global batch of `sequences` rows and move on past it.

        Args:
            beat: called every few seconds while it waits, which it does where the next shards of a
                growing source are not written yet.

        Raises:
            DataError: the sources are used up.
        """
        self._mixture.beat = beat
        plan = self._lanes.next(sequences, self.seq_len)
        for source, (epoch, window, shards) in enumerate(self._mixture.shards_needed()):
            if self._prefetched[source] != (epoch, window):
                self._prefetched[source] = epoch, window
                self._readers[source].prefetch(shards.tolist())
        return plan

    def read(
        self, plan: BatchPlan, rows: Sequence[int], beat: Callable[[], None] = lambda: None
    ) -> Batch:
        """Read these rows of a planned batch; `beat` is called while a shard is fetched."""
        return read_rows(plan, rows, self.seq_len, self._readers, beat)

    def outlook(self, tokens: int) -> list[SourceUse]:
        """What the first `tokens` of the stream consist of; less than that if it ends before."""
        return [
            SourceUse(source.name, int(reader.lengths.sum()), used)
            for source, reader, used in zip(
                self._sources, self._readers, self._mixture.outlook(tokens), strict=True
            )
        ]

    def state_dict(self) -> dict[str, Any]:
        """A few integers per source, and what they were counted on.

        Of a growing source, that is what has been begun, the same on all ranks.
        """
        shards = self._mixture.shards_begun()
        return {
            "order": ORDER_VERSION,
            "seed": self.seed,
            "data": [
                reader.manifest.prefix_sha256(begun)
                for reader, begun in zip(self._readers, shards, strict=True)
            ],
            "shards": shards,
            **self._lanes.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to where `state` was taken; weights may have changed since, and the length of rows
        unless it is within lanes.
        """
        if state.get("order") != ORDER_VERSION:
            raise DataError(
                "the checkpoint was made by an older farspan, which put the documents in another "
                "order: some would be trained on twice. Go on with that version, or start a new run"
            )
        if state["seed"] != self.seed:
            raise DataError(
                f"data.seed={self.seed}, but the checkpoint was trained with seed "
                f"{state['seed']}: the order of documents would change and repeat some of them"
            )
        data = self._hashes_of(state["shards"])
        if state["data"] != data:
            raise DataError(
                f"the shards of {', '.join(source.path for source in self._sources)} are not those "
                f"the checkpoint was trained on (sha256 {data} instead of {state['data']}): "
                "restore them in the same order, or start a new run"
            )
        self._lanes.load_state_dict(state, self.seq_len)
        self._prefetched = [(-1, -1)] * len(self._readers)

    def _hashes_of(self, shards: Sequence[int]) -> list[str | None]:
        """Those of so many shards of each source; None where there are fewer, or too many."""
        hashes: list[str | None] = []
        for number, source in enumerate(self._sources):
            reader, count = self._readers[number], shards[number] if number < len(shards) else 0
            if source.growing:
                reader.wait_for(count)
            known = len(reader.manifest.shards)
            is_possible = count <= known if source.growing else count == known
            hashes.append(reader.manifest.prefix_sha256(count) if is_possible else None)
        return hashes


def _check(source: Source, manifest: Manifest, first_source: Source, first: Manifest) -> None:
    if manifest.is_finished and manifest.tokens == manifest.documents:
        raise DataError(
            f"source {source.path}: its {manifest.documents} documents are empty, there is "
            "nothing to predict; remove it from the list"
        )
    if manifest.tokenizer_sha256 != first.tokenizer_sha256:
        raise DataError(
            f"source {source.path} was made with another tokenizer "
            f"(sha256 {manifest.tokenizer_sha256}) than {first_source.path} "
            f"(sha256 {first.tokenizer_sha256}); make its shards again with that one"
        )
