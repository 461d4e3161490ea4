"""Megatron's datasets, written and read; what is no such dataset is refused by name."""

import struct
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.errors import DataError
from data_pipeline.formats import export_megatron, import_megatron
from data_pipeline.formats import megatron as module
from data_pipeline.formats.megatron import DatasetWriter, open_dataset
from data_pipeline.shards import load_manifest, write_shards
from tests.unit.data_pipeline.formats.corpus import (
    bytes_of,
    ids_of,
    make_documents,
    make_tokenizer,
    tokens_of,
)

SEQUENCES, BOUNDS = 18, 26


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json")


@pytest.fixture
def shards(tmp_path: Path, tokenizer: Path) -> Path:
    write_shards(make_documents(60), tokenizer, tmp_path / "own", tokens_per_shard=400, extra={})
    return tmp_path / "own"


@pytest.fixture
def dataset(tmp_path: Path, shards: Path) -> Path:
    export_megatron(shards, tmp_path / "data/v1.5")
    return tmp_path / "data/v1.5"


def write_dataset(
    prefix: Path, sequences: list[list[int]], bounds: list[int], code: int = 4
) -> Path:
    """A dataset as the module's description has it, one sequence after another."""
    lengths = np.array([len(sequence) for sequence in sequences], "<i4")
    dtype = module.DTYPES.get(code, np.dtype(np.int32))
    pointers = (np.cumsum(lengths, dtype="<i8") - lengths) * dtype.itemsize
    header = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(sequences), len(bounds))
    index = header + lengths.tobytes() + pointers.tobytes() + np.array(bounds, "<i8").tobytes()
    prefix.with_name(f"{prefix.name}.idx").write_bytes(index)
    tokens = np.concatenate([np.array(sequence, dtype) for sequence in [*sequences, []]])
    prefix.with_name(f"{prefix.name}.bin").write_bytes(tokens.astype(dtype).tobytes())
    return prefix


def test_links_to_files_of_other_names_are_read(
    tmp_path: Path, shards: Path, dataset: Path, tokenizer: Path
) -> None:
    for suffix in ("bin", "idx"):
        file = dataset.with_name(f"{dataset.name}.{suffix}")
        file.rename(tmp_path / f"d5b-{suffix}")
        file.symlink_to(tmp_path / f"d5b-{suffix}")
    import_megatron([dataset], tokenizer, tmp_path / "back")
    assert tokens_of(tmp_path / "back") == tokens_of(shards)


@pytest.mark.parametrize("suffix", ["", ".bin", ".idx"])
def test_exported_shards_come_back(
    tmp_path: Path, shards: Path, dataset: Path, tokenizer: Path, suffix: str
) -> None:
    out = tmp_path / "back"
    made = import_megatron([dataset.with_name(f"v1.5{suffix}")], tokenizer, out)
    assert made.is_new
    assert tokens_of(out) == tokens_of(shards)
    assert ids_of(out) == [f"v1.5:{number}" for number in range(60)]
    assert load_manifest(out).unigram_entropy == load_manifest(shards).unigram_entropy
    before = bytes_of(out)
    assert not import_megatron([dataset], tokenizer, out).is_new
    assert bytes_of(out) == before


def test_documents_without_their_end_get_one(tmp_path: Path, shards: Path, tokenizer: Path) -> None:
    export_megatron(shards, tmp_path / "bare", append_eod=False)
    bare = [tokens.tolist() for tokens in open_dataset(tmp_path / "bare").documents()]
    assert bare == [tokens[:-1] for tokens in tokens_of(shards)]
    import_megatron([tmp_path / "bare"], tokenizer, tmp_path / "back")
    assert tokens_of(tmp_path / "back") == tokens_of(shards)


@pytest.mark.parametrize("code", [1, 2, 3, 4, 5, 8])
def test_sequences_of_a_document_are_joined(tmp_path: Path, tokenizer: Path, code: int) -> None:
    sequences = [[1, 2], [3], [], [4, 5, 0], [6]]
    write_dataset(tmp_path / "a", sequences, [0, 2, 2, 4, 5], code)
    import_megatron([tmp_path / "a"], tokenizer, tmp_path / "out")
    assert tokens_of(tmp_path / "out") == [[1, 2, 3, 0], [0], [4, 5, 0], [6, 0]]


def test_blocks_of_the_index_fit_together(
    tmp_path: Path, shards: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BLOCK", 7)
    export_megatron(shards, tmp_path / "a")
    import_megatron([tmp_path / "a"], tokenizer, tmp_path / "back")
    assert tokens_of(tmp_path / "back") == tokens_of(shards)


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65499, "uint16"), (65500, "int32")])
def test_tokens_have_the_type_that_megatron_chooses(
    tmp_path: Path, vocab_size: int, dtype: str
) -> None:
    with DatasetWriter(tmp_path / "a.bin", tmp_path / "a.idx", 1, vocab_size) as writer:
        writer.add(np.array([vocab_size - 1]), np.array([1]))
    read = open_dataset(tmp_path / "a")
    assert read.tokens.dtype == dtype
    assert read.tokens.tolist() == [vocab_size - 1]


def edited(path: Path, place: int, content: bytes) -> None:
    before = path.read_bytes()
    path.write_bytes(before[:place] + content + before[place + len(content) :])


@pytest.mark.parametrize(
    ("place", "content", "message"),
    [
        (0, b"TNTIDX\x00\x00\x00", r"\.idx: not the index of a Megatron IndexedDataset: .*TNTIDX"),
        (9, b"\x02", r"\.idx: version 2 of the format; only 1 can be read"),
        (17, b"\x07", r"\.idx: tokens of type 7; allowed are 1 \(uint8\), .*8 \(uint16\)"),
        (17, b"\x04", r"\.bin: cut, or not the one of|\.idx: damaged: sequence"),
        (SEQUENCES, b"\x3b", r"\.idx: cut or damaged: it has \d+ bytes, but 59 sequences and 60"),
        (37, b"\x80", r"\.idx: damaged: sequence 0 "),
        (34 + 4 * 60 + 8, b"\x7f", r"\.idx: damaged: sequence 1 "),
        (34 + 12 * 60, b"\x01", r"\.idx: damaged: its documents do not divide its 60 sequences"),
        (34 + 12 * 60 + 8, b"\x09", r"\.idx: damaged: its documents do not divide"),
    ],
)
def test_a_damaged_index_is_refused(
    tmp_path: Path, dataset: Path, tokenizer: Path, place: int, content: bytes, message: str
) -> None:
    edited(dataset.with_name("v1.5.idx"), place, content)
    with pytest.raises(DataError, match=message):
        import_megatron([dataset], tokenizer, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "kept", "message"),
    [
        ("v1.5.idx", 33, r"\.idx: cut: 33 bytes are less than a header"),
        ("v1.5.idx", -1, r"\.idx: cut or damaged: it has \d+ bytes, but 60 sequences and 60"),
        (
            "v1.5.bin",
            -1,
            r"\.bin: cut, or not the one of .*v1\.5\.idx: it has \d+ bytes, the index",
        ),
    ],
)
def test_a_cut_file_is_refused(
    tmp_path: Path, dataset: Path, tokenizer: Path, name: str, kept: int, message: str
) -> None:
    path = dataset.with_name(name)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(DataError, match=message):
        import_megatron([dataset], tokenizer, tmp_path / "out")


def test_a_multimodal_dataset_is_refused(tmp_path: Path, dataset: Path, tokenizer: Path) -> None:
    index = dataset.with_name("v1.5.idx")
    index.write_bytes(index.read_bytes() + bytes(60))
    with pytest.raises(DataError, match=r"\.idx: a multimodal dataset, with a mode for each"):
        import_megatron([dataset], tokenizer, tmp_path / "out")


def test_a_missing_file_is_named(tmp_path: Path, dataset: Path, tokenizer: Path) -> None:
    dataset.with_name("v1.5.bin").unlink()
    with pytest.raises(DataError, match=r"v1\.5\.bin: no such file; name the prefix of"):
        import_megatron([dataset], tokenizer, tmp_path / "out")


@pytest.mark.parametrize("token", [300, -1])
def test_a_token_that_the_tokenizer_lacks_is_named(
    tmp_path: Path, tokenizer: Path, token: int
) -> None:
    write_dataset(tmp_path / "a", [[1], [2, token, 299]], [0, 1, 2])
    with pytest.raises(DataError, match=rf"document 1 .* of .*/a: token {token}, but .* 0 to 299"):
        import_megatron([tmp_path / "a"], tokenizer, tmp_path / "out")


def test_no_documents_are_refused_both_ways(tmp_path: Path, tokenizer: Path) -> None:
    write_dataset(tmp_path / "a", [], [0])
    with pytest.raises(DataError, match=r"no document in .*a\.bin"):
        import_megatron([tmp_path / "a"], tokenizer, tmp_path / "out")
    write_shards([("empty", "")], tokenizer, tmp_path / "own", extra={})
    with pytest.raises(DataError, match="own: no tokens to write"):
        export_megatron(tmp_path / "own", tmp_path / "b", append_eod=False)


def test_a_document_that_is_too_long_is_named(
    tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_pipeline.formats.export.LONGEST_SEQUENCE", 30)
    with pytest.raises(DataError, match=r"document doc-\d+ has \d+ tokens, .* has at most 30"):
        export_megatron(shards, tmp_path / "a")
    assert list(tmp_path.glob("*a.*")) == []
