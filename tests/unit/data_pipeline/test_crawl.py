"""Archives written by warcio are read whole; damage costs the damaged record and no other."""

import gzip
import random
import zlib
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

import brotli
import pytest

from data_pipeline.crawl import Archive, Page, Reject, find_archives
from data_pipeline.crawl.local import LocalFile
from data_pipeline.errors import DataError
from tests.unit.data_pipeline.warc_records import HTML, lying, record


def read(tmp_path: Path, content: bytes, **options: object) -> list[Page | Reject]:
    path = tmp_path / "crawl.warc.gz"
    path.write_bytes(content)
    return list(Archive(LocalFile(path), **options))  # type: ignore[arg-type]


def outcomes(documents: Iterable[Page | Reject]) -> list[tuple[str, str]]:
    return [
        (document.id, "page" if isinstance(document, Page) else document.reason)
        for document in documents
    ]


def ids(*numbers: int) -> list[tuple[str, str]]:
    return [(f"<urn:uuid:{number}>", "page") for number in numbers]


@pytest.mark.parametrize("compressed", [True, False])
def test_pages_carry_what_the_archive_says(tmp_path: Path, compressed: bool) -> None:
    first, second = (record(number, compressed=compressed) for number in (1, 2))
    pages = read(tmp_path, first + second, id_header="X-Doc-Id")
    assert pages[1] == Page(
        id="doc-2",
        url="http://example.org/2",
        file=str(tmp_path / "crawl.warc.gz"),
        offset=len(first),
        status=200,
        content_type="text/html",
        charset=None,
        body=HTML,
        date=datetime(2026, 1, 1, tzinfo=UTC),
    )


def test_records_that_are_no_documents_are_counted_but_not_given(tmp_path: Path) -> None:
    path = tmp_path / "crawl.warc.gz"
    kinds = ["warcinfo", "response", "metadata", "conversion"]
    path.write_bytes(b"".join(record(n, b"text", kind=kind) for n, kind in enumerate(kinds)))
    archive = Archive(LocalFile(path))
    assert outcomes(archive) == ids(1, 3)
    assert archive.records == dict.fromkeys(kinds, 1)


def test_wet_records_are_plain_text_in_utf8(tmp_path: Path) -> None:
    (page,) = read(tmp_path, record(1, "Übung".encode(), kind="conversion"))
    assert isinstance(page, Page)
    assert (page.content_type, page.charset, page.body.decode()) == ("text/plain", "utf-8", "Übung")


@pytest.mark.parametrize(
    ("declared", "expected"),
    [
        ("text/HTML; charset=utf-8", ("text/html", "utf-8")),
        ("Text/Plain;Charset=UTF-8", ("text/plain", "utf-8")),
        ('text/html; charset="iso-8859-15"', ("text/html", "iso-8859-15")),
        ("text/html; charset='koi8-r' ", ("text/html", "koi8-r")),
        ('text/html; charset=""', ("text/html", None)),
    ],
)
def test_types_are_of_any_case_and_charsets_may_be_quoted(
    tmp_path: Path, declared: str, expected: tuple[str, str | None]
) -> None:
    """RFC 9110, section 8.3.1; single quotes, which it does not have, are out there."""
    (page,) = read(tmp_path, record(1, http=[("Content-Type", declared)]))
    assert isinstance(page, Page)
    assert (page.content_type, page.charset) == expected


@pytest.mark.parametrize(
    ("reason", "settings"),
    [
        ("revisit", {"kind": "revisit", "body": b""}),
        ("status", {"status": "404 Not Found"}),
        ("status", {"status": "301 Moved Permanently"}),
        ("type", {"http": [("Content-Type", "application/pdf")]}),
        ("empty", {"body": b" \r\n"}),
        ("oversized", {"body": b"a" * 5000}),
        ("oversized", {"body": gzip.compress(b"a" * 5000)}),
        ("oversized", {"body": gzip.compress(b"a" * 2001) * 2}),
        ("encoding", {"body": gzip.compress(HTML)[:-20]}),
    ],
)
def test_each_document_that_is_no_page_says_why(
    tmp_path: Path, reason: str, settings: dict[str, object]
) -> None:
    content = record(1, **settings) + record(2)  # type: ignore[arg-type]
    assert outcomes(read(tmp_path, content, max_body=4000)) == [("<urn:uuid:1>", reason), *ids(2)]


def chunked(body: bytes) -> bytes:
    pieces = [body[start : start + 7] for start in range(0, len(body), 7)]
    return b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        ([("Transfer-Encoding", "chunked")], chunked(HTML)),
        ([("Transfer-Encoding", "chunked")], HTML),
        ([], chunked(HTML)),
        ([("Content-Encoding", "gzip")], gzip.compress(HTML)),
        ([("Content-Encoding", "gzip")], gzip.compress(HTML[:20]) + gzip.compress(HTML[20:])),
        ([("Content-Encoding", "gzip")], gzip.compress(HTML) + b"\r\n"),
        ([("Content-Encoding", "gzip")], HTML),
        ([("Transfer-Encoding", "chunked")], chunked(gzip.compress(HTML))),
        ([("Content-Encoding", "deflate")], zlib.compress(HTML)),
        ([("Content-Encoding", "deflate")], zlib.compress(HTML)[2:-4]),
        ([("Content-Encoding", "br")], HTML),
    ],
)
def test_bodies_are_decoded_where_their_bytes_are_encoded(
    tmp_path: Path, headers: list[tuple[str, str]], body: bytes
) -> None:
    (page,) = read(tmp_path, record(1, body, http=[("Content-Type", "text/html"), *headers]))
    assert isinstance(page, Page)
    assert page.body == HTML


def test_a_brotli_body_that_is_cut_is_no_page(tmp_path: Path) -> None:
    http = [("Content-Type", "text/html"), ("Content-Encoding", "br")]
    text = b"".join(b"<p>Word %d of a page.</p>" % number for number in range(200))
    whole = brotli.compress(text)
    for length in range(20, len(whole), 7):
        content = record(1, whole[:length], http=http) + record(2, whole, http=http)
        cut, page = read(tmp_path, content)
        assert isinstance(cut, Reject), f"cut after {length} bytes"
        assert (cut.reason, page.body) == ("encoding", text)
        assert "the compressed stream is cut" in cut.detail


def test_a_text_that_could_be_the_beginning_of_brotli_is_a_page(tmp_path: Path) -> None:
    http = [("Content-Type", "text/plain"), ("Content-Encoding", "br")]
    text = b"Lorem ipsum dolor sit amet, consectetur adipiscing elit."
    (page,) = read(tmp_path, record(1, text, http=http))
    assert isinstance(page, Page)
    assert page.body == text


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("by", [-30, 5, 200, 100_000])
def test_a_lying_content_length_costs_one_record(tmp_path: Path, by: int, compressed: bool) -> None:
    first, *others = (record(number, compressed=compressed) for number in (1, 3, 4))
    lie = lying(2, by, compressed=compressed)
    documents = read(tmp_path, first + lie + b"".join(others))
    assert outcomes(documents) == [*ids(1), ("<urn:uuid:2>", "content-length"), *ids(3, 4)]
    reject = documents[1]
    assert isinstance(reject, Reject)
    assert f"crawl.warc.gz, byte {len(first)}:" in reject.detail


@pytest.mark.parametrize("date", ["0001-01-01T00:00:00+01:00", "9999-12-31T23:59:59-01:00"])
def test_a_date_that_is_none_in_utc_is_no_date(tmp_path: Path, date: str) -> None:
    first, second = (record(number, compressed=False) for number in (1, 2))
    pages = read(tmp_path, first.replace(b"2026-01-01T00:00:00Z", date.encode()) + second)
    assert outcomes(pages) == ids(1, 2)
    assert [page.date is None for page in pages if isinstance(page, Page)] == [True, False]


def test_a_content_length_beyond_all_numbers_costs_one_record(tmp_path: Path) -> None:
    first, second = (record(number, compressed=False) for number in (1, 2))
    length = b"Content-Length: "
    start = first.rindex(length, 0, first.index(b"\r\n\r\n")) + len(length)
    documents = read(tmp_path, first[:start] + b"9" * 5000 + first[start:] + second)
    assert [reason for _, reason in outcomes(documents)] == ["content-length", "page"]
    assert outcomes(documents)[1:] == ids(2)


def test_a_cut_anywhere_keeps_what_precedes_it_and_is_told(tmp_path: Path) -> None:
    whole, last = record(1) + record(2), record(3)
    for length in range(1, len(last) - 8, 7):
        documents = read(tmp_path, whole + last[:length])
        assert outcomes(documents[:2]) == ids(1, 2)
        assert [(d.offset, d.reason) for d in documents[2:] if isinstance(d, Reject)] == [
            (len(whole), "truncated")
        ], f"cut after {length} bytes"


def test_flipped_bits_cost_one_record(tmp_path: Path) -> None:
    first, second, third = (record(number) for number in (1, 2, 3))
    for position in range(0, len(second) - 8, 11):
        damaged = bytearray(second)
        damaged[position] ^= 0xFF
        documents = read(tmp_path, first + bytes(damaged) + third)
        assert outcomes(documents)[0] == ids(1)[0]
        assert outcomes(documents)[-1] == ids(3)[0]
        assert len(documents) == 3, f"byte {position} flipped"


@pytest.mark.parametrize("seed", range(60))
def test_mutated_archives_are_read_to_their_end(tmp_path: Path, seed: int) -> None:
    """Bytes changed, lost and inserted in headers and bodies, in each of three layouts."""
    draw = random.Random(seed)
    records = []
    for number in range(6):
        content = bytearray(record(number, compressed=False))
        for _ in range(draw.choice((0, 0, 1, 5))):
            place = draw.randrange(len(content))
            lost = draw.choice((0, 1, 20))
            content[place : place + lost] = draw.randbytes(draw.choice((0, 1, 20)))
        records.append(bytes(content))
    whole = b"".join(records)
    members = b"".join(gzip.compress(content, mtime=0) for content in records)
    for archive in (whole, gzip.compress(whole, mtime=0), members):
        documents = read(tmp_path, archive)
        assert len({document.id for document in documents}) == len(documents)


def test_an_archive_in_one_gzip_member_is_read(tmp_path: Path) -> None:
    plain = b"".join(record(number, compressed=False) for number in (1, 2, 3))
    assert outcomes(read(tmp_path, gzip.compress(plain))) == ids(1, 2, 3)


def test_an_empty_archive_has_no_documents(tmp_path: Path) -> None:
    assert read(tmp_path, b"") == []


def test_a_file_that_is_no_archive_is_one_unreadable_record(tmp_path: Path) -> None:
    (reject,) = read(tmp_path, gzip.compress(b"hello, world\n" * 10))
    assert isinstance(reject, Reject)
    assert reject.reason == "damaged"


def test_a_document_without_the_id_header_is_named_after_its_place(tmp_path: Path) -> None:
    content = record(1) + record(2)
    documents = read(tmp_path, content, id_header="X-Missing")
    assert [document.id for document in documents] == ["crawl.warc.gz:1", "crawl.warc.gz:2"]
    assert documents == read(tmp_path, content, id_header="X-Missing")


def test_inputs_are_files_folders_and_patterns_each_taken_once(tmp_path: Path) -> None:
    for name in ("b.warc.gz", "a.warc.gz", "c.warc", "d.wet.gz", "notes.txt"):
        (tmp_path / name).touch()
    found = find_archives([str(tmp_path / "b*.gz"), str(tmp_path)])
    assert [source.basename for source in found] == ["b.warc.gz", "a.warc.gz", "c.warc", "d.wet.gz"]


@pytest.mark.parametrize("name", ["missing.warc.gz", "*.warc.gz", "."])
def test_an_input_that_names_no_archive_is_refused_by_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError) as error:
        find_archives([f"{tmp_path}/{name}"])
    assert f"{tmp_path}/{name}" in str(error.value)
