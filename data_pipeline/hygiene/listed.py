"""Files that a recipe names: found from its folder, and told apart by their content."""

import hashlib
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Self

from pydantic import Field

from data_pipeline.errors import DataError, file_errors
from data_pipeline.quality.linear import sha256_of
from data_pipeline.quality.verdict import Thresholds


class Finding(NamedTuple):
    """Why a document is dropped, and what in it is to blame, for a row of the audit."""

    reason: str
    detail: str


class FileSettings(Thresholds):
    """Settings that name files.

    Attributes:
        files: not where they lie but their hashes are in the plan of a run, so that other lists
            are another run.
        sha256: of each file, once `with_files` has read it; a recipe may give them, and other
            files are refused then.
    """

    files: tuple[Path, ...] = Field((), exclude=True)
    sha256: tuple[str, ...] = ()

    def with_files(self, folder: Path) -> Self:
        """These settings with their files as they are now.

        Args:
            folder: where relative paths start.

        Raises:
            DataError: no file is given, or one cannot be read, is malformed or not the one that
                the recipe asks for.
        """
        if not self.files:
            raise DataError("`files` is empty; name a file, or write null for the whole section")
        files = tuple(folder / file for file in self.files)
        hashes = tuple(map(sha256_of, files))
        if self.sha256 and len(self.sha256) != len(files):
            raise DataError(f"{len(self.sha256)} sha256 for {len(files)} files; give all or none")
        for file, found, wanted in zip(files, hashes, self.sha256 or hashes, strict=True):
            if found != wanted:
                raise DataError(f"{file}: has sha256 {found}, but the recipe asks for {wanted}")
        settings = self.model_copy(update={"files": files, "sha256": hashes})
        settings.load()
        return settings

    @abstractmethod
    def load(self) -> Any:
        """What the files hold, read once in a process."""


def read_lines(path: Path, sha256: str) -> Iterator[tuple[str, str]]:
    """The entries of a list, one a line, and where each stands; after a # comes a comment.

    Raises:
        DataError: the file cannot be read, is no UTF-8, has no entry, or is not the one it was.
    """
    with file_errors():
        data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != sha256:
        raise changed(path)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DataError(f"{path}:{line}: not UTF-8; convert the list, by iconv for one") from error
    entries = [
        (entry, f"{path}:{number}")
        for number, line in enumerate(text.splitlines(), 1)
        if (entry := line.partition("#")[0].strip())
    ]
    if not entries:
        raise DataError(f"{path}: holds no entry; write one a line, or null for the whole section")
    return iter(entries)


def changed(path: Path) -> DataError:
    return DataError(f"{path}: has changed while it was in use; start again")
