"""JSON Lines as tables that keep every field of every document as it was written."""

import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa

from data_pipeline.errors import DataError

TABLE_BYTES = 64 << 20
SCHEMA = pa.schema({"id": pa.string(), "text": pa.string(), "extra": pa.string()})
# Numbers are never looked at, and float takes those that have too many digits for int.
DECODER = json.JSONDecoder(parse_int=float)
Row = tuple[str | None, str | None, str | None]


def read_jsonl(path: Path, id_field: str = "id", text_field: str = "text") -> Iterator[pa.Table]:
    """The documents of a file in tables of about 64 MB, with the columns id, text and extra.

    `extra` is a JSON object of the other fields, each to the letter, so that a field may have
    another type in every line; it is null where there are none.

    Raises:
        DataError: the file is damaged, a line is no JSON object, or its id or text no string.
    """
    names = id_field, text_field
    rows: list[Row] = []
    size = number = 0
    try:
        with io.BufferedReader(pa.input_stream(str(path), compression="detect")) as lines:
            for line in lines:
                if not line.isspace():
                    rows.append(
                        _parse(line, names, f"document {number} (counted from 0) of {path}")
                    )
                    number += 1
                size += len(line)
                if size >= TABLE_BYTES:
                    yield _table(rows)
                    rows, size = [], 0
    except OSError as error:
        raise DataError(f"{path}: damaged after document {number} ({error})") from error
    if rows:
        yield _table(rows)


def _table(rows: Sequence[Row]) -> pa.Table:
    columns = zip(*rows, strict=True) if rows else [()] * len(SCHEMA)
    return pa.table([pa.array(column, pa.string()) for column in columns], SCHEMA)


def _parse(line: bytes, names: tuple[str, str], place: str) -> Row:
    try:
        text = line.decode("utf-8-sig")
        document = DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: a line that is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise DataError(f"{place}: a line that is no JSON object but {text:.40}")
    for name in names:
        _refuse_other_types(document.get(name), f"{place}: `{name}`")
    others = []
    if not document.keys() <= set(names):
        others = [field for name, field in _fields(text) if name not in names]
    extra = "{" + ", ".join(others) + "}" if others else None
    own_id, own_text = map(document.get, names)
    return own_id, own_text, extra


def _refuse_other_types(value: object, place: str) -> None:
    if not isinstance(value, str | None):
        raise DataError(f"{place} must be a string, not {value!r:.40}")
    try:
        (value or "").encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{place} has half a surrogate pair: {error}") from error


def _fields(text: str) -> Iterator[tuple[str, str]]:
    """The name of each field of a JSON object, and the field as it is written."""
    start = _skip(text, text.index("{") + 1)
    while text[start] != "}":
        name, end = DECODER.raw_decode(text, start)
        _, end = DECODER.raw_decode(text, _skip(text, end))
        yield name, text[start:end]
        start = _skip(text, end)


def _skip(text: str, place: int) -> int:
    """The next place that holds neither white space nor punctuation between fields."""
    while text[place] in " \t\r\n:,":
        place += 1
    return place
