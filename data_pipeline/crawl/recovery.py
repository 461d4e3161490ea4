"""Where records start in a damaged archive, found from its bytes alone."""

import zlib
from collections.abc import Iterator

from data_pipeline.crawl.reader import Reader

GZIP_MAGIC = b"\x1f\x8b\x08"
RECORD_MAGIC = b"WARC/"
END_OF_BLOCK = b"\r\n\r\n"
MAX_HEADERS = 1 << 16
BLOCK = 1 << 16


class ArchiveBytes:
    """The bytes of an archive: one gzip member per record, or plain records one after another."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self.is_gzip = reader.read(0, 2) == GZIP_MAGIC[:2]

    def next_record(self, start: int) -> int | None:
        """Offset of the first record at or after byte `start`, or None.

        In a gzip archive that is a member whose text begins with `WARC/`, otherwise a `WARC/`
        after an empty line.
        """
        if not self.is_gzip:
            end = self.reader.find(END_OF_BLOCK + RECORD_MAGIC, max(0, start - 4))
            return None if end is None else end + 4
        position = self.reader.find(GZIP_MAGIC, start)
        while position is not None and not self._starts_record(position):
            position = self.reader.find(GZIP_MAGIC, position + 1)
        return position

    def record_end(self, start: int, content_length: int) -> int | None:
        """Offset just after the record at byte `start`, or None where it is not as long as it says.

        A record of an archive that is one gzip member as a whole has no place of its own to look
        at: it is believed, and `start` returned.
        """
        headers = self._text(start, 0, MAX_HEADERS).find(END_OF_BLOCK)
        if headers < 0:
            return None if self._starts_record(start) else start
        end = headers + len(END_OF_BLOCK) + content_length
        if self._text(start, end, len(END_OF_BLOCK)) != END_OF_BLOCK:
            return None
        if self.is_gzip:
            return self.member_end(start) or self.reader.size
        return start + end + len(END_OF_BLOCK)

    def member_end(self, start: int) -> int | None:
        """Offset just after the gzip member at byte `start`; None where none is whole there."""
        member = _Member(self.reader, start)
        for _ in member:
            pass
        return member.end

    def unreadable_tail(self, start: int) -> int | None:
        """Offset at which the gzip members from byte `start` on stop being whole, or None.

        A stream reader cannot tell a file cut inside a member's header from its end.
        """
        position = start
        while self.is_gzip and position < self.reader.size:
            end = self.member_end(position)
            if end is None:
                return position
            position = end
        return None

    def _starts_record(self, position: int) -> bool:
        return self._text(position, 0, len(RECORD_MAGIC)) == RECORD_MAGIC

    def _text(self, start: int, position: int, size: int) -> bytes:
        """At most `size` bytes from `position` on in the uncompressed text at byte `start`."""
        if not self.is_gzip:
            return self.reader.read(start + position, size)
        text, seen = b"", 0
        for block in _Member(self.reader, start):
            text += block[max(0, position - seen) :]
            seen += len(block)
            if len(text) >= size:
                break
        return text[:size]


class _Member:
    """The text of one gzip member in blocks, as far as it can be decompressed.

    Attributes:
        end: offset just after the member, once all blocks of a whole one have been read.
    """

    def __init__(self, archive: Reader, start: int) -> None:
        self._archive = archive
        self._start = start
        self.end: int | None = None

    def __iter__(self) -> Iterator[bytes]:
        stream = zlib.decompressobj(zlib.MAX_WBITS | 16)
        position, compressed = self._start, b""
        while not stream.eof:
            if not compressed:
                compressed = self._archive.read(position, BLOCK)
                position += len(compressed)
            if not compressed:
                return
            try:
                yield stream.decompress(compressed, BLOCK)
            except zlib.error:
                return
            compressed = stream.unconsumed_tail
        self.end = position - len(stream.unused_data)
