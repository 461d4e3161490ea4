"""HTTP bodies as the server meant them: transfer and content encodings removed."""

import io
import re
import zlib

import brotli
from fastwarc.stream_io import BrotliReader, ChunkedReader, ZstdReader

CHUNK_HEADER = re.compile(rb"[0-9a-fA-F]{1,8}[ \t]*(?:;[^\r\n]*)?\r\n")
LAST_CHUNK = b"0\r\n\r\n"
GZIP_MAGIC = b"\x1f\x8b\x08"
# zlib copies what follows a member: whole bodies would cost the square of their members.
GZIP_PIECE = 1 << 14
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
# No text has them, but one in UTF-16 or ISO 2022.
CONTROL_CODE = re.compile(rb"[\0-\x08\x0e-\x1a\x1c-\x1f]")


class BodyError(Exception):
    """The body cannot be decoded; `reason` is what the audit row says."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


def decode_body(raw: bytes, transfer_encoding: str, content_encoding: str, limit: int) -> bytes:
    """Undo chunked framing and compression as two HTTP headers name them, at most `limit` bytes.

    Crawlers disagree on whether a stored body is still encoded as its headers say, so the bytes
    are asked first: framing that is not there is not removed.

    Raises:
        BodyError: reason `encoding` (cut or corrupt) or `oversized` (more than `limit` bytes).
    """
    try:
        if _is_chunked(raw, transfer_encoding.lower()):
            raw = ChunkedReader(io.BytesIO(raw)).read(limit + 1)
        raw = _decompress(raw, content_encoding.lower(), limit)
    except (OSError, zlib.error) as error:
        raise BodyError("encoding", f"the body cannot be decoded: {error}") from error
    if len(raw) > limit:
        raise BodyError("oversized", f"the decoded body exceeds {limit} bytes")
    return raw


def _is_chunked(raw: bytes, transfer_encoding: str) -> bool:
    if CHUNK_HEADER.match(raw) is None:
        return False
    return "chunked" in transfer_encoding or raw.endswith(LAST_CHUNK)


def _decompress(raw: bytes, content_encoding: str, limit: int) -> bytes:
    if raw.startswith(GZIP_MAGIC):
        return _gunzip(raw, limit)
    if raw.startswith(ZSTD_MAGIC):
        return ZstdReader(io.BytesIO(raw)).read(limit + 1)
    if "deflate" in content_encoding:
        return _deflated_or_plain(raw, limit)
    if "br" in content_encoding.replace(" ", "").split(","):
        return _brotli_or_plain(raw, limit)
    return raw


def _gunzip(raw: bytes, limit: int) -> bytes:
    """All members of a gzip file (RFC 1952, section 2.2), up to one byte more than `limit`."""
    decoded = bytearray()
    start = 0
    while raw.startswith(GZIP_MAGIC, start):
        member = zlib.decompressobj(zlib.MAX_WBITS | 16)
        while not member.eof:
            piece = raw[start : start + GZIP_PIECE]
            if not piece:
                raise zlib.error("the compressed stream is cut")
            decoded += member.decompress(piece, limit + 1 - len(decoded))
            if len(decoded) > limit:
                return bytes(decoded)
            start += len(piece) - len(member.unused_data)
    return bytes(decoded)


def _inflate(raw: bytes, window_bits: int, limit: int) -> bytes:
    stream = zlib.decompressobj(window_bits)
    decoded = stream.decompress(raw, limit + 1)
    if not stream.eof and len(decoded) <= limit:
        raise zlib.error("the compressed stream is cut")
    return decoded


def _deflated_or_plain(raw: bytes, limit: int) -> bytes:
    """Servers send zlib (RFC 9110) or bare deflate, and some crawlers have decoded it already."""
    for window_bits in (zlib.MAX_WBITS, -zlib.MAX_WBITS):
        try:
            return _inflate(raw, window_bits, limit)
        except zlib.error:
            continue
    return raw


def _brotli_or_plain(raw: bytes, limit: int) -> bytes:
    """Brotli has no magic number: bytes that do not decode were decoded by the crawler."""
    try:
        return BrotliReader(io.BytesIO(raw)).read(limit + 1)
    except OSError:
        if _begins_brotli(raw, limit):
            raise OSError("the compressed stream is cut") from None
        return raw


def _begins_brotli(raw: bytes, limit: int) -> bool:
    """Whether all bytes are those of a brotli stream, and not of a text."""
    if CONTROL_CODE.search(raw) is None:  # the decoder takes texts that begin with L for one
        return False
    try:
        brotli.Decompressor().process(raw, output_buffer_limit=limit + 1)
    except brotli.error:
        return False
    return True
