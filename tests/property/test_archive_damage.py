"""However an archive is damaged, it is read to its end, and what lies before that is whole."""

import tempfile
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data_pipeline.crawl import Archive, Page, Reject
from data_pipeline.crawl.local import LocalFile
from tests.unit.data_pipeline.warc_records import record

PIECES = [
    *(b"WARC/1.0\r\n", b"WARC/1.1\r\n", b"Content-Length: 99999999999\r\n", b"\r\n\r\n", b"\r\n"),
    *(
        b"Content-Length: -1\r\n",
        b"Content-Length: 5\r\n",
        b"WARC-Type: response\r\n",
        b"\x00" * 40,
    ),
    *(
        b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03",
        b"\x1f\x8b",
        b"HTTP/1.1 200 OK\r\n",
        b"\xff" * 9,
    ),
    *(b"Transfer-Encoding: chunked\r\n", b"Content-Encoding: gzip\r\n\r\n", b"fffffff\r\n"),
]
COUNT = 6
BODIES = [f"<p>{'word ' * (20 * number)}{number}</p>".encode() for number in range(COUNT)]

places = st.floats(0, 1, exclude_max=True)
edits = st.one_of(
    st.tuples(st.just("flip"), places, st.integers(1, 255)),
    st.tuples(st.just("cut"), places, st.integers(1, 2000)),
    st.tuples(st.just("insert"), places, st.sampled_from(PIECES)),
    st.tuples(st.just("repeat"), places, st.integers(1, 700)),
    st.tuples(st.just("end"), places, st.just(0)),
)


def damaged(content: bytes, changes: list[tuple[str, float, int | bytes]]) -> tuple[bytes, int]:
    """The content after the changes, and the first byte that may be another one."""
    first = len(content)
    for kind, place, how in changes:
        at = int(place * len(content))
        first = min(first, at)
        before, after = content[:at], content[at:]
        if isinstance(how, bytes):
            content = before + how + after
        elif kind == "flip" and after:
            content = before + bytes([after[0] ^ how]) + after[1:]
        elif kind == "cut":
            content = before + after[how:]
        elif kind == "repeat":
            content = before + after[:how] + after
        elif kind == "end":
            content = before
    return content, first


def read(content: bytes, name: str) -> list[Page | Reject]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        return list(Archive(LocalFile(path)))


@pytest.mark.parametrize("compressed", [True, False])
@given(changes=st.lists(edits, min_size=1, max_size=4))
@example(changes=[("insert", 0.0, b"\x1f\x8b")])
@example(changes=[("end", 0.5, 0)])
@settings(max_examples=300, deadline=None)
def test_what_lies_before_the_damage_is_whole_and_the_rest_comes_to_an_end(
    compressed: bool, changes: list[tuple[str, float, int | bytes]]
) -> None:
    records = [record(i, body, compressed=compressed) for i, body in enumerate(BODIES)]
    name = "x.warc.gz" if compressed else "x.warc"
    content, first = damaged(b"".join(records), changes)
    found = read(content, name)
    end, whole = 0, 0
    for number, part in enumerate(records):
        end += len(part)
        # A document is passed on once its successor has been found where it should be.
        if end + len(records[min(number + 1, COUNT - 1)]) <= first:
            whole = number + 1
    assert [page.body for page in found[:whole] if isinstance(page, Page)] == BODIES[:whole]
    for document in found:
        assert document.id
        assert 0 <= document.offset <= len(content)
        assert isinstance(document, Page) or document.reason


@given(
    content=st.lists(st.sampled_from(PIECES) | st.binary(max_size=30), max_size=40).map(b"".join)
)
@settings(max_examples=300, deadline=None)
def test_bytes_that_are_no_archive_are_read_to_their_end(content: bytes) -> None:
    for name in ("x.warc", "x.warc.gz"):
        for document in read(content, name):
            assert isinstance(document, Page | Reject)
