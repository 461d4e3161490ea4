"""Examples are the same ones however documents come, and show nobody what reaches a person."""

import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from data_pipeline import ledger
from data_pipeline.crawl import Page
from data_pipeline.examples import CHARACTERS, CHARACTERS_READ, PASSED, PER_REASON, Examples

STAGE, REASON = "quality", "c4.lorem_ipsum"


def row_of(number: int, stage: str | None = STAGE, reason: str | None = REASON) -> dict[str, Any]:
    place = {"file": "a.warc", "offset": 100 * number, "url": f"https://example.com/{number}"}
    return {"id": f"<{number}>", **place, "stage": stage, "reason": reason, "detail": "why"}


def drawn(numbers: list[int], stage: str | None = STAGE, reason: str | None = REASON) -> Examples:
    examples = Examples()
    for number in numbers:
        examples.offer(number, row_of(number, stage, reason), f"text {number}")
    return examples


def settled(count: int, reason: str) -> pa.Table:
    rows = [row_of(number, "dedup", reason) for number in range(count)]
    return pa.Table.from_pylist(rows, ledger.SCHEMA)


def test_the_same_ones_are_drawn_in_any_order_and_parts(tmp_path: Path) -> None:
    numbers = list(range(200))
    expected = drawn(numbers).of(STAGE, REASON)
    assert len(expected) == PER_REASON
    assert {example["excerpt"] for example in expected} < {f"text {number}" for number in numbers}
    random.Random(0).shuffle(numbers)
    together = Examples()
    for part in (numbers[:120], numbers[120:]):
        drawn(part).save(tmp_path / "part.json")
        together.add_settled(tmp_path / "part.json", ledger.SCHEMA.empty_table())
    assert together.of(STAGE, REASON) == expected


def test_a_text_that_passed_becomes_an_example_of_what_deduplication_decides(
    tmp_path: Path,
) -> None:
    drawn(list(range(200)), None, None).save(tmp_path / "part.json")
    examples = Examples()
    examples.add_settled(tmp_path / "part.json", settled(200, "near duplicate"))
    found = examples.of("dedup", "near duplicate")
    assert found == drawn(list(range(200)), "dedup", "near duplicate").of("dedup", "near duplicate")
    assert len(found) == PER_REASON
    assert (tmp_path / "part.json").stat().st_size < 250 * PASSED


def test_what_reaches_a_person_is_masked_and_so_is_what_the_cut_goes_through() -> None:
    email, phone = "jane.doe@example.org", "phone: +1 202-555-0143"
    before = "x " * (CHARACTERS // 2 - 4)
    examples = Examples()
    parted = email.replace("@", "\x00@")
    row = row_of(1) | {"url": f"https://example.com/?to={email}", "detail": f"\x1b[2Jask {parted}"}
    examples.offer(1, row, f"{phone}\x1b {before}{email}")
    (example,) = examples.of(STAGE, REASON)
    assert example["excerpt"].startswith("phone: <PHONE> x x")
    assert "jane" not in str(example)
    assert len(example["excerpt"]) == CHARACTERS
    assert example["url"].endswith("<EMAIL>")
    assert example["detail"] == "[2Jask <EMAIL>"


@pytest.mark.parametrize(
    ("stage", "reason"),
    [
        ("blocklist", "blocklist.domain"),
        ("quality", "blocklist.words"),
        ("quality", "c4.bad_words"),
    ],
)
def test_of_what_is_on_a_list_nothing_is_shown(stage: str, reason: str) -> None:
    (example,) = drawn([7], stage, reason).of(stage, reason)
    assert example["id"] == "<7>"
    assert {example[name] for name in ("url", "detail", "excerpt")} == {None}


def test_an_archive_is_named_without_its_folder() -> None:
    row = row_of(1, "crawl", "truncated") | {"file": "/home/joe/crawl/a.warc"}
    examples = Examples()
    examples.offer(1, row | {"detail": "/home/joe/crawl/a.warc, byte 7: the file is cut"}, "")
    (example,) = examples.of("crawl", "truncated")
    assert example["detail"] == "a.warc, byte 7: the file is cut"
    assert "joe" not in str(example)


def test_a_page_without_text_shows_the_beginning_of_its_source() -> None:
    body = b"<html>\x00" + b"<nav>menu</nav>" * 1000
    page = Page("<1>", "https://example.com", "a.warc", 100, 200, "text/html", "utf-8", body)
    examples = Examples()
    examples.offer(1, row_of(1, "extract", "no text"), "", page)
    (example,) = examples.of("extract", "no text")
    assert example["excerpt"] == ("<html>" + "<nav>menu</nav>" * 1000)[:CHARACTERS]
    assert CHARACTERS < CHARACTERS_READ
