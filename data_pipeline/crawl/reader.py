"""One pass over an archive: forward from its first byte, with looks back and ahead."""

import hashlib
import io
from collections.abc import Callable, Generator
from types import TracebackType

# What is kept in memory of the bytes read last: most looks back end here.
KEPT_BYTES = 4 << 20
FIND_BYTES = 1 << 16

Blocks = Generator[bytes, None, None]


class Reader:
    """The bytes of a file that is read once from end to end, wherever its parts are asked for.

    A part that lies further back than the bytes kept in memory is fetched again; one that lies
    ahead is reached by reading on.

    Args:
        blocks: the file's blocks from a byte on.
        size: bytes of the file.
        start: where the reading begins; what precedes it is fetched only when asked for.
    """

    def __init__(self, blocks: Callable[[int], Blocks], size: int, start: int = 0) -> None:
        self.size = size
        self._blocks = blocks
        self._digest = hashlib.sha256()
        self._front = _Stretch(self._hashed(start), start)
        self._back: _Stretch | None = None

    def __enter__(self) -> "Reader":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._front.close()
        if self._back is not None:
            self._back.close()

    def read(self, offset: int, size: int) -> bytes:
        """The `size` bytes from `offset` on; fewer only at the end of the file."""
        if offset >= self._front.start:
            return self._front.read(offset, size)
        if self._back is None or not self._back.start <= offset <= self._back.end:
            if self._back is not None:
                self._back.close()
            self._back = _Stretch(self._blocks(offset), offset)
        return self._back.read(offset, size)

    def find(self, pattern: bytes, start: int) -> int | None:
        """Offset of the first `pattern` at or after byte `start`, or None."""
        while True:
            block = self.read(start, FIND_BYTES)
            position = block.find(pattern)
            if position >= 0:
                return start + position
            if len(block) < FIND_BYTES:
                return None
            start += len(block) - len(pattern) + 1

    def view(self, start: int) -> "View":
        """The file from byte `start` on, as a file to read."""
        return View(self, start)

    def finish(self) -> tuple[int, str]:
        """Read to the end; return where that is, and the sha256 of the bytes since the start."""
        while self._front.advance(self._front.end):
            pass
        return self._front.end, self._digest.hexdigest()

    def _hashed(self, start: int) -> Blocks:
        for block in self._blocks(start):
            self._digest.update(block)
            yield block


class View(io.RawIOBase):
    """A file to be read forward from one of its bytes on."""

    def __init__(self, reader: Reader, start: int) -> None:
        self._reader = reader
        self._position = start

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        block = self._reader.read(self._position, self._reader.size if size < 0 else size)
        self._position += len(block)
        return block

    def tell(self) -> int:
        return self._position


class _Stretch:
    """A file read forward from a byte on, its last bytes in memory: those from `start` to `end`."""

    def __init__(self, blocks: Blocks, start: int) -> None:
        self.start = start
        self._blocks = blocks
        self._bytes = bytearray()

    @property
    def end(self) -> int:
        return self.start + len(self._bytes)

    def read(self, offset: int, size: int) -> bytes:
        while self.end < offset + size and self.advance(offset):
            pass
        first = offset - self.start
        return bytes(memoryview(self._bytes)[first : first + size])

    def advance(self, needed: int) -> bool:
        """Read one block more, and forget old bytes before byte `needed`; false at the end."""
        block = next(self._blocks, None)
        if block is None:
            return False
        self._bytes += block
        if len(self._bytes) > 2 * KEPT_BYTES:
            forgotten = min(len(self._bytes) - KEPT_BYTES, max(0, needed - self.start))
            del self._bytes[:forgotten]
            self.start += forgotten
        return True

    def close(self) -> None:
        self._blocks.close()
