"""Records of web archives, as warcio writes them, and some that lie."""

import gzip
import io
from collections.abc import Iterable

from warcio.statusandheaders import StatusAndHeaders
from warcio.warcwriter import WARCWriter

HTML = b"<html><body><p>Some words on a page.</p></body></html>"


def record(
    number: int,
    body: bytes = HTML,
    *,
    kind: str = "response",
    status: str = "200 OK",
    http: Iterable[tuple[str, str]] = (("Content-Type", "text/html"),),
    compressed: bool = True,
) -> bytes:
    """One record of an archive, as warcio writes it."""
    out = io.BytesIO()
    writer = WARCWriter(out, gzip=compressed)
    headers = StatusAndHeaders(status, list(http), protocol="HTTP/1.1")
    has_http = kind in ("response", "revisit")
    warc_headers = {
        "WARC-Record-ID": f"<urn:uuid:{number}>",
        "X-Doc-Id": f"doc-{number}",
        # With the time of the run its compressed bytes would be others each time.
        "WARC-Date": "2026-01-01T00:00:00Z",
    }
    if kind == "conversion":
        warc_headers["Content-Type"] = "text/plain"
    writer.write_record(
        writer.create_warc_record(
            f"http://example.org/{number}",
            kind,
            payload=io.BytesIO(body),
            http_headers=headers if has_http else None,
            warc_headers_dict=warc_headers,
        )
    )
    return out.getvalue()


def lying(number: int, by: int, *, compressed: bool = True) -> bytes:
    """A record whose Content-Length is off by `by` bytes."""
    plain = record(number, compressed=False)
    name = b"\r\nContent-Length: "
    start = plain.index(name) + len(name)
    end = plain.index(b"\r\n", start)
    wrong = plain[:start] + str(int(plain[start:end]) + by).encode() + plain[end:]
    return gzip.compress(wrong, mtime=0) if compressed else wrong
