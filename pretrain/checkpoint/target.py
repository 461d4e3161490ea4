"""A folder on any file system that fsspec knows: this machine's, NFS, or an object store."""

import os
import posixpath
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from pretrain.errors import AttemptError, UserError
from pretrain.run_dir import sync_folder

READ_BYTES = 1 << 22


@dataclass(frozen=True)
class Target:
    """A folder, named by a path or by a URL such as s3://bucket/folder.

    A file is whole or absent once `commit` has written it; one that is written through `create` is
    durable once it is closed, and may be there in part before.

    What cannot be reached or read is raised as AttemptError, unless it is not there: nothing may be
    concluded from it. On this machine, what cannot be written is raised as it is.
    """

    url: str

    @cached_property
    def _place(self) -> tuple[Any, str]:
        protocol = self.url.partition("://")[0]
        try:
            file_system, path = fsspec.core.url_to_fs(self.url, use_listings_cache=False)
        except ValueError as error:
            raise UserError(f"{self.url} is on no file system that is known: {error}") from None
        except ImportError:
            raise UserError(
                f"{self.url}: no package for {protocol}:// is installed; "
                f"fsspec names it (s3:// needs s3fs: pip install 'farspan[s3]')"
            ) from None
        return file_system, path

    def check(self) -> None:
        """Raises UserError if there is no such file system, or no package for it."""
        assert self._place

    @contextmanager
    def _reached(self, *, to_write: bool = False) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise
        except Exception as error:
            if self.is_local and to_write:
                raise
            what = str(error) or type(error).__name__
            raise AttemptError(f"{self.url} cannot be reached: {what}") from error

    @property
    def is_local(self) -> bool:
        return isinstance(self._place[0], LocalFileSystem)

    def __truediv__(self, name: str) -> "Target":
        return Target(posixpath.join(self.url, name))

    def __str__(self) -> str:
        return self.url

    def make(self, *, parents: bool = True) -> None:
        """Make the folder, where a file system has such.

        Raises:
            FileNotFoundError: what it lies in is not there, and `parents` are not to be made.
        """
        file_system, path = self._place
        if self.is_local and not parents:
            Path(path).mkdir(exist_ok=True)
        else:
            with self._reached(to_write=True):
                file_system.makedirs(path, exist_ok=True)

    def names(self) -> list[str]:
        """Of what is in the folder; none if there is no folder."""
        file_system, path = self._place
        try:
            with self._reached():
                found = file_system.ls(path, detail=False)
        except FileNotFoundError:
            return []
        return sorted(posixpath.basename(entry.rstrip("/")) for entry in found)

    def exists(self) -> bool:
        # fsspec's own takes every error for a no.
        try:
            self.size()
        except FileNotFoundError:
            return False
        return True

    def size(self) -> int:
        """Bytes of the file. Raises FileNotFoundError."""
        with self._reached():
            return int(self._place[0].info(self._place[1])["size"])

    def read(self) -> bytes:
        """The whole file. Raises FileNotFoundError."""
        with self._reached():
            content: bytes = self._place[0].cat_file(self._place[1])
        return content

    def open(self) -> IO[bytes]:
        """For reading, anywhere in the file."""
        with self._reached():
            file: IO[bytes] = self._place[0].open(self._place[1], "rb")
        return file

    def chunks(self) -> Iterator[bytes]:
        """The file from its start, piece by piece."""
        with self._reached(), self.open() as file:
            while chunk := file.read(READ_BYTES):
                yield chunk

    def create(self, write: Callable[[IO[bytes]], object]) -> None:
        """Let `write` fill a new file, and make it durable. What failed is not left behind."""
        file_system, path = self._place
        try:
            with self._reached(to_write=True), file_system.open(path, "wb") as file:
                write(file)
                if self.is_local:
                    file.flush()
                    os.fsync(file.fileno())
        except BaseException:
            self.remove()
            raise

    def commit(self, content: bytes, check: Callable[[], None]) -> None:
        """Replace the file at once: whoever reads sees the old content or the new one.

        Args:
            check: raises if that must not be done after all; called at the last moment.
        """
        if not self.is_local:
            check()
            # An object store shows an object once it is whole.
            with self._reached(to_write=True):
                self._place[0].pipe_file(self._place[1], content)
            return
        path = Path(self._place[1])
        aside = Target(str(path.with_name(f".{path.name}.{os.getpid()}")))
        aside.create(lambda file: file.write(content))
        try:
            check()
            os.replace(aside._place[1], path)
        except BaseException:
            aside.remove()
            raise
        sync_folder(path.parent)

    def rename(self, name: str) -> None:
        """Give the file another name in its folder."""
        file_system, path = self._place
        with self._reached(to_write=True):
            file_system.mv(path, posixpath.join(posixpath.dirname(path), name))

    def remove(self) -> None:
        """Remove a file, or a folder with all that is in it, if it is there."""
        file_system, path = self._place
        with suppress(FileNotFoundError), self._reached(to_write=True):
            file_system.rm(path, recursive=True)
