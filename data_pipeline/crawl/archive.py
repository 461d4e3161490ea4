"""Stream the pages of one WARC or WET file, and account for every record that is not one."""

from collections import Counter
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from fastwarc.warc import ArchiveIterator, WarcRecord

from data_pipeline.crawl.body import BodyError, decode_body
from data_pipeline.crawl.inputs import Source, source_named
from data_pipeline.crawl.recovery import ArchiveBytes

DOCUMENTS = frozenset({"response", "resource", "conversion", "revisit"})
TEXTUAL_TYPES = frozenset({"text/html", "application/xhtml+xml", "text/plain"})
MAX_BODY_BYTES = 16 << 20
READ_BYTES = 1 << 20
# Of a Content-Length; a file has fewer than 2^63 bytes.
MOST_DIGITS = 19


@dataclass(frozen=True)
class Page:
    """A document as it was crawled.

    Attributes:
        content_type: in lower case; None where the server named none.
        date: WARC-Date; None where the record has none that is a time.
    """

    id: str
    url: str
    file: str
    offset: int
    status: int | None
    content_type: str | None
    charset: str | None
    body: bytes
    date: datetime | None = None


@dataclass(frozen=True)
class Reject:
    """A document the crawl stage does not pass on, and why."""

    id: str
    url: str
    file: str
    offset: int
    reason: str
    detail: str


@dataclass(frozen=True)
class _Record:
    """What one record gave: a document's outcome, None for a record that is no document."""

    id: str
    url: str
    offset: int
    content_length: int
    is_whole: bool
    outcome: Page | Reject | None


class Archive:
    """The documents of one archive file, in file order, each one a `Page` or a `Reject`.

    Damage never ends the iteration: what precedes it is kept, the damaged record becomes a
    `Reject`, and reading goes on at the next record that can be found.

    Args:
        source: a .warc or .wet file, compressed (gzip member per record) or not. It is read once,
            as it arrives.
        id_header: WARC header that names a document; one without it is called `file:number`.
        max_body: larger bodies, decoded, are rejected; memory is bounded by it.
    """

    def __init__(
        self, source: Source, *, id_header: str = "WARC-Record-ID", max_body: int = MAX_BODY_BYTES
    ) -> None:
        self.source = source
        self.id_header = id_header
        self.max_body = max_body
        self.records: Counter[str] = Counter()
        """Records seen so far by WARC type, documents and others."""
        self.bytes = 0
        """Of the file, once the iteration has ended; `sha256` is that of all of them."""
        self.sha256 = ""

    def __iter__(self) -> Iterator[Page | Reject]:
        """Raises DataError where the file cannot be read, or is not the one it was."""
        self.records.clear()
        with self.source.open() as reader:
            archive = ArchiveBytes(reader)
            start: int | None = 0
            while start is not None:
                start = yield from self.read_from(archive, start)
            self.bytes, self.sha256 = reader.finish()
        self.source.verify(self.sha256)

    def read_from(
        self, archive: ArchiveBytes, start: int
    ) -> Generator[Page | Reject, None, int | None]:
        """Yield documents from byte `start` on; return where to resume after damage, or None.

        A document is passed on once its successor has been found where it should be: only then
        was its Content-Length true.
        """
        last: _Record | None = None
        records = iter(ArchiveIterator(archive.reader.view(start), parse_http=False))
        while True:
            try:
                record = next(records, None)
            except OSError as error:
                return (yield from self._after_error(archive, start, last, str(error)))
            if last is not None and last.outcome is not None:
                yield last.outcome
            if record is None:
                yield from self._after_end(archive, last.offset if last else start)
                return None
            last = self._take(record)
            if not last.is_whole:
                return (yield from self._reject(archive, last))

    def _after_error(
        self, archive: ArchiveBytes, start: int, last: _Record | None, error: str
    ) -> Generator[Page | Reject, None, int | None]:
        """Reject the record that cannot be read, or the one before it whose length was a lie."""
        if last is None:
            resume = archive.next_record(start + 1)
            begins_well = archive.next_record(start) == start
            reason = "truncated" if begins_well and resume is None else "damaged"
            yield self._damaged(start, reason, f"no readable record: {error}")
            return resume
        end = archive.record_end(last.offset, last.content_length)
        if end is None:
            return (yield from self._reject(archive, last))
        if last.outcome is not None:
            yield last.outcome
        resume = archive.next_record(end)
        if resume != end:
            reason = "truncated" if resume is None else "damaged"
            yield self._damaged(end, reason, f"nothing readable here: {error}")
        return resume

    def _after_end(self, archive: ArchiveBytes, last_offset: int) -> Iterator[Reject]:
        tail = archive.unreadable_tail(last_offset)
        if tail is not None and tail > last_offset:
            yield self._damaged(tail, "truncated", "the file is cut inside this record")

    def _reject(
        self, archive: ArchiveBytes, record: _Record
    ) -> Generator[Page | Reject, None, int | None]:
        resume = archive.next_record(record.offset + 1)
        readable_until = archive.member_end(record.offset) if archive.is_gzip else resume
        if readable_until is not None:
            reason, detail = "content-length", "the record is not as long as its Content-Length"
        elif resume is None:
            reason, detail = "truncated", "the file is cut inside this record"
        else:
            reason, detail = "damaged", "the record cannot be decompressed"
        where = f"{self.source.name}, byte {record.offset}: {detail}"
        yield Reject(record.id, record.url, self.source.name, record.offset, reason, where)
        if resume is None:
            yield from self._after_end(archive, record.offset)
        return resume

    def _damaged(self, offset: int, reason: str, detail: str) -> Reject:
        self.records["unreadable"] += 1
        where = f"{self.source.name}, byte {offset}: {detail}"
        return Reject(self._fallback_id(), "", self.source.name, offset, reason, where)

    def _fallback_id(self) -> str:
        return f"{self.source.basename}:{self.records.total()}"

    def _take(self, record: WarcRecord) -> _Record:
        """Read one record to its end."""
        kind = str(record.record_type)
        self.records[kind] += 1
        content_length = _content_length(record)
        id = (content_length >= 0 and _header(record, self.id_header)) or self._fallback_id()
        url = _header(record, "WARC-Target-URI").strip("<>")
        try:
            record.parse_http(quirks_mode=True)
            is_http_readable = True
        except OSError:
            is_http_readable = False
        expected = record.content_length
        try:
            body, length = _read_bounded(record, self.max_body)
        except OSError:
            body, length = b"", -1
        outcome: Page | Reject | None = None
        if kind in DOCUMENTS:
            http = record.http_headers
            page = Page(
                id=id,
                url=url,
                file=self.source.name,
                offset=record.stream_pos,
                status=None if http is None else http.status_code,
                content_type=_content_type(record, kind),
                charset=_charset(record, kind),
                body=body,
                date=_date(record),
            )
            outcome = self._judge(page, record, kind, length, is_http_readable)
        is_whole = content_length >= 0 and length == expected
        return _Record(id, url, record.stream_pos, content_length, is_whole, outcome)

    def _judge(
        self, page: Page, record: WarcRecord, kind: str, length: int, is_http_readable: bool
    ) -> Page | Reject:
        def reject(reason: str, detail: str) -> Reject:
            return Reject(page.id, page.url, page.file, page.offset, reason, detail)

        if kind == "revisit":
            return reject("revisit", "the body was stored by an earlier crawl")
        if kind == "response" and (page.status != 200 or not is_http_readable):
            return reject("status", f"HTTP status {page.status or 'unreadable'}")
        if page.content_type is not None and page.content_type not in TEXTUAL_TYPES:
            return reject("type", page.content_type)
        if length > self.max_body:
            return reject("oversized", f"{length} bytes; the limit is {self.max_body}")
        try:
            transfer_encoding = _http_header(record, "Transfer-Encoding")
            content_encoding = _http_header(record, "Content-Encoding")
            body = decode_body(page.body, transfer_encoding, content_encoding, self.max_body)
        except BodyError as error:
            return reject(error.reason, str(error))
        if not body.strip():
            return reject("empty", "the body is empty")
        return replace(page, body=body)


def read_document(file: str, offset: int, id_header: str) -> Page | Reject | None:
    """The document whose record begins at a byte of a file, both as the audit has them.

    None where a record of another kind begins, a `Reject` where none does.

    Raises:
        DataError: the file cannot be read.
    """
    source = source_named(file)
    with source.open(offset) as reader:
        documents = Archive(source, id_header=id_header).read_from(ArchiveBytes(reader), offset)
        first = next(documents, None)
    return first if first is not None and first.offset == offset else None


def _content_type(record: WarcRecord, kind: str) -> str | None:
    """In lower case: letter case does not matter (RFC 9110, section 8.3.1)."""
    if kind == "response":
        return (record.http_content_type or "").lower() or None
    return _header(record, "Content-Type").split(";")[0].strip().lower() or None


def _charset(record: WarcRecord, kind: str) -> str | None:
    """Without quotes, which may be around it (RFC 9110, section 5.6.6)."""
    if kind == "conversion":
        return "utf-8"
    return (record.http_charset or "").strip("\"' ") or None


def _content_length(record: WarcRecord) -> int:
    """As the record has it; -1 where that is no number of bytes."""
    declared = _header(record, "Content-Length")
    return int(declared) if declared.isdecimal() and len(declared) <= MOST_DIGITS else -1


def _date(record: WarcRecord) -> datetime | None:
    try:
        date = datetime.fromisoformat(_header(record, "WARC-Date"))
        return date.replace(tzinfo=UTC) if date.tzinfo is None else date.astimezone(UTC)
    except (ValueError, OverflowError):  # the latter of what is beyond the years 1 to 9999 in UTC
        return None


def _header(record: WarcRecord, name: str) -> str:
    return record.headers.get(name) or ""


def _http_header(record: WarcRecord, name: str) -> str:
    return "" if record.http_headers is None else record.http_headers.get(name) or ""


def _read_bounded(record: WarcRecord, limit: int) -> tuple[bytes, int]:
    """The first `limit` bytes of the body, and its length."""
    kept, length = [], 0
    while block := record.reader.read(READ_BYTES):
        if length < limit:
            kept.append(block[: limit - length])
        length += len(block)
    return b"".join(kept), length
