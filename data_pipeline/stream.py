"""The training side's view of the data: packed global batches, equal for every layout of ranks."""

from collections.abc import Sequence
from typing import Any

from data_pipeline.errors import DataError
from data_pipeline.mixture import Mixture, Source
from data_pipeline.pack import Batch, BatchPlan, plan_rows, read_rows
from data_pipeline.shards import Manifest, TokenReader, load_manifest
from data_pipeline.tokenize import Tokenizer, load_tokenizer

__all__ = [
    "Batch",
    "BatchPlan",
    "Manifest",
    "Source",
    "TokenStream",
    "Tokenizer",
    "load_manifest",
    "load_tokenizer",
]


class TokenStream:
    """Global batches of packed documents from weighted sources.

    The order is a pure function of (manifests, weights, seed): every rank plans every global batch
    and reads only its rows. Each token of a source is delivered once per epoch, and predicted once
    unless its document begins with it, whatever the batch sizes and however often training resumes.

    Attributes:
        vocab_size: of the tokenizer that all sources share.
        eos_id: the token that ends each document.
        total_tokens: in one epoch of every source.
        tokenizer: the tokenizer.json of the first source.
    """

    def __init__(self, sources: Sequence[Source], seq_len: int, seed: int) -> None:
        if not sources:
            raise DataError("no data: name at least one folder of shards")
        self.seq_len = seq_len
        self.seed = seed
        self._sources = list(sources)
        self._manifests = [load_manifest(source.path) for source in sources]
        first = self._manifests[0]
        for source, manifest in zip(sources, self._manifests, strict=True):
            if manifest.tokens == manifest.documents:
                raise DataError(
                    f"source {source.path}: its {manifest.documents} documents are empty, there is "
                    "nothing to predict; remove it from the list"
                )
            if manifest.tokenizer_sha256 != first.tokenizer_sha256:
                raise DataError(
                    f"source {source.path} was made with another tokenizer "
                    f"(sha256 {manifest.tokenizer_sha256}) than {sources[0].path} "
                    f"(sha256 {first.tokenizer_sha256}); make its shards again with that one"
                )
        self.vocab_size = first.vocab_size
        self.eos_id = first.eos_id
        self.total_tokens = sum(manifest.tokens for manifest in self._manifests)
        self.tokenizer = first.tokenizer
        self._readers = [TokenReader(manifest) for manifest in self._manifests]
        self._mixture = Mixture(
            [reader.lengths for reader in self._readers],
            [source.weight for source in sources],
            seed,
        )

    @property
    def tokens(self) -> int:
        """How many were delivered since the start, in all epochs of all sources."""
        return sum(cursor["tokens"] for cursor in self._mixture.state_dict())

    def next_batch(self, sequences: int) -> BatchPlan:
        """Plan the next global batch of `sequences` rows and move on past it."""
        return plan_rows(self._mixture, sequences, self.seq_len)

    def read(self, plan: BatchPlan, rows: Sequence[int]) -> Batch:
        """Read these rows of a planned batch."""
        return read_rows(plan, rows, self.seq_len, self._readers)

    def state_dict(self) -> dict[str, Any]:
        """A few integers per source, and what they were counted on."""
        return {
            "seed": self.seed,
            "data": [manifest.sha256 for manifest in self._manifests],
            "cursors": self._mixture.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to where `state` was taken; weights and the length of rows may have changed since."""
        if state["seed"] != self.seed:
            raise DataError(
                f"data.seed={self.seed}, but the checkpoint was trained with seed "
                f"{state['seed']}: the order of documents would change and repeat some of them"
            )
        data = self.state_dict()["data"]
        if state["data"] != data:
            raise DataError(
                f"the shards of {', '.join(source.path for source in self._sources)} are not those "
                f"the checkpoint was trained on (sha256 {data} instead of {state['data']}): "
                "restore them in the same order, or start a new run"
            )
        self._mixture.load_state_dict(state["cursors"])
