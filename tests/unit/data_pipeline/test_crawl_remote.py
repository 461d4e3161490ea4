"""An archive behind a failing server gives what the same archive gives on this machine."""

import datetime
import gzip
import ipaddress
import random
import ssl
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from data_pipeline.crawl import Archive, Page, Reject, Source, read_document, reader, remote
from data_pipeline.crawl.local import LocalFile
from data_pipeline.crawl.remote import Patience, RemoteFile, UnreachableError
from data_pipeline.errors import DataError
from tests.unit.data_pipeline.crawl_server import CrawlServer, Fault, serve
from tests.unit.data_pipeline.warc_records import lying, record

PATH = "/crawl.warc.gz"
# Longer than a busy machine keeps a healthy server silent.
SILENCE = 20.0
Document = Page | Reject


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that were to be waited, and are not."""
    seconds: list[float] = []
    monkeypatch.setattr(remote, "sleep", seconds.append)
    return seconds


@pytest.fixture(autouse=True)
def _direct(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture(scope="module")
def content() -> bytes:
    """An archive of some hundred kilobytes."""
    draw = random.Random(1)
    return b"".join(record(number, draw.randbytes(3000)) for number in range(60))


@pytest.fixture
def server(content: bytes, waits: list[float]) -> Iterator[CrawlServer]:
    with serve({PATH: content}) as server:
        yield server


def remote_file(server: CrawlServer, silence: float = SILENCE) -> RemoteFile:
    return RemoteFile(server.url + PATH, patience=Patience(silence=silence))


def read(source: Source) -> tuple[list[Document], int, str]:
    """The documents under a name that all sources share, and the size and hash of the file."""
    archive = Archive(source)

    def renamed(document: Document) -> Document:
        if isinstance(document, Page):
            return replace(document, file="")
        detail = document.detail.replace(source.name, "")
        return replace(document, file="", detail=detail)

    documents = [renamed(document) for document in archive]
    return documents, archive.bytes, archive.sha256


def read_local(tmp_path: Path, content: bytes) -> tuple[list[Document], int, str]:
    path = tmp_path / "crawl.warc.gz"
    path.write_bytes(content)
    return read(LocalFile(path))


def random_faults(draw: random.Random, size: int) -> list[Fault]:
    """Some failures of each kind; none stays longer than a client's patience."""
    faults = []
    for _ in range(draw.randrange(1, 7)):
        kind = draw.choice(["closed", "reset", "status"])
        if kind == "status":
            status = draw.choice([408, 429, 500, 502, 503, 504])
            faults.append(Fault(status=status, headers=(("Retry-After", "1"),)))
        else:
            faults.append(Fault(after=draw.choice([0, 1, draw.randrange(size)]), ending=kind))
    return faults


@pytest.mark.parametrize("has_ranges", [True, False])
@pytest.mark.parametrize("seed", range(8))
def test_broken_connections_leave_no_trace(
    server: CrawlServer, content: bytes, tmp_path: Path, seed: int, has_ranges: bool
) -> None:
    expected = read_local(tmp_path, content)
    server.has_ranges = has_ranges
    server.faults.extend(random_faults(random.Random(seed), len(content)))
    assert read(remote_file(server)) == expected
    assert not server.faults


def test_reading_resumes_at_the_byte_where_the_connection_broke(
    server: CrawlServer, content: bytes, tmp_path: Path, waits: list[float]
) -> None:
    server.limit = 20_000
    assert read(remote_file(server)) == read_local(tmp_path, content)
    starts = [f"bytes={start}-" for start in range(0, len(content), server.limit)]
    assert server.requests == [(PATH, wanted) for wanted in ["bytes=0-0", *starts]]
    # Progress keeps the patience whole: each wait is a first one.
    assert all(0.5 <= wait <= 1 for wait in waits)


def test_an_undisturbed_archive_is_sent_once(
    server: CrawlServer, content: bytes, tmp_path: Path, waits: list[float]
) -> None:
    assert read(remote_file(server)) == read_local(tmp_path, content)
    assert [wanted for _, wanted in server.requests] == ["bytes=0-0", "bytes=0-"]
    assert waits == []


def damaged(kind: str) -> bytes:
    records = [record(number) for number in range(6)]
    if kind == "flipped":
        records[2] = records[2][:100] + bytes(byte ^ 0xFF for byte in records[2][100:])
    elif kind == "cut":
        records[-1] = records[-1][:-30]
    elif kind == "lying":
        records[1] = lying(1, 200)
        records[4] = lying(4, -5)
    elif kind == "junk":
        records.insert(3, random.Random(0).randbytes(50_000))
    elif kind == "plain":
        records = [record(n, compressed=False) for n in range(6)]
        records[2] = lying(2, 100_000, compressed=False)
    else:
        assert kind == "one member"
        return gzip.compress(b"".join(record(n, compressed=False) for n in range(6)))
    return b"".join(records)


@pytest.mark.parametrize("kept", [64, 4 << 20])
@pytest.mark.parametrize("kind", ["flipped", "cut", "lying", "junk", "plain", "one member"])
def test_damage_costs_no_more_than_on_this_machine(
    server: CrawlServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, kept: int
) -> None:
    """Also where what recovery looks back at is no more in memory, and connections break."""
    content = damaged(kind)
    expected = read_local(tmp_path, content)
    monkeypatch.setattr(reader, "KEPT_BYTES", kept)
    server.files[PATH] = content
    assert read(remote_file(server)) == expected
    assert read_local(tmp_path, content) == expected
    server.limit = 700
    assert read(remote_file(server)) == expected


@pytest.mark.parametrize("kind", ["flipped", "lying", "plain"])
def test_a_document_is_read_again_from_its_place(
    server: CrawlServer, tmp_path: Path, kind: str
) -> None:
    content = damaged(kind)
    expected, _, _ = read_local(tmp_path, content)
    server.files[PATH] = content
    places = [str(tmp_path / "crawl.warc.gz"), server.url + PATH]
    for document in expected:
        for place in places:
            again = read_document(place, document.offset, "WARC-Record-ID")
            assert again is not None
            # An unreadable record is named after the records that precede it: here there are none.
            assert (again.offset, again.url) == (document.offset, document.url)
            assert isinstance(again, Page) == isinstance(document, Page)
        assert (PATH, f"bytes={document.offset}-") in server.requests
    with pytest.raises(DataError, match=r"gone\.warc: No such file"):
        read_document(str(tmp_path / "gone.warc"), 0, "WARC-Record-ID")


def test_where_no_document_begins_none_is_read(tmp_path: Path) -> None:
    path = tmp_path / "crawl.warc.gz"
    path.write_bytes(record(1, kind="metadata") + record(2))
    assert read_document(str(path), 0, "WARC-Record-ID") is None
    assert isinstance(read_document(str(path), 1, "WARC-Record-ID"), Reject)


def test_an_empty_file_has_no_documents(server: CrawlServer) -> None:
    server.files[PATH] = b""
    assert read(remote_file(server))[:2] == ([], 0)


def test_a_silent_connection_counts_as_broken(
    server: CrawlServer, content: bytes, tmp_path: Path
) -> None:
    server.faults.extend([Fault(), Fault(after=50_000, ending="stalled"), Fault(ending="stalled")])
    assert read(remote_file(server, silence=0.5)) == read_local(tmp_path, content)


@pytest.mark.parametrize("honours_conditions", [True, False])
@pytest.mark.parametrize("stamps", [("ETag",), ("Last-Modified",), ("Weak", "Last-Modified")])
def test_a_file_that_changes_is_refused_and_never_mixed(
    server: CrawlServer, content: bytes, stamps: tuple[str, ...], honours_conditions: bool
) -> None:
    server.stamps, server.honours_conditions = stamps, honours_conditions
    other = bytes(reversed(content))
    server.faults.extend([Fault(after=1 << 20), Fault(after=9_000), Fault(replacement=other)])
    with pytest.raises(DataError, match=r"crawl\.warc\.gz, byte 9000: the file has changed"):
        read(remote_file(server))
    assert len(server.requests) == 3


@pytest.mark.parametrize("size", [1, 300_000])
def test_a_file_of_another_length_has_changed(
    server: CrawlServer, content: bytes, size: int
) -> None:
    server.honours_conditions = False
    known = remote_file(server).identified()
    server.replace(PATH, (content * 2)[:size])
    server.limit = 10
    with pytest.raises(DataError, match=f"it was {len(content)} bytes.* {size} bytes"):
        read(known)


def test_a_server_that_sends_no_parts_and_never_the_whole_is_given_up(
    server: CrawlServer, caplog: pytest.LogCaptureFixture
) -> None:
    server.has_ranges, server.limit = False, 9_000
    with pytest.raises(UnreachableError, match=r"crawl\.warc\.gz, byte 9000: .*attempt 8 of 8"):
        read(remote_file(server))
    assert "from the first byte: the server sends no parts of files" in caplog.text


def test_a_server_that_is_away_is_asked_less_and_less_often(waits: list[float]) -> None:
    with serve({}) as server:
        url = server.url
    with pytest.raises(UnreachableError, match=r"/x\.warc: Connection refused \(attempt 8 of 8\)"):
        read(RemoteFile(f"{url}/x.warc"))
    assert len(waits) == 7
    assert all(longest / 2 <= wait <= longest for wait, longest in zip(waits, LONGEST, strict=True))


LONGEST = (1, 2, 4, 8, 16, 32, 60)


def test_a_server_that_throttles_is_left_alone_as_long_as_it_asks(
    server: CrawlServer, content: bytes, tmp_path: Path, waits: list[float]
) -> None:
    """Common Crawl answers 403 or 503 to those that ask too often."""
    ask = {
        "7": 7.0,
        "Wed, 21 Oct 2015 07:28:00 GMT": 0.0,
        "86400": remote.LONGEST_RETRY_AFTER,
        "soon": 0.0,
    }
    for value in ask:
        server.faults.append(Fault(status=503, headers=(("Retry-After", value),)))
    server.faults.append(Fault(after=1 << 20))
    server.faults.append(Fault(status=403))
    assert read(remote_file(server)) == read_local(tmp_path, content)
    expected = [max(own, asked) for own, asked in zip(LONGEST, ask.values(), strict=False)]
    for wait, longest in zip(waits, [*expected, 1], strict=True):
        assert longest / 2 <= wait <= longest
    assert waits[0] == 7.0


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (404, "no such file (HTTP status 404"),
        (410, "no such file (HTTP status 410"),
        (401, "HTTP status 401"),
        (403, "HTTP status 403 Forbidden: it is not there, not yours to read, or you have asked"),
        (418, "HTTP status 418"),
    ],
)
def test_what_waiting_does_not_mend_is_told_at_once(
    server: CrawlServer, waits: list[float], status: int, message: str
) -> None:
    server.faults.append(Fault(status=status))
    with pytest.raises(DataError) as error:
        read(remote_file(server))
    assert f"{server.url}{PATH}: {message}" in str(error.value)
    assert not isinstance(error.value, UnreachableError)
    assert waits == []


def test_a_file_that_goes_away_is_named_with_the_byte(server: CrawlServer) -> None:
    server.faults.extend([Fault(after=1 << 20), Fault(after=9_000), Fault(status=404)])
    with pytest.raises(DataError, match=r"crawl\.warc\.gz, byte 9000: no such file"):
        read(remote_file(server))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stamps": ()}, "neither a strong ETag nor Last-Modified"),
        ({"stamps": ("Weak",)}, "neither a strong ETag nor Last-Modified"),
        ({"has_length": False, "has_ranges": False}, "does not say how long the file is"),
    ],
)
def test_a_file_that_cannot_be_told_from_another_is_refused(
    server: CrawlServer, settings: dict[str, object], message: str
) -> None:
    for name, value in settings.items():
        setattr(server, name, value)
    with pytest.raises(DataError, match=rf"crawl\.warc\.gz: .*{message}.*download it"):
        read(remote_file(server))


def test_redirects_are_followed(server: CrawlServer, content: bytes, tmp_path: Path) -> None:
    server.redirects["/latest"] = PATH
    server.limit = 50_000
    assert read(RemoteFile(f"{server.url}/latest"))[1:] == read_local(tmp_path, content)[1:]
    server.redirects["/circle"] = "/circle"
    with pytest.raises(DataError, match=r"/circle: .*redirects"):
        read(RemoteFile(f"{server.url}/circle"))


def test_secrets_of_a_url_are_used_and_not_told(
    server: CrawlServer, waits: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    host = server.url.removeprefix("http://")
    url = f"http://me:hush@{host}{PATH}?part=1&X-Amz-Signature=hush&X-Amz-Expires=60"
    server.faults.append(Fault(status=503))
    source = RemoteFile(url)
    documents, _, _ = read(source)
    assert source.name == f"{server.url}{PATH}?part=1"
    assert {document.file for document in Archive(source)} == {source.name}
    assert all(value.startswith("Basic ") for value in server.authorizations)
    known = source.identified()
    server.faults.extend([Fault()] * 8)
    with pytest.raises(UnreachableError) as error:
        read(known)
    assert documents
    assert "hush" not in str(error.value) + caplog.text


def test_a_certificate_that_nobody_vouches_for_is_refused(
    tmp_path: Path, waits: list[float], content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate = self_signed(tmp_path / "server.pem")
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate)
    with serve({PATH: content}, tls) as server:
        with pytest.raises(DataError, match=r"(?i)certificate verify failed") as error:
            read(remote_file(server))
        assert not isinstance(error.value, UnreachableError)
        assert waits == []
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
        server.limit = 50_000
        assert read(remote_file(server)) == read_local(tmp_path, content)


def test_a_server_without_tls_is_no_https_server(server: CrawlServer) -> None:
    with pytest.raises(UnreachableError, match=r"https://.*crawl\.warc\.gz: .*attempt 8 of 8"):
        read(RemoteFile(server.url.replace("http:", "https:") + PATH))


def self_signed(path: Path) -> Path:
    """A key and a certificate for this machine that no authority has signed."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False
        )
        .sign(key, hashes.SHA256())
    )
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        + certificate.public_bytes(serialization.Encoding.PEM)
    )
    return path
