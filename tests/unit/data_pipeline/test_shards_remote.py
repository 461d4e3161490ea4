"""Shards behind a failing server are those on this machine, or an error that names them."""

import json
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import s3fs

from data_pipeline.crawl import remote
from data_pipeline.crawl.remote import UnreachableError
from data_pipeline.errors import DataError
from data_pipeline.shards import Cache, TokenReader, growth, load_manifest, write_shards
from data_pipeline.stream import Source, TokenStream
from data_pipeline.tokenize import train_tokenizer
from tests.unit.data_pipeline.crawl_server import CrawlServer, Fault, serve

SHARD = "/data/shards/shard-00002.tar"


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("local")
    draw = random.Random(1)
    texts = ["".join(draw.choices("abcdef ", k=draw.randrange(400))) for _ in range(200)]
    train_tokenizer(texts, 300, folder / "bpe.json")
    documents = [(str(number), text) for number, text in enumerate(texts)]
    write_shards(documents, folder / "bpe.json", folder / "data", tokens_per_shard=1500, extra={})
    return folder / "data"


@pytest.fixture
def server(local: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[CrawlServer]:
    monkeypatch.setattr(remote, "sleep", lambda seconds: None)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    files = {
        f"/data/{path.relative_to(local)}": path.read_bytes()
        for path in local.rglob("*")
        if path.is_file()
    }
    with serve(files) as server:
        yield server


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache", 1 << 20)


class OneInTen:
    """Faults of a tenth of all requests, of each kind, for ever."""

    def __init__(self, seed: int) -> None:
        self._draw = random.Random(seed)
        self.count = 0

    def __bool__(self) -> bool:
        return self._draw.random() < 0.1

    def popleft(self) -> Fault:
        self.count += 1
        if self._draw.random() < 0.5:
            return Fault(status=self._draw.choice([408, 429, 500, 502, 503, 504]))
        ending = self._draw.choice(["closed", "reset"])
        return Fault(after=self._draw.randrange(3000), ending=ending)


def batches(path: str, cache: Cache) -> list[np.ndarray]:
    stream = TokenStream([Source(path)], 64, seed=3, shuffle_shards=4, cache=cache)
    read = [stream.read(stream.next_batch(4), range(4)) for _ in range(2 * 20_000 // 256)]
    return [array for batch in read for array in (batch.tokens, batch.labels, batch.position)]


@pytest.mark.parametrize("seed", range(3))
def test_a_stream_from_a_store_that_fails_one_request_in_ten_is_the_local_one(
    server: CrawlServer, local: Path, tmp_path: Path, seed: int
) -> None:
    expected = batches(str(local), Cache(tmp_path / "unused", 1))
    server.faults = OneInTen(seed)  # type: ignore[assignment]
    small = Cache(tmp_path / "cache", 60_000)
    found = batches(f"{server.url}/data", small)
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
    assert server.faults.count > 0  # type: ignore[attr-defined]
    assert sum(path.stat().st_size for path in small.folder.iterdir()) <= small.max_bytes
    assert not (tmp_path / "unused").exists()


def test_each_retry_is_told_in_a_line(
    server: CrawlServer, cache: Cache, caplog: pytest.LogCaptureFixture
) -> None:
    reader = TokenReader(load_manifest(f"{server.url}/data", cache=cache))
    server.faults.extend([Fault(status=503), Fault(after=1 << 20), Fault(after=10)])
    caplog.clear()
    reader.tokens(2)
    first, second = caplog.messages
    assert f"{server.url}{SHARD}: HTTP status 503" in first
    assert "trying again in" in first
    assert f"{server.url}{SHARD}, byte " in second


def test_who_waits_for_a_slow_store_shows_that_it_lives(
    server: CrawlServer, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = TokenReader(load_manifest(f"{server.url}/data", cache=cache))
    monkeypatch.setattr(growth, "POLL_S", 0.01)
    server.lock.acquire()
    beats: list[bool] = []

    def beat() -> None:
        beats.append(server.lock.locked())
        if beats[-1]:
            server.lock.release()

    reader.tokens(2, beat)
    assert beats[0]


def test_what_is_in_the_cache_is_not_fetched_again(server: CrawlServer, cache: Cache) -> None:
    def read() -> None:
        reader = TokenReader(load_manifest(f"{server.url}/data", cache=cache))
        for shard in range(len(reader.shard_documents)):
            reader.tokens(shard)

    read()
    before = len(server.requests)
    read()
    again = {path for path, _ in server.requests[before:]}
    assert again == {"/data/manifest.json", "/data/tokenizer.json"}


def test_the_tokenizer_stays_while_its_manifest_is_in_use(
    server: CrawlServer, tmp_path: Path
) -> None:
    small = Cache(tmp_path / "cache", 30_000)
    manifest = load_manifest(f"{server.url}/data", cache=small)
    tokenizer, reader = manifest.tokenizer, TokenReader(manifest)
    for shard in range(len(reader.shard_documents)):
        reader.tokens(shard)
    assert tokenizer.read_bytes() == server.files["/data/tokenizer.json"]


def test_prefetched_shards_are_there_when_they_are_needed(
    server: CrawlServer, cache: Cache
) -> None:
    reader = TokenReader(load_manifest(f"{server.url}/data", cache=cache))
    reader.prefetch([2, 0])
    # Waits for the download that has begun, or begins it.
    reader.tokens(2)
    reader.tokens(0)
    downloads = [path for path, asked in server.requests if asked == "bytes=0-"]
    assert downloads.count(SHARD) == 1


def test_a_cache_smaller_than_what_is_shuffled_together_is_told_once(
    server: CrawlServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    small = Cache(tmp_path / "cache", 50_000)
    reader = TokenReader(load_manifest(f"{server.url}/data", cache=small))
    shards = range(len(reader.shard_documents))
    reader.prefetch(shards)
    reader.prefetch(shards)
    (message,) = [text for text in caplog.messages if "raise data.cache_gb" in text]
    assert f"{server.url}/data: the {len(shards)} shards needed next" in message
    # What was fetched ahead may be gone again, and is not lost.
    assert all(len(reader.tokens(shard)) for shard in shards)


def test_a_bucket_gives_the_same(local: Path, bucket: str, cache: Cache, tmp_path: Path) -> None:
    s3fs.S3FileSystem().put(str(local), f"{bucket}/shards-of-a-test", recursive=True)
    found = batches(f"{bucket}/shards-of-a-test", cache)
    expected = batches(str(local), cache)
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
    with pytest.raises(DataError, match=rf"{bucket}/none/manifest\.json: no such file"):
        load_manifest(f"{bucket}/none", cache=cache)


def test_a_shard_that_vanished_or_changed_is_named(server: CrawlServer, cache: Cache) -> None:
    reader = TokenReader(load_manifest(f"{server.url}/data", cache=cache))
    content = server.files[SHARD]
    server.files[SHARD] = content[:-512]
    with pytest.raises(DataError, match=rf"{SHARD}: cut or replaced: it has \d+ bytes"):
        reader.tokens(2)
    server.files[SHARD] = bytes(reversed(content))
    with pytest.raises(DataError, match=rf"{SHARD}: damaged, or changed since the manifest"):
        reader.tokens(2)
    del server.files[SHARD]
    with pytest.raises(DataError, match=rf"{SHARD}: no such file \(HTTP status 404"):
        reader.tokens(2)
    server.files[SHARD] = content
    assert len(reader.tokens(2))


def test_a_store_that_stays_away_is_named_with_what_was_tried(
    server: CrawlServer, cache: Cache
) -> None:
    reader = TokenReader(load_manifest(f"{server.url}/data", cache=cache))
    server.faults.extend([Fault(status=503)] * 8)
    with pytest.raises(UnreachableError, match=rf"{SHARD}: HTTP status 503.*attempt 8 of 8"):
        reader.tokens(2)


def test_a_shard_larger_than_the_cache_is_refused_with_the_manifest(
    server: CrawlServer, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"the cache .* may hold 100: raise data\.cache_gb"):
        load_manifest(f"{server.url}/data", cache=Cache(tmp_path / "cache", 100))


def test_what_is_no_folder_of_shards_is_refused(server: CrawlServer, cache: Cache) -> None:
    with pytest.raises(DataError, match=r"/none/manifest\.json: no such file; name a finished"):
        load_manifest(f"{server.url}/none", cache=cache)
    with pytest.raises(DataError, match=r"not from gs://"):
        load_manifest("gs://bucket/data", cache=cache)


def test_a_manifest_that_grows_is_read_anew_until_it_is_finished(
    server: CrawlServer, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(growth, "POLL_S", 0.0)
    finished = server.files.pop("/data/manifest.json")
    tree = json.loads(finished)

    def publish(shards: int) -> None:
        growing = tree | {"shards": tree["shards"][:shards], "finished": False}
        server.replace("/data/manifest.growing.json", json.dumps(growing).encode())

    publish(1)
    url = f"{server.url}/data"
    with pytest.raises(DataError, match=r"manifest\.growing\.json: not finished, 1 shards so far"):
        load_manifest(url, cache=cache)
    reader = TokenReader(load_manifest(url, growing=True, cache=cache))
    reader.wait_for(2, lambda: publish(3))
    assert len(reader.shard_documents) == 3

    def finish() -> None:
        server.files["/data/manifest.json"] = finished
        del server.files["/data/manifest.growing.json"]

    reader.wait_for(99, finish)
    assert reader.manifest.is_finished
    assert reader.manifest.shards == load_manifest(url, cache=cache).shards
