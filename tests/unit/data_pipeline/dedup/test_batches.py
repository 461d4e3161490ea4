from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline import run
from data_pipeline.dedup.batches import BYTES_PER_BATCH, read_batches
from data_pipeline.dedup.inputs import parquet_parts
from data_pipeline.hygiene import decontamination
from data_pipeline.quality import training


def test_few_batches_are_in_memory_at_a_time(tmp_path):
    path = tmp_path / "in.parquet"
    texts = [f"{i} {'x' * 20_000}" for i in range(5000)]
    table = pa.table({"id": [str(i) for i in range(len(texts))], "text": texts})
    pq.write_table(table, path, row_group_size=500, use_dictionary=False, compression="none")
    del table, texts
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    before = pa.total_allocated_bytes()
    rows = 0
    for batch in read_batches(parquet_parts([path], scratch), ["text"]):
        assert batch.row == rows
        assert batch.records["text"][0].as_py().startswith(f"{rows} ")
        assert batch.records.nbytes < 1.1 * BYTES_PER_BATCH
        assert pa.total_allocated_bytes() - before < 5 * BYTES_PER_BATCH
        rows += len(batch.records)
    assert rows == 5000


def _audited(path: Path) -> Iterator[object]:
    with pq.ParquetFile(path) as file:
        rows = run._Rows(file)
        for _ in range(file.metadata.num_rows // 100):
            yield rows.take(100)


@pytest.mark.parametrize("read", [_audited, training._texts_of, decontamination._read])
def test_what_was_read_of_a_file_is_given_back(
    tmp_path: Path, read: Callable[[Path], Iterator[object]]
) -> None:
    path = tmp_path / "in.parquet"
    texts = [f"{i} {'x' * 1000}" for i in range(20_000)]
    table = pa.table({"text": texts})
    pq.write_table(table, path, row_group_size=200, use_dictionary=False, compression="none")
    del table, texts
    before = pa.total_allocated_bytes()
    most = max(pa.total_allocated_bytes() - before for _ in read(path))
    assert most < path.stat().st_size / 20
