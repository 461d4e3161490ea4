"""What a user names is found: crawls by their lists of files, folders and patterns of a bucket."""

import gzip
from collections.abc import Iterator
from pathlib import Path

import pytest
import s3fs

from data_pipeline.crawl import Archive, find_archives, identify, remote
from data_pipeline.crawl.remote import Patience, RemoteFile, UnreachableError
from data_pipeline.errors import DataError
from tests.unit.data_pipeline.crawl_server import CrawlServer, Fault, serve
from tests.unit.data_pipeline.warc_records import record

CRAWL = "CC-MAIN-2024-10"
FOLDER = f"crawl-data/{CRAWL}"


def place(kind: str, number: int) -> str:
    return f"{FOLDER}/segments/1.0/{kind}/{CRAWL}-{number:05d}.{kind}.gz"


def listing(kind: str, files: int) -> bytes:
    return gzip.compress("".join(f"{place(kind, n)}\n" for n in range(files)).encode())


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    seconds: list[float] = []
    monkeypatch.setattr(remote, "sleep", seconds.append)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return seconds


@pytest.fixture
def server(waits: list[float]) -> Iterator[CrawlServer]:
    """Five WARC files and three WET files, of which the lists alone are there."""
    lists = {f"/{FOLDER}/{kind}.paths.gz": listing(kind, n) for kind, n in KINDS}
    with serve(lists) as server:
        yield server


KINDS = (("warc", 5), ("wet", 3))


@pytest.mark.parametrize(
    ("name", "kind", "numbers"),
    [
        (CRAWL, "warc", range(5)),
        (f"{CRAWL}/warc", "warc", range(5)),
        (f"{CRAWL}:0-1", "warc", range(2)),
        (f"{CRAWL}:3", "warc", range(3, 4)),
        (f"{CRAWL}/wet", "wet", range(3)),
        (f"{CRAWL}/wet:1-2", "wet", range(1, 3)),
    ],
)
@pytest.mark.parametrize("slash", ["", "/"])
def test_a_crawl_is_the_files_that_it_lists(
    server: CrawlServer, name: str, kind: str, numbers: range, slash: str
) -> None:
    server.limit = 40
    found = find_archives([name], server.url + slash)
    assert [file.name for file in found] == [f"{server.url}/{place(kind, n)}" for n in numbers]


def test_a_crawl_may_lie_in_a_folder(tmp_path: Path) -> None:
    for path, content in ((place("warc", 0), record(1)), (f"{FOLDER}/warc.paths.gz", b"")):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(content or listing("warc", 1))
    (source,) = find_archives([CRAWL], str(tmp_path))
    assert len(list(Archive(source))) == 1


def test_what_is_called_like_a_crawl_and_is_here_is_meant(
    server: CrawlServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(CRAWL).mkdir()
    (tmp_path / CRAWL / "a.warc.gz").write_bytes(record(1))
    (source,) = find_archives([CRAWL], server.url)
    assert source.name == str(tmp_path / CRAWL / "a.warc.gz")
    assert server.requests == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (f"{CRAWL}:0-5", f"{CRAWL} has 5 WARC files, 0 to 4"),
        (f"{CRAWL}:3-1", f"{CRAWL} has 5 WARC files, 0 to 4"),
        (f"{CRAWL}/wet:3", f"{CRAWL} has 3 WET files, 0 to 2"),
        ("CC-MAIN-2099-10", "/crawl-data/CC-MAIN-2099-10/warc.paths.gz: no such file"),
        ("CC-MAIN-2023-10", "warc.paths.gz is not a list of paths in gzip"),
        ("CC-MAIN-2024", "no such file (files of Common Crawl are CC-MAIN-YYYY-WW"),
        (f"{CRAWL}:1-", "no such file (files of Common Crawl are CC-MAIN-YYYY-WW"),
        ("ftp://host/a.warc.gz", "allowed: https://, http://, s3://"),
    ],
)
def test_a_crawl_that_is_not_there_is_refused_with_what_is(
    server: CrawlServer, name: str, message: str
) -> None:
    server.files["/crawl-data/CC-MAIN-2023-10/warc.paths.gz"] = b"<html>"
    with pytest.raises(DataError) as error:
        find_archives([name], server.url)
    assert str(error.value).startswith(f"{name}: ")
    assert message in str(error.value)
    assert error.value.exit_code == 2


def test_a_server_of_crawls_that_is_away_is_no_mistake_of_the_user(waits: list[float]) -> None:
    with serve({}) as server:
        url = server.url
    with pytest.raises(UnreachableError, match=f"{CRAWL}: .*Connection refused"):
        find_archives([CRAWL], url)


def test_each_source_gets_its_own_version(server: CrawlServer, tmp_path: Path) -> None:
    contents = {f"/{n}.warc.gz": record(n) * n for n in range(1, 30)}
    server.files |= contents
    here = tmp_path / "here.warc.gz"
    here.write_bytes(record(0))
    sources = find_archives([*(server.url + path for path in contents), str(here)])
    done: list[int] = []
    identified = identify(sources, lambda count, total: done.append(count))
    assert [source.name for source in identified] == [source.name for source in sources]
    assert [source.identity.get("bytes") for source in identified] == [
        *(len(content) for content in contents.values()),
        None,
    ]
    assert done == list(range(31))
    with pytest.raises(DataError, match=r"missing\.warc: no such file"):
        identify([RemoteFile(f"{server.url}/missing.warc"), *sources], lambda count, total: None)


@pytest.fixture(scope="module")
def archives(bucket: str) -> str:
    """A folder of a bucket that holds archives and something else."""
    store = s3fs.S3FileSystem()
    for name in ("b.warc.gz", "a.warc.gz", "c.wet", "notes.txt"):
        store.pipe_file(f"{bucket}/in/{name}", b"".join(record(n) for n in range(5)))
    return f"{bucket}/in"


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("a.warc.gz", ["a.warc.gz"]),
        ("", ["a.warc.gz", "b.warc.gz", "c.wet"]),
        ("*.gz", ["a.warc.gz", "b.warc.gz"]),
        ("[ab].warc.*", ["a.warc.gz", "b.warc.gz"]),
    ],
)
def test_a_bucket_has_files_folders_and_patterns(
    archives: str, name: str, found: list[str]
) -> None:
    sources = find_archives([f"{archives}/{name}"])
    assert [source.name for source in sources] == [f"{archives}/{name}" for name in found]
    # A listing says of an object what a question about it says.
    asked = [RemoteFile(source.name).identified().identity for source in sources]
    assert [source.identity for source in identify(sources, lambda done, all: None)] == asked


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.warc.gz", "no such object or bucket"),
        ("none/", "no web archive in this folder"),
        ("*.zip", "no file matches this pattern"),
        ("../in", "a folder; end its name with /"),
        ("../../nowhere/a.warc", "no such object or bucket"),
    ],
)
def test_what_is_not_in_a_bucket_is_refused_by_name(archives: str, name: str, message: str) -> None:
    parts = f"{archives}/{name}".removeprefix("s3://").split("/")
    while ".." in parts:
        up = parts.index("..")
        del parts[up - 1 : up + 1]
    url = "s3://" + "/".join(parts)
    with pytest.raises(DataError) as error:
        list(Archive(find_archives([url])[0]))
    assert str(error.value).startswith(f"{url}: ")
    assert message in str(error.value)


def test_an_object_that_is_overwritten_is_refused(bucket: str) -> None:
    url, store = f"{bucket}/changing/a.warc.gz", s3fs.S3FileSystem()
    store.pipe_file(url, record(1))
    (source,) = identify(find_archives([url]), lambda done, all: None)
    store.pipe_file(url, record(9))
    with pytest.raises(DataError, match=r"a\.warc\.gz, byte 0: the file has changed"):
        list(Archive(source))


def test_objects_are_read_over_broken_connections(
    waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    content = b"".join(record(n) for n in range(40))
    with serve({"/bucket/a.warc.gz": content}) as server:
        # One that exists knows another server.
        s3fs.S3FileSystem.clear_instance_cache()
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(key, "key")
        url = "s3://bucket/a.warc.gz"
        source = RemoteFile(url, patience=Patience(silence=20.0))
        broken = [Fault(after=n) for n in (0, 100, 5000)]
        slow_down = [Fault(status=503), Fault(status=500)]
        for faults in (broken, slow_down, [Fault(), *broken, *slow_down]):
            server.faults.extend(faults)
            archive = Archive(source)
            assert len(list(archive)) == 40
            assert archive.bytes == len(content)
            assert not server.faults
        server.faults.extend([Fault(ending="stalled")] * 2)
        assert len(list(Archive(RemoteFile(url, patience=Patience(silence=1.0))))) == 40
    s3fs.S3FileSystem.clear_instance_cache()
