"""The report of runs that are still training: what has changed of it since it was looked at."""

import base64
import hashlib
import secrets
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import numpy as np

from launch.report import NamedRun, data_manifests
from pretrain.metrics.history import HistoryReader
from pretrain.metrics.report import Run, chart_columns, fragments, render_page, step_range

LOOK_S = 1.0
POLL_S = 2.0
# When no run trains any more; one may be resumed, or evaluated.
POLL_ENDED_S = 15.0
VERSIONS_KEPT = 8

Columns = Mapping[str, Any]


@dataclass(frozen=True)
class Version:
    """What the page shows at one time."""

    number: int
    sources: Mapping[str, Columns]
    fragments: Mapping[str, str]
    step_range: tuple[float, float]

    @property
    def layout(self) -> str:
        """Equal as long as a page needs no other charts and elements."""
        sources = [f"{name} {_heights(self.sources[name])}" for name in sorted(self.sources)]
        names = "\n".join([*sources, "", *sorted(self.fragments)])
        return hashlib.sha256(names.encode()).hexdigest()[:16]


def _heights(columns: Columns) -> list[int]:
    """Rows of each heat map."""
    return [image.shape[0] for image in columns.get("image", ())]


class LiveReport:
    """Reads what runs log, and knows what of it a browser has.

    Several threads may ask; one may `follow`.
    """

    def __init__(self, runs: Sequence[NamedRun]) -> None:
        self._runs = runs
        self._readers = [HistoryReader(run.directory.metrics) for run in runs]
        self._lock = threading.Lock()
        # A browser may know versions of a server that was here before.
        self._server = secrets.token_hex(4)
        self._versions: list[Version] = []
        self._made = 0.0
        self._problem = ""
        self._has_looked = False

    def follow(self, stop: threading.Event) -> None:
        """Read what is logged, until `stop` is set."""
        wait_s = 0.0
        while not stop.wait(wait_s):
            wait_s = 0.0 if self.look() else LOOK_S

    def look(self) -> bool:
        """Read a block of what is new of each run; whether there was anything."""
        has_news = False
        problem = ""
        for reader in self._readers:
            with self._lock:
                try:
                    has_news |= reader.read_block()
                except Exception as error:
                    # Whatever it is, the page says it, and what comes later is read.
                    what = error.strerror if isinstance(error, OSError) else repr(error)
                    problem = f"{reader.path} cannot be read: {what}"
        self._problem = problem
        self._has_looked = True
        return has_news

    def page(self) -> str:
        with self._lock:
            return render_page(self._now(), live=True)

    def changes(self, since: str) -> dict[str, Any]:
        """What a page has to replace, as JSON; nothing until what is logged has been read.

        Args:
            since: the `version` that it has; everything is sent if it has none that is known.
        """
        with self._lock:
            state = {"state": self._state(), "poll_s": POLL_S if self._is_live() else POLL_ENDED_S}
            if self._share_read() < 1:
                return state
            newest = self._newest()
            known = {f"{self._server}-{version.number}": version for version in self._versions}
            old = known.get(since)
            return {
                "version": f"{self._server}-{newest.number}",
                "layout": newest.layout,
                "sources": _changed_sources(old.sources if old else {}, newest.sources),
                "fragments": {
                    name: html
                    for name, html in newest.fragments.items()
                    if not old or old.fragments.get(name) != html
                },
                "step_range": newest.step_range,
                **state,
            }

    def _now(self) -> list[Run]:
        return [
            Run(run.name, run.directory, reader.history(), data_manifests(run.directory))
            for run, reader in zip(self._runs, self._readers, strict=True)
        ]

    def _newest(self) -> Version:
        """Made anew at most every LOOK_S, however many browsers ask."""
        if self._versions and time.monotonic() - self._made < LOOK_S:
            return self._versions[-1]
        runs = self._now()
        number = self._versions[-1].number + 1 if self._versions else 1
        version = Version(number, chart_columns(runs), fragments(runs), step_range(runs))
        self._versions = [*self._versions[1 - VERSIONS_KEPT :], version]
        self._made = time.monotonic()
        return version

    def _is_live(self) -> bool:
        return any(
            not run.directory.done.exists() and not run.directory.stopped.exists()
            for run in self._runs
        )

    def _share_read(self) -> float:
        if not self._has_looked:
            return 0.0
        return min(reader.share_read for reader in self._readers)

    def _state(self) -> str:
        if self._problem:
            return self._problem
        if (share := self._share_read()) < 1:
            return f"reading, {share:.0%}"
        return "live" if self._is_live() else "ended"


def _changed_sources(
    old: Mapping[str, Columns], new: Mapping[str, Columns]
) -> dict[str, dict[str, Any]]:
    """The columns that have changed, by source, as a page takes them."""
    changed = {}
    for name, columns in new.items():
        before = old.get(name, {})
        news = {
            column: sent
            for column, values in columns.items()
            if (sent := _news(before.get(column), values)) is not None
        }
        if news:
            changed[name] = news
    return changed


def _news(old: Any, new: Any) -> Any:
    """What is new of a column: values after those kept, a whole image, a list; None: nothing."""
    if isinstance(new, np.ndarray):
        kept = _common(old, new) if isinstance(old, np.ndarray) else 0
        if kept == len(new) and isinstance(old, np.ndarray) and len(old) == kept:
            return None
        return {"kept": kept, **_encoded(new[kept:])}
    if new and isinstance(new[0], np.ndarray):
        if old and all(map(np.array_equal, old, new)):
            return None
        return {"images": [_image_news(*pair) for pair in zip_longest(old or (), new)]}
    return None if old == new else {"values": list(new)}


def _image_news(old: np.ndarray | None, new: np.ndarray) -> dict[str, Any]:
    """The columns after those that are equal: a heat map grows to the right."""
    kept = 0
    if old is not None and old.shape[0] == new.shape[0]:
        width = min(old.shape[1], new.shape[1])
        differs = np.flatnonzero((old[:, :width] != new[:, :width]).any(0))
        kept = int(differs[0]) if len(differs) else width
    return {"shape": new.shape, "kept": kept, **_encoded(new[:, kept:])}


def _common(old: np.ndarray, new: np.ndarray) -> int:
    """How many values at the beginning are equal."""
    length = min(len(old), len(new))
    if old.dtype != new.dtype or not length:
        return 0
    # By their bits: NaN does not equal itself.
    bits = f"u{new.dtype.itemsize}"
    differs = np.flatnonzero(old[:length].view(bits) != new[:length].view(bits))
    return int(differs[0]) if len(differs) else length


def _encoded(values: np.ndarray) -> dict[str, str]:
    little_endian = values.astype(values.dtype.newbyteorder("<"), copy=False)
    data = base64.b64encode(np.ascontiguousarray(little_endian).tobytes()).decode()
    return {"dtype": values.dtype.name, "data": data}
