"""Wait for shards: those that a pipeline still writes, and those that are far away."""

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from time import monotonic, sleep
from typing import TypeVar

from data_pipeline.errors import DataError
from data_pipeline.shards.manifest import Manifest, read_manifest

POLL_S = 2.0
REPORT_S = 60.0
# A writer that was killed may be started again at once.
ABANDONED_S = 60.0
# Where a writer cannot be seen, whoever uploads its shards may do so in batches.
STALLED_S = 1800.0

T = TypeVar("T")
log = logging.getLogger(__name__)


def while_beating(work: Callable[[], T], beat: Callable[[], None]) -> T:
    """What `work` returns; `beat` is called every few seconds until then."""
    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(work)
        while not wait([result], POLL_S).done:
            beat()
        return result.result()


class Growth:
    """A manifest that is looked at every now and then until there is enough in it."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        # When a shard was added, or a writer was seen.
        self._alive_at = self._told_at = monotonic()

    def wait_for(self, shards: int, beat: Callable[[], None]) -> Manifest:
        """The manifest once it has so many shards or is finished; see `TokenReader.wait_for`."""
        while True:
            self._see(read_manifest(self._manifest.store, growing=True))
            if len(self._manifest.shards) >= shards or self._manifest.is_finished:
                return self._manifest
            self._require_writer()
            self._tell(shards)
            beat()
            sleep(POLL_S)

    def _see(self, found: Manifest) -> None:
        before = self._manifest
        common = min(len(found.shards), len(before.shards))
        same_tokenizer = found.tokenizer_sha256 == before.tokenizer_sha256
        is_shorter = len(found.shards) < len(before.shards)
        if (
            found.shards[:common] != before.shards[:common]
            or not same_tokenizer
            or (is_shorter and found.is_finished)
        ):
            raise DataError(
                f"{before.store.name}: the shards have changed while they were read: of "
                f"{len(before.shards)} with sha256 {before.sha256} the first {common} now have "
                f"{found.prefix_sha256(common)}; restore them, or start a new training run"
            )
        # A writer that has been started again lists its shards anew while it checks them.
        if is_shorter:
            return
        if len(found.shards) > len(before.shards):
            self._alive_at = monotonic()
        self._manifest = found

    def _require_writer(self) -> None:
        has_writer = self._manifest.store.has_writer()
        if has_writer:
            self._alive_at = monotonic()
        idle_s = monotonic() - self._alive_at
        listed = f"{self._manifest.store.name}: {len(self._manifest.shards)} shards are listed"
        if has_writer is False and idle_s >= ABANDONED_S:
            raise DataError(
                f"{listed}, the manifest is not finished, and no process writes it: start "
                "`farspan data run` again with its options, then continue"
            )
        if has_writer is None and idle_s >= STALLED_S:
            raise DataError(
                f"{listed}, the manifest is not finished, and none has been added for "
                f"{idle_s / 60:.0f} minutes: see whether the pipeline and the upload of its shards "
                "still run, then continue"
            )

    def _tell(self, shards: int) -> None:
        if monotonic() - self._told_at >= REPORT_S:
            self._told_at = monotonic()
            log.warning(
                "%s: waiting for shard %d, %d are finished",
                self._manifest.store.name,
                shards,
                len(self._manifest.shards),
            )
