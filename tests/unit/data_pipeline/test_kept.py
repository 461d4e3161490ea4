"""Any range of kept documents can be read from their file."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline import kept

DOCUMENTS = 23


@pytest.fixture
def file(tmp_path: Path) -> Path:
    rows = [
        {"id": f"00003/{7 * i} own id {i}", "bytes": 5 * i, "text": f"text {i}"}
        for i in range(DOCUMENTS)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "part.parquet", row_group_size=5)
    return tmp_path / "part.parquet"


def test_each_range_has_its_documents(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "ROWS_AT_ONCE", 2)
    everything = [(f"own id {i}", f"text {i}") for i in range(DOCUMENTS)]
    assert list(kept.read_texts(file)) == everything
    for start in range(DOCUMENTS + 1):
        for stop in range(start, DOCUMENTS + 1):
            assert list(kept.read_texts(file, start, stop)) == everything[start:stop]


def test_sizes_are_those_of_the_texts(file: Path) -> None:
    sizes = [size for some in kept.read_sizes(file) for size in some.tolist()]
    assert sizes == [5 * i for i in range(DOCUMENTS)]
