"""Random access to the documents of a manifest, which may grow meanwhile."""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.shards.growth import Growth, while_beating
from data_pipeline.shards.manifest import Manifest, Shard
from data_pipeline.shards.prefetch import Prefetch


class TokenReader:
    """Random access to the documents of a manifest, numbered from 0 in the order of the shards.

    Costs 16 bytes of memory per document. The first access to a tar reads all of it once per
    process to verify its hash, about 50 ms for the 32 MB of a default shard; one that is far away
    is fetched before.

    Attributes:
        manifest: what is listed; `wait_for` replaces it by one that has grown.
        lengths: [documents] int64, tokens of each document with its end-of-document token.
        first_token: [documents] int64, where it begins in the tokens of its shard.
        shard_documents: [shards] int64, documents of each shard.
    """

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.lengths = np.zeros(0, np.int64)
        self.first_token = np.zeros(0, np.int64)
        self.shard_documents = np.zeros(0, np.int64)
        self._documents_up_to: list[int] = []
        self._dtype = np.dtype(manifest.dtype)
        self._prefetch = Prefetch()
        self._append(manifest.shards)

    def read(self, document: int, start: int, stop: int) -> NDArray[Any]:
        """Tokens [start, stop) of a document, up to its end, as a view of the mapped tar."""
        shard = bisect_right(self._documents_up_to, document)
        first = self.first_token[document]
        stop = min(stop, self.lengths[document])
        return self.tokens(shard)[first + start : first + stop]

    def tokens(self, shard: int, beat: Callable[[], None] = lambda: None) -> NDArray[Any]:
        """The mapped tar of a shard as an array of tokens; documents begin at `first_token`.

        Args:
            beat: called every few seconds while the shard is fetched.

        Raises:
            DataError: the shard is gone, has changed, or cannot be fetched.
        """
        store, tar = self.manifest.store, self.manifest.shards[shard].tar
        if store.is_at_hand(tar):
            mapped = store.map(tar)
        else:
            mapped = while_beating(partial(store.map, tar), beat)
        # Tokens are aligned: a tar has blocks of 512 bytes, and .npy pads its header to 64.
        return mapped.view(self._dtype)

    def prefetch(self, shards: Sequence[int]) -> None:
        """Have these shards fetched and verified in the background, in this order.

        A new call replaces what is left of the one before. What fails is told when it is needed.
        """
        tars = (self.manifest.shards[shard].tar for shard in shards)
        self._prefetch.replace(self.manifest.store.prefetch(tars))

    def wait_for(self, shards: int, beat: Callable[[], None] = lambda: None) -> None:
        """Wait until so many shards are listed or the manifest is finished.

        Args:
            beat: called every few seconds while it waits.

        Raises:
            DataError: nobody adds shards any more, or those that were listed have changed.
        """
        known = len(self.manifest.shards)
        if known < shards and not self.manifest.is_finished:
            self.manifest = Growth(self.manifest).wait_for(shards, beat)
            self._append(self.manifest.shards[known:])

    def _append(self, shards: Sequence[Shard]) -> None:
        indices = [self._index(shard) for shard in shards]
        offsets, lengths = np.concatenate([np.zeros((2, 0), np.int64), *indices], axis=1)
        documents = np.array([shard.documents for shard in shards], np.int64)
        self.first_token = np.concatenate([self.first_token, offsets // self._dtype.itemsize])
        self.lengths = np.concatenate([self.lengths, lengths])
        self.shard_documents = np.concatenate([self.shard_documents, documents])
        self._documents_up_to = np.cumsum(self.shard_documents).tolist()

    def _index(self, shard: Shard) -> NDArray[np.int64]:
        with self.manifest.store.open(shard.index_file) as file:
            index: NDArray[np.int64] = np.load(file)
        return index
