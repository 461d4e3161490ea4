"""Lines of metrics.jsonl as columns of numbers."""

import io
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json

from pretrain.metrics.downsample import Floats
from pretrain.metrics.sinks import NON_FINITE

# What pyarrow needs to look at a block at all costs more than Python takes for a few rows.
FEW_BYTES = 1 << 16
SHOWN_CHARACTERS = 60


@dataclass(frozen=True)
class Damage:
    """Lines that are no rows: how many, the number of the first (from 1), and its beginning."""

    lines: int
    first_line: int
    first_text: str

    def after(self, earlier: "Damage | None") -> "Damage":
        """This and the damage of the lines before."""
        return replace(earlier, lines=earlier.lines + self.lines) if earlier else self


class Column(NamedTuple):
    """A metric in those rows that have it: step [n], value [n, *shape] with NaN where not finite.

    A number within mappings is called `metric/key/key`.
    """

    name: str
    step: Floats
    value: Floats


@dataclass
class Rows:
    """What a block of lines holds; text, and lists of no regular shape, are left out."""

    lines: int
    rows: int
    columns: list[Column]
    damage: Damage | None = None


def parse_rows(lines: bytes, first_line: int = 1) -> Rows:
    """
    Args:
        lines: whole ones; a last one without its end is damaged.
        first_line: the number of the first, for what is said of damage.
    """
    if len(lines) >= FEW_BYTES:
        rows = _parse_fast(lines)
        if rows is not None:
            return rows
    return _parse_each(lines, first_line)


def _parse_fast(lines: bytes) -> Rows | None:
    """None: something is unusual, and each line has to be looked at."""
    count = lines.count(b"\n")
    options = pyarrow.json.ReadOptions(use_threads=False, block_size=len(lines) + 1)
    try:
        table = pyarrow.json.read_json(pa.BufferReader(lines), read_options=options)
    except pa.ArrowInvalid:
        return None
    is_whole = table.num_rows == count and lines.endswith(b"\n")
    if not is_whole or "train/step" not in table.column_names or _has_text(table.schema.types):
        return None
    step = table.column("train/step")
    if not _is_number(step.type) or step.null_count:
        return None
    least, most = pc.min_max(step).as_py().values()
    if not 0 <= least <= most < 1 << 53:
        return None
    steps = step.combine_chunks().cast(pa.float64())
    columns: list[Column] = []
    for name, values in zip(table.column_names, table.columns, strict=True):
        columns += _columns_of(name, steps, values.combine_chunks())
    return Rows(count, count, columns)


def _columns_of(name: str, steps: Any, values: Any) -> Iterator[Column]:
    if pa.types.is_struct(values.type):
        for key, child in zip(values.type.names, values.flatten(), strict=True):
            yield from _columns_of(f"{name}/{key}", steps, child)
        return
    if values.null_count:
        steps, values = steps.filter(values.is_valid()), values.drop_null()
    if not len(steps):
        return
    if _is_number(values.type):
        yield Column(name, _to_floats(steps), _to_floats(values))
    elif pa.types.is_list(values.type):
        value = _regular(values)
        if value is not None:
            yield Column(name, _to_floats(steps), value)
        else:
            collected = _Collected()
            for step, nested in zip(steps.to_pylist(), values.to_pylist(), strict=True):
                collected.add(name, step, nested)
            yield from collected.columns()


def _regular(values: Any) -> Floats | None:
    """Lists, maybe of lists, as one array; None if they differ in length or are empty."""
    shape = [len(values)]
    while pa.types.is_list(values.type):
        bounds = pc.min_max(pc.list_value_length(values)).as_py()
        if values.null_count or not bounds["max"] or bounds["min"] != bounds["max"]:
            return None
        shape.append(bounds["max"])
        values = values.flatten()
    return _to_floats(values).reshape(shape) if _is_number(values.type) else None


def _has_text(kinds: Iterable[Any]) -> bool:
    """Whether there are values that are no numbers, such as those that are not finite."""
    types = pa.types
    for kind in kinds:
        if types.is_nested(kind):
            if _has_text(kind.field(i).type for i in range(kind.num_fields)):
                return True
        elif not (_is_number(kind) or types.is_null(kind)):
            return True
    return False


def _is_number(kind: Any) -> bool:
    types = pa.types
    return bool(types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind))


def _to_floats(values: Any) -> Floats:
    # Unsafe: integers above 2^53 are rounded, as Python does.
    values = values.cast(pa.float64(), safe=False)
    if values.null_count:
        values = pc.fill_null(values, np.nan)
    # Not `to_numpy`, which imports pandas.
    return np.from_dlpack(values).astype(np.float64, copy=False)


class _Collected:
    """Values by metric and shape."""

    def __init__(self) -> None:
        self._values: dict[tuple[str, tuple[int, ...]], tuple[list[float], list[Any]]]
        self._values = defaultdict(lambda: ([], []))

    def add(self, name: str, step: float, value: Any) -> None:
        if isinstance(value, str):
            value = NON_FINITE.get(value)
        try:
            # The usual kind first.
            if isinstance(value, (float, int)):
                self._append(name, (), step, float(value))
            elif isinstance(value, dict):
                for key, item in value.items():
                    self.add(f"{name}/{key}", step, item)
            elif isinstance(value, list):
                array = np.array(value, dtype=np.float64)
                if array.size:
                    self._append(name, array.shape, step, array)
        except (ValueError, TypeError, OverflowError):
            return

    def _append(self, name: str, shape: tuple[int, ...], step: float, value: Any) -> None:
        steps, values = self._values[name, shape]
        steps.append(step)
        values.append(value)

    def columns(self) -> Iterator[Column]:
        for (name, _), (steps, values) in self._values.items():
            yield Column(name, np.array(steps, dtype=np.float64), np.array(values))


def _parse_each(lines: bytes, first_line: int) -> Rows:
    collected = _Collected()
    parsed = Rows(0, 0, [])
    for line in io.BytesIO(lines):
        row = _row_of(line)
        if row is None:
            text = line[:SHOWN_CHARACTERS].decode(errors="replace").strip()
            damage = Damage(1, first_line + parsed.lines, text)
            parsed.damage = damage.after(parsed.damage)
        else:
            parsed.rows += 1
            for name, value in row.items():
                collected.add(name, row["train/step"], value)
        parsed.lines += 1
    parsed.columns = list(collected.columns())
    return parsed


def _row_of(line: bytes) -> dict[str, Any] | None:
    """None: not a row with a step."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict):
        return None
    step = row.get("train/step")
    return row if isinstance(step, int | float) and 0 <= step < 1 << 53 else None
