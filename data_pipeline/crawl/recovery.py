"""Where records start in a damaged archive, found from its bytes alone."""

import zlib
from mmap import ACCESS_READ, mmap
from pathlib import Path

GZIP_MAGIC = b"\x1f\x8b\x08"
RECORD_MAGIC = b"WARC/"
BLOCK = 1 << 20


class ArchiveBytes:
    """A memory-mapped archive: one gzip member per record, or plain records one after another."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            is_empty = file.seek(0, 2) == 0
            self._bytes = b"" if is_empty else mmap(file.fileno(), 0, access=ACCESS_READ)
        self.is_gzip = self._bytes[:2] == GZIP_MAGIC[:2]

    def next_record(self, start: int) -> int | None:
        """Offset of the first record at or after byte `start`, or None.

        In a gzip archive that is a member whose text begins with `WARC/`, otherwise a `WARC/`
        after an empty line.
        """
        if not self.is_gzip:
            position = self._bytes.find(b"\r\n\r\n" + RECORD_MAGIC, max(0, start - 4))
            return None if position < 0 else position + 4
        position = self._bytes.find(GZIP_MAGIC, start)
        while position >= 0:
            if self._starts_record(position):
                return position
            position = self._bytes.find(GZIP_MAGIC, position + 1)
        return None

    def member_end(self, start: int) -> int | None:
        """Offset just after the gzip member at byte `start`; None where none is whole there."""
        stream = zlib.decompressobj(zlib.MAX_WBITS | 16)
        position, compressed = start, b""
        while not stream.eof:
            if not compressed:
                compressed = self._bytes[position : position + BLOCK]
                position += len(compressed)
            if not compressed:
                return None
            try:
                stream.decompress(compressed, BLOCK)
            except zlib.error:
                return None
            compressed = stream.unconsumed_tail
        return position - len(stream.unused_data)

    def unreadable_tail(self, start: int) -> int | None:
        """Offset at which the gzip members from byte `start` on stop being whole, or None.

        A stream reader cannot tell a file cut inside a member's header from its end.
        """
        position = start
        while self.is_gzip and position < len(self._bytes):
            end = self.member_end(position)
            if end is None:
                return position
            position = end
        return None

    def _starts_record(self, position: int) -> bool:
        stream = zlib.decompressobj(zlib.MAX_WBITS | 16)
        try:
            text = stream.decompress(self._bytes[position : position + 512], len(RECORD_MAGIC))
        except zlib.error:
            return False
        return text == RECORD_MAGIC
