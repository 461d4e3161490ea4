"""The folder of an index: what belongs to it, and the file that says so, replaced at once.

    index.json      settings, dumps, segments, the state; the first line is the hash of the rest
    segment-*/      columns of documents, never changed
    state-*/        the cluster of each document
    dump-*          the numbers of the earlier documents that a dump has superseded

What has such a name and is not named by index.json is left of a process that was killed, and is
removed.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from data_pipeline.dedup.index.columns import ColumnWriter
from data_pipeline.dedup.index.segments import Segment, Segments
from data_pipeline.dedup.index.state import STATE, State
from data_pipeline.dedup.minhash import PERMUTATION_SEED
from data_pipeline.dedup.settings import Settings
from data_pipeline.errors import DataError, file_errors

INDEX = "index.json"
LOCK = ".lock"
SYNCS_AT_ONCE = 16
VERSION = 1
# As `Index.new` names them: of dumps there are files, of all else folders.
OWN_FILE, OWN_FOLDER = re.compile(r"dump-\d{6,}"), re.compile(r"(segment|state)-\d{6,}")


@dataclass(frozen=True)
class Dump:
    """Documents that were added together.

    Attributes:
        first, stop: the number of its first document, and of the next dump's.
        digest: of its ids, texts and preferences.
        superseded: the file that holds what it did to earlier dumps.
    """

    first: int
    stop: int
    digest: str
    superseded: str


@dataclass(frozen=True)
class Contents:
    """What index.json says.

    Attributes:
        segments: name, first document and number of documents of each.
        state: its name.
        names: how many names were given; a name is never used again.
    """

    settings: Settings
    dumps: tuple[Dump, ...] = ()
    segments: tuple[tuple[str, int, int], ...] = ()
    state: str = ""
    names: int = 0
    version: int = VERSION
    seed: int = PERMUTATION_SEED


class Index:
    """An index that this process holds, see `held_index`."""

    def __init__(self, folder: Path, contents: Contents) -> None:
        self.folder = folder
        self.contents = contents
        self._names = contents.names
        self._new: list[Path] = []

    @property
    def segments(self) -> Segments:
        return Segments(
            [Segment(self.folder / name, *rest) for name, *rest in self.contents.segments]
        )

    @property
    def state(self) -> State:
        if self.contents.state:
            return State(self.folder / self.contents.state)
        empty = State(self.new("state"))
        empty.folder.mkdir()
        for name, kind in STATE.items():
            with ColumnWriter(empty.folder / name, kind):
                pass
        return empty

    def new(self, kind: str) -> Path:
        """A path that no file of this index ever had."""
        self._names += 1
        self._new.append(self.folder / f"{kind}-{self._names:06d}")
        return self._new[-1]

    def commit(self, segments: Segments, state: State, dumps: tuple[Dump, ...]) -> None:
        """From now on these are what the index has."""
        sync(self._new)
        listed = tuple((one.folder.name, one.first, one.documents) for one in segments.all)
        self.contents = replace(
            self.contents,
            segments=listed,
            state=state.folder.name,
            dumps=dumps,
            names=self._names,
        )
        body = json.dumps(asdict(self.contents), indent=1).encode()
        aside = self.folder / f".{INDEX}"
        aside.write_bytes(hashlib.sha256(body).hexdigest().encode() + b"\n" + body)
        sync([aside])
        aside.replace(self.folder / INDEX)

    def remove_leftovers(self) -> None:
        """Remove what index.json does not name."""
        named = {name for name, *_ in self.contents.segments} | {self.contents.state}
        named |= {dump.superseded for dump in self.contents.dumps}
        for path in self.folder.iterdir():
            if path.name not in named and _is_own(path):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def sync(paths: Sequence[Path]) -> None:
    """Have the files, and those of the folders, on disk; what is gone already needs not be."""
    files = [file for path in paths for file in (path, *path.glob("*")) if file.is_file()]
    with ThreadPoolExecutor(SYNCS_AT_ONCE) as pool:  # these share the journal's writes
        for _ in pool.map(_sync_file, files):
            pass


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


@contextmanager
def held_index(folder: Path, settings: Settings | None = None) -> Iterator[Index]:
    """The index in a folder, of which no other process can have it meanwhile.

    Args:
        settings: make an index with these if there is none; by default there must be one.

    Raises:
        DataError: there is none, it has other settings, it is damaged, another process holds it,
            or the folder has other files.
    """
    with file_errors():
        if settings is not None:
            folder.mkdir(parents=True, exist_ok=True)
        elif not (folder / INDEX).exists():
            raise DataError(f"{folder}: no index, as it has no {INDEX}; name the folder of one")
        _refuse_other_files(folder)
        with (folder / LOCK).open("a+") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise DataError(
                    f"{folder} is in use by another process: wait for it or stop it"
                ) from None
            index = Index(folder, _read_contents(folder, settings))
            index.remove_leftovers()
            try:
                yield index
            finally:
                index.remove_leftovers()


def _refuse_other_files(folder: Path) -> None:
    if (folder / INDEX).exists():
        return
    for path in sorted(folder.iterdir()):
        if path.name not in (LOCK, f".{INDEX}") and not _is_own(path):
            raise DataError(
                f"{folder}: has {path.name} but no {INDEX}, so it is no index; name an empty or a "
                "new folder"
            )


def _is_own(path: Path) -> bool:
    """Whether an index may have made it, not somebody who keeps dumps of such names here."""
    own = OWN_FOLDER if path.is_dir() else OWN_FILE
    return own.fullmatch(path.name) is not None


def _read_contents(folder: Path, settings: Settings | None) -> Contents:
    path = folder / INDEX
    if not path.exists():
        assert settings is not None
        return Contents(settings)
    sha256, _, body = path.read_bytes().partition(b"\n")
    if hashlib.sha256(body).hexdigest().encode() != sha256:
        raise DataError(f"{path}: damaged, its sha256 is not the one that it begins with")
    fields: dict[str, Any] = json.loads(body)
    if (fields["version"], fields["seed"]) != (VERSION, PERMUTATION_SEED):
        raise DataError(
            f"{folder}: made by another version, with format {fields['version']} and seed "
            f"{fields['seed']}, not {VERSION} and {PERMUTATION_SEED}; build the index anew"
        )
    fields["settings"] = Settings(**fields["settings"])
    fields["dumps"] = tuple(Dump(**dump) for dump in fields["dumps"])
    fields["segments"] = tuple((str(name), int(a), int(b)) for name, a, b in fields["segments"])
    contents = Contents(**fields)
    if settings is not None:
        _refuse_other_settings(folder, contents.settings, settings)
    return contents


def _refuse_other_settings(folder: Path, has: Settings, asked: Settings) -> None:
    differences = [
        f"{name}={value} (asked for: {asdict(asked)[name]})"
        for name, value in asdict(has).items()
        if value != asdict(asked)[name]
    ]
    if differences:
        raise DataError(
            f"{folder}: an index of {', '.join(differences)}: use its settings, or another --index"
        )
