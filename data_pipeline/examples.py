"""A few documents of each outcome, with the beginning of what the decision was about.

They are those with the smallest hashes of their ids and places, so that the same ones are drawn in
whatever parts and order archives are cleaned.
"""

import hashlib
import json
from bisect import insort
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from data_pipeline.crawl import Page
from data_pipeline.extract.charset import decode
from data_pipeline.hygiene import Privacy

PER_REASON = 3
# Of the texts of an archive that pass: which of them repeat others is known only later.
PASSED = 32
CHARACTERS = 400
# More than is shown, so that what begins there is found, and masked, whole.
CHARACTERS_READ = 1000
FACTS = ("id", "url", "detail", "language", "quality_score", "twin", "jaccard")
PASSED_AS = ("", "")
# Who puts something on a list does not want to see it.
LISTED = ("blocklist", "blocklist.words", "c4.bad_words")
MASKS = Privacy(email="<EMAIL>", ip_address="<IP>", phone="<PHONE>", card="<CARD>")

Row = Mapping[str, Any]
Reason = tuple[str, str]
"""A stage and its reason; `PASSED_AS` while deduplication has not decided."""


class Drawn(NamedTuple):
    """A document that was drawn.

    Attributes:
        key: a hash; the smallest ones are drawn.
        number: of its row in the audit of its archive.
        text: the beginning of what the decision was about.
    """

    key: str
    number: int
    row: dict[str, Any]
    text: str


class Examples:
    """Of the documents that are offered those with the smallest hashes."""

    def __init__(self) -> None:
        self._drawn: dict[Reason, list[Drawn]] = {}

    def offer(self, number: int, row: Row, text: str, page: Page | None = None) -> None:
        """Take a document as an example of its outcome, unless there are enough.

        Args:
            number: of its row in the audit of its archive.
            text: of it, or its beginning; empty if it has none.
            page: whose source is shown instead of a text that was not found.
        """
        key = _key(row)
        if not self._wants(_reason(row), key):
            return
        if row.get("reason") in ("no text", "parser") and page is not None:
            text = source_of(page, CHARACTERS_READ)
        known = [name for name in ("file", "offset", *FACTS) if row.get(name) is not None]
        facts = {name: row[name] for name in known}
        self._add(_reason(row), Drawn(key, number, facts, text[:CHARACTERS_READ]))

    def save(self, path: Path) -> None:
        path.write_text(json.dumps([[*reason, drawn] for reason, drawn in self._drawn.items()]))

    def add_settled(self, path: Path, audit: pa.Table) -> None:
        """Take over what `save` has written of an archive, now that its audit is settled."""
        for stage, reason, listed in json.loads(path.read_text()):
            drawn = [Drawn(*one) for one in listed]
            if (stage, reason) != PASSED_AS:
                for one in drawn:
                    self._add((stage, reason), one)
                continue
            rows = audit.take([one.number for one in drawn]).to_pylist()
            for one, row in zip(drawn, rows, strict=True):
                self.offer(one.number, row, one.text)

    def of(self, stage: str, reason: str) -> list[dict[str, Any]]:
        """What is shown of the examples of an outcome, without what reaches a person."""
        return [_shown(stage, reason, one) for one in self._drawn.get((stage, reason), ())]

    def _wants(self, reason: Reason, key: str) -> bool:
        drawn = self._drawn.get(reason, [])
        return len(drawn) < _most(reason) or key <= drawn[-1].key

    def _add(self, reason: Reason, one: Drawn) -> None:
        drawn = self._drawn.setdefault(reason, [])
        insort(drawn, one, key=_order)
        del drawn[_most(reason) :]


def source_of(page: Page, size: int | None = None) -> str:
    """The source of a page, or of its first bytes, without what cannot be shown."""
    return _printable(decode(page.body[:size], page.charset))


def _key(row: Row) -> str:
    return hashlib.blake2b(f"{row['id']} {row['offset']}".encode(), digest_size=8).hexdigest()


def _order(one: Drawn) -> tuple[str, str, int]:
    # A record that stands in two archives has one key.
    return one.key, one.row["file"], one.row["offset"]


def _reason(row: Row) -> Reason:
    stage, reason = row.get("stage"), row.get("reason")
    return PASSED_AS if stage is None or reason is None else (stage, reason)


def _most(reason: Reason) -> int:
    return PASSED if reason == PASSED_AS else PER_REASON


def _shown(stage: str, reason: str, one: Drawn) -> dict[str, Any]:
    shown: dict[str, Any] = {name: one.row.get(name) for name in FACTS}
    shown["score"] = shown.pop("quality_score")
    if stage in LISTED or reason in LISTED:
        return shown | dict.fromkeys(("url", "detail", "excerpt"))
    # Where an archive lies is of no use to who reads of it elsewhere.
    file = one.row["file"]
    shown["detail"] = shown["detail"] and shown["detail"].replace(file, file.rpartition("/")[2])
    for name in ("url", "detail"):
        shown[name] = shown[name] and _harmless(shown[name])
    return shown | {"excerpt": _harmless(one.text).strip()[:CHARACTERS] or None}


def _harmless(text: str) -> str:
    # In this order: what is not seen may part an address.
    return MASKS.mask(_printable(text)).text


def _printable(text: str) -> str:
    return "".join(c for c in text if c.isprintable() or c in "\n\t")
