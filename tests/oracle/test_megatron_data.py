"""Our files of Megatron's IndexedDataset against megatron-core's own reader and writer."""

from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline.formats import export_megatron, import_megatron
from data_pipeline.shards import TokenReader, load_manifest

pytestmark = pytest.mark.oracle


def tokens_of(folder: Path) -> list[list[int]]:
    reader = TokenReader(load_manifest(folder))
    return [
        reader.read(document, 0, length).tolist()
        for document, length in enumerate(reader.lengths.tolist())
    ]


@pytest.mark.parametrize("append_eod", [True, False])
def test_megatron_reads_what_we_write(shards: Path, tmp_path: Path, append_eod: bool) -> None:
    from megatron.core.datasets.indexed_dataset import DType, IndexedDataset

    export_megatron(shards, tmp_path / "ours", append_eod=append_eod)
    theirs = IndexedDataset(str(tmp_path / "ours"))
    expected = [tokens if append_eod else tokens[:-1] for tokens in tokens_of(shards)]
    assert [sequence.tolist() for sequence in theirs[0 : len(theirs)]] == expected
    assert theirs.document_indices.tolist() == list(range(len(expected) + 1))
    assert theirs.index.dtype is DType.optimal_dtype(load_manifest(shards).vocab_size)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_we_read_what_megatron_writes(shards: Path, tmp_path: Path, dtype: type) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    documents = tokens_of(shards)
    for part, some in enumerate((documents[:100], documents[100:])):
        builder = IndexedDatasetBuilder(str(tmp_path / f"part-{part}.bin"), dtype)
        for number, tokens in enumerate(some):
            if number % 3:
                builder.add_document(tokens, [len(tokens)])
            else:  # a document of two sequences
                builder.add_item(torch.tensor(tokens[:2]))
                builder.add_item(torch.tensor(tokens[2:]))
                builder.end_document()
        builder.finalize(str(tmp_path / f"part-{part}.idx"))
    merged = IndexedDatasetBuilder(str(tmp_path / "all.bin"), dtype)
    for part in (0, 1):
        merged.add_index(str(tmp_path / f"part-{part}"))
    merged.finalize(str(tmp_path / "all.idx"))
    import_megatron([tmp_path / "all"], shards / "tokenizer.json", tmp_path / "back")
    assert tokens_of(tmp_path / "back") == documents


def test_a_multimodal_dataset_of_megatron_is_refused(shards: Path, tmp_path: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    from data_pipeline.errors import DataError

    builder = IndexedDatasetBuilder(str(tmp_path / "a.bin"), np.uint16, multimodal=True)
    builder.add_item(torch.tensor([1, 2]), mode=1)
    builder.end_document()
    builder.finalize(str(tmp_path / "a.idx"))
    with pytest.raises(DataError, match="multimodal"):
        import_megatron([tmp_path / "a"], shards / "tokenizer.json", tmp_path / "out")
