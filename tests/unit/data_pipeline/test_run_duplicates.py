"""Which documents of a run are duplicates, of what, and which one of them stays."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from data_pipeline.recipe import Recipe, load_recipe
from data_pipeline.run import run

VOCAB_SIZE = 600
TEXT = "The quiet river carries boats past the mill while children count the passing barges."


def write_records(archive: Path, texts: Sequence[str], dates: Sequence[str]) -> None:
    """An archive of extracted texts, each with its number as X-Id."""
    records = []
    for number, (text, date) in enumerate(zip(texts, dates, strict=True)):
        body = text.encode()
        headers = [
            "WARC/1.0",
            "WARC-Type: conversion",
            f"X-Id: {number}",
            f"WARC-Date: {date}",
            "Content-Type: text/plain",
            f"Content-Length: {len(body)}",
        ]
        records.append("\r\n".join(headers).encode() + b"\r\n\r\n" + body + b"\r\n\r\n")
    archive.write_bytes(b"".join(records))


def audit_of(
    folder: Path, texts: Sequence[str], recipe: Recipe, dates: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """The audit of a run over `texts`; without `dates` all are of one day."""
    archive, out = folder / "texts.wet", folder / "out"
    write_records(archive, texts, dates or ["2024-02-29T12:00:00Z"] * len(texts))
    run([str(archive)], out, recipe, id_header="X-Id", vocab_size=VOCAB_SIZE)
    rows: list[dict[str, Any]] = pq.read_table(out / "audit").to_pylist()
    return rows


def minimal(**dedup: str) -> Recipe:
    recipe = load_recipe("minimal")
    return recipe.model_copy(update={"dedup": recipe.dedup.model_copy(update=dedup)})


def test_a_duplicate_is_exact_only_if_its_text_is(tmp_path: Path) -> None:
    rows = audit_of(tmp_path, [TEXT, TEXT, TEXT.upper()], minimal())
    assert [row["reason"] for row in rows] == ["kept", "exact duplicate", "near duplicate"]


def test_a_recipe_may_keep_the_newest_of_each_cluster(tmp_path: Path) -> None:
    dates = [
        "2021-05-01T00:00:00Z",
        "2024-02-29T12:00:00Z",
        "no date at all",
        "2024-02-29T11:59:59Z",
    ]
    texts = [TEXT, TEXT.upper(), TEXT, TEXT.upper()]
    rows = audit_of(tmp_path, texts, minimal(keep="newest"), dates)
    assert [(row["id"], row["twin"]) for row in rows] == [
        ("0", "1"),
        ("1", None),
        ("2", "1"),
        ("3", "1"),
    ]


def test_a_document_of_whose_lines_none_is_new_says_so(tmp_path: Path) -> None:
    lines = ["The quiet river carries boats.", "Children count the barges.", "The mill is closed."]
    texts = ["\n".join(lines[:2]), lines[2], "\n".join([lines[2], lines[0]])]
    rows = audit_of(tmp_path, texts, minimal(exact="line"))
    assert [row["reason"] for row in rows] == ["kept", "kept", "nothing new"]
