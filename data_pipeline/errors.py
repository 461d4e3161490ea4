"""Errors meant for the person at the command line."""

from collections.abc import Iterator
from contextlib import contextmanager


class DataError(Exception):
    """Bad input or a user's mistake: the message is printed as it is, without a traceback.

    The command line treats any exception with an `exit_code` so.
    """

    exit_code = 2


@contextmanager
def file_errors() -> Iterator[None]:
    """Tell what the file system refuses, and where, as a `DataError`."""
    try:
        yield
    except OSError as error:
        where = "" if error.filename is None else f"{error.filename}: "
        raise DataError(f"{where}{error.strerror or error}") from error
