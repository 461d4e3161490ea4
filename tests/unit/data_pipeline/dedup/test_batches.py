import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.dedup.batches import BYTES_PER_BATCH, read_batches
from data_pipeline.dedup.inputs import parquet_parts


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
