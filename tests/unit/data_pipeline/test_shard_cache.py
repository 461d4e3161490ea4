"""A cache that several processes share stays within its bound, whatever happens to them."""

import fcntl
import hashlib
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO

import pytest

from data_pipeline.errors import DataError
from data_pipeline.shards import Cache, cache
from data_pipeline.shards.store import StoredFile
from tests.disks import SmallDisk, files_of_at_most, flock_of_nfs4

SIZE = 4096


def content(number: int, size: int = SIZE) -> bytes:
    return hashlib.shake_128(b"%d" % number).digest(size)


def stored(number: int, size: int = SIZE) -> StoredFile:
    sha256 = hashlib.sha256(content(number, size)).hexdigest()
    return StoredFile(f"{number}.tar", size, sha256)


def read(cache: Cache, number: int, size: int = SIZE) -> bytes:
    file = cache.open(stored(number, size), "url", lambda: [content(number, size)])
    assert file is not None
    with file:
        return file.read()


def held(cache: Cache) -> set[str]:
    return {path.name for path in cache.folder.iterdir()} - {".lock"}


def held_bytes(cache: Cache) -> int:
    return sum((cache.folder / name).stat().st_size for name in held(cache))


@pytest.fixture
def small(tmp_path: Path) -> Cache:
    """Room for four files."""
    return Cache(tmp_path / "cache", 4 * SIZE)


@pytest.mark.parametrize("flock", [fcntl.flock, flock_of_nfs4])
def test_the_least_recently_used_make_room(
    small: Cache, monkeypatch: pytest.MonkeyPatch, flock: Callable[[IO[bytes], int], None]
) -> None:
    monkeypatch.setattr(fcntl, "flock", flock)
    for number in range(4):
        assert read(small, number) == content(number)
    read(small, 0)
    assert read(small, 4) == content(4)
    assert held(small) == {stored(number).sha256 for number in (0, 2, 3, 4)}


def test_files_of_others_in_the_folder_are_left_alone(small: Cache) -> None:
    """As where data.cache_dir is a scratch disk itself, not a new folder on it."""
    (small.folder / "results").mkdir(parents=True)
    (small.folder / "thesis.tex").write_bytes(bytes(9 * SIZE))
    (small.folder / "download.part").touch()
    os.utime(small.folder / "thesis.tex", (0, 0))
    for number in range(9):
        assert read(small, number) == content(number)
    found = held(small)
    assert {"results", "thesis.tex", "download.part"} < found
    assert len(found) == 3 + 4


def test_the_bound_holds_at_any_time(small: Cache) -> None:
    draw = random.Random(3)
    for _ in range(200):
        number, size = draw.randrange(30), draw.choice([1, 100, SIZE, 3 * SIZE])
        assert read(small, number, size) == content(number, size)
        assert held_bytes(small) <= small.max_bytes


def test_what_is_mapped_is_not_evicted_and_counts(small: Cache, tmp_path: Path) -> None:
    other = Cache(small.folder, small.max_bytes)
    mapped = other.map(stored(0), "url", lambda: [content(0)])
    for number in range(1, 12):
        read(small, number)
        assert held_bytes(small) <= small.max_bytes
        assert stored(0).sha256 in held(small)
    assert mapped.tobytes() == content(0)


def test_a_process_gives_up_its_own_mappings_for_what_it_needs_now(small: Cache) -> None:
    first = small.map(stored(0, 3 * SIZE), "url", lambda: [content(0, 3 * SIZE)])
    assert len(first) == 3 * SIZE
    del first
    assert read(small, 1, 3 * SIZE) == content(1, 3 * SIZE)
    assert held_bytes(small) <= small.max_bytes


def test_a_cache_full_of_what_is_in_use_says_what_to_raise(
    small: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "ROOM_WAIT_S", 0.0)
    others = [Cache(small.folder, small.max_bytes) for _ in range(4)]
    arrays = [
        other.map(stored(number), "url", lambda number=number: [content(number)])
        for number, other in enumerate(others)
    ]
    with pytest.raises(DataError, match=rf"{small.folder}: no room for {SIZE} bytes.*data\.cache_"):
        read(small, 9)
    assert arrays[0].tobytes() == content(0)
    assert held(small) == {stored(number).sha256 for number in range(4)}


def test_another_file_than_the_manifest_lists_is_refused_and_not_kept(small: Cache) -> None:
    for wrong in (content(1), content(0)[:-1], content(0) + b"x", b""):
        with pytest.raises(DataError, match=r"url: damaged, or changed since the manifest"):
            small.open(stored(0), "url", lambda wrong=wrong: [wrong])
        assert held(small) == set()


def test_damage_in_the_cache_is_found_and_mended(
    small: Cache, caplog: pytest.LogCaptureFixture
) -> None:
    read(small, 0)
    path = small.folder / stored(0).sha256
    path.write_bytes(bytes(SIZE))
    assert read(Cache(small.folder, small.max_bytes), 0) == content(0)
    assert f"{path}: damaged; it is fetched again" in caplog.text


def test_a_file_beyond_the_bound_is_refused(small: Cache) -> None:
    files = [stored(0), stored(1, 5 * SIZE)]
    with pytest.raises(DataError, match=rf"s3://b/1\.tar has {5 * SIZE} bytes.*data\.cache_gb"):
        small.require_room_for(files, "s3://b")


def test_no_room_on_the_disk_evicts_and_then_says_so(
    small: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "ROOM_WAIT_S", 0.0)
    read(small, 0)
    with (
        files_of_at_most(SIZE),
        pytest.raises(DataError, match=rf"{small.folder}: no room for {2 * SIZE} bytes"),
    ):
        read(small, 1, 2 * SIZE)
    assert held(small) == set()
    assert read(small, 1, 2 * SIZE) == content(1, 2 * SIZE)


def test_a_disk_smaller_than_the_bound_holds_what_it_can(tmp_path: Path) -> None:
    try:
        disk = SmallDisk(tmp_path / "disk", "256k")
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"may not mount a tmpfs: {error}")
    try:
        large = Cache(disk.folder / "cache", 1 << 30)
        for number in range(20):
            assert read(large, number, 50_000) == content(number, 50_000)
        assert len(held(large)) >= 2
    finally:
        disk.unmount()


FETCH = """
import sys
from pathlib import Path
from data_pipeline.shards import Cache
from tests.unit.data_pipeline.test_shard_cache import content, stored, SIZE
folder, first, ending = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
cache = Cache(folder, 4 * SIZE)
for number in range(first, first + 12):
    def blocks():
        with (folder.parent / "downloads").open("a") as log:
            log.write(f"{number}\\n")
        yield content(number)[:100]
        if ending == "hang":
            print("half", flush=True)
            sys.stdin.read()
        yield content(number)[100:]
    with cache.open(stored(number), "url", blocks) as file:
        assert file.read() == content(number)
"""


def start(cache: Cache, first: int, ending: str = "done") -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", FETCH, str(cache.folder), str(first), ending]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ
    )


def test_a_killed_download_leaves_the_cache_usable(small: Cache) -> None:
    process = start(small, 0, "hang")
    assert process.stdout is not None
    assert process.stdout.readline() == "half\n"
    assert held(small) == {stored(0).sha256 + ".part"}
    # While it is alive, its file counts and stays; others may be fetched beside it.
    for number in range(1, 6):
        assert read(small, number) == content(number)
    assert stored(0).sha256 + ".part" in held(small)
    assert held_bytes(small) <= small.max_bytes
    file = stored(0)
    assert small.open(file, "url", lambda: [content(0)], if_idle=True) is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert read(small, 0) == content(0)
    assert not [name for name in held(small) if name.endswith(".part")]


def test_what_a_killed_download_has_left_goes_first(small: Cache) -> None:
    small.folder.mkdir()
    (small.folder / (stored(0).sha256 + ".part")).write_bytes(content(0)[:-1])
    for number in range(1, 5):
        read(small, number)
    assert held(small) == {stored(number).sha256 for number in range(1, 5)}


def test_processes_that_want_the_same_download_it_once(tmp_path: Path) -> None:
    roomy = Cache(tmp_path / "cache", 4 * SIZE)
    processes = [start(roomy, first) for first in (0, 0, 1)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert held_bytes(roomy) <= roomy.max_bytes
    assert not [name for name in held(roomy) if name.endswith(".part")]
