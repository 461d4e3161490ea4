import json
import math
import tarfile
from collections import Counter

import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset

from data_pipeline.errors import DataError
from data_pipeline.shards import TokenReader, load_manifest, write_shards
from data_pipeline.tokenize import load_tokenizer, train_tokenizer

DOCUMENTS = [(f"id-{i}", f"Document {i} " + "says more. " * (i % 7)) for i in range(40)] + [
    ("empty", "")
]


@pytest.fixture
def tokenizer(tmp_path):
    path = tmp_path / "tokenizer.json"
    train_tokenizer([text for _, text in DOCUMENTS], 300, path)
    return path


@pytest.fixture
def data(tmp_path, tokenizer):
    write_shards(DOCUMENTS, tokenizer, tmp_path / "data", tokens_per_shard=200, extra={"a": 1})
    return tmp_path / "data"


def expected_tokens(tokenizer):
    coder = load_tokenizer(tokenizer)
    return [[*coder.encode(text), coder.eos_id] for _, text in DOCUMENTS]


def test_stock_webdataset_reads_the_same_tokens(data, tokenizer):
    tars = [str(path) for path in sorted(data.glob("shards/*.tar"))]
    assert len(tars) > 2
    samples = list(webdataset.WebDataset(tars, shardshuffle=False).decode())
    assert [sample["npy"].tolist() for sample in samples] == expected_tokens(tokenizer)
    assert len({sample["__key__"] for sample in samples}) == len(DOCUMENTS)


def test_reader_gives_any_part_of_any_document(data, tokenizer):
    manifest = load_manifest(data)
    reader = TokenReader(manifest)
    expected = expected_tokens(tokenizer)
    assert reader.lengths.tolist() == [len(tokens) for tokens in expected]
    for document in (40, 0, 17):
        tokens = expected[document]
        assert reader.read(document, 0, len(tokens)).tolist() == tokens
        assert reader.read(document, 1, 3).tolist() == tokens[1:3]
        assert reader.read(document, len(tokens) - 1, len(tokens) + 5).tolist() == tokens[-1:]


def test_manifest_describes_the_folder(data, tokenizer):
    manifest = load_manifest(data)
    assert manifest.documents == len(DOCUMENTS)
    assert manifest.tokens == sum(map(len, expected_tokens(tokenizer)))
    assert manifest.extra == {"a": 1}
    assert manifest.dtype == "uint16"
    assert manifest.tokenizer.read_bytes() == tokenizer.read_bytes()
    ids = [
        name
        for path in sorted(data.glob("shards/*.ids.parquet"))
        for name in pq.read_table(path)["id"].to_pylist()
    ]
    assert ids == [name for name, _ in DOCUMENTS]


def test_the_unigram_entropy_is_that_of_all_tokens(data, tokenizer):
    counts = Counter(token for tokens in expected_tokens(tokenizer) for token in tokens)
    shares = [count / sum(counts.values()) for count in counts.values()]
    expected = -sum(share * math.log(share) for share in shares)
    assert load_manifest(data).unigram_entropy == pytest.approx(expected)


def test_equal_documents_make_equal_bytes(data, tmp_path, tokenizer):
    again = tmp_path / "again"
    write_shards(iter(DOCUMENTS), tokenizer, again, tokens_per_shard=200, extra={"a": 1})
    files = sorted(path.relative_to(data) for path in data.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(again) for path in again.rglob("*") if path.is_file())
    for file in files:
        assert (again / file).read_bytes() == (data / file).read_bytes()


def test_batches_bounded_by_their_characters_give_the_same_bytes(
    data, tmp_path, tokenizer, monkeypatch
):
    monkeypatch.setattr("data_pipeline.shards.writer.CHARACTERS_PER_ENCODING", 70)
    again = tmp_path / "again"
    write_shards(DOCUMENTS, tokenizer, again, tokens_per_shard=200, extra={"a": 1})
    assert (again / "manifest.json").read_bytes() == (data / "manifest.json").read_bytes()


def test_making_shards_again_replaces_them(data):
    write_shards(DOCUMENTS[:3], data / "tokenizer.json", data, extra={})
    assert load_manifest(data).documents == 3
    assert len(list((data / "shards").iterdir())) == 3


def test_a_large_vocabulary_is_stored_in_32_bits(tmp_path, tokenizer):
    content = json.loads(tokenizer.read_text())
    content["added_tokens"].append({**content["added_tokens"][0], "id": 70_000, "content": "zz"})
    content["model"]["vocab"]["zz"] = 70_000
    large = tmp_path / "large.json"
    large.write_text(json.dumps(content))
    manifest = write_shards(DOCUMENTS, large, tmp_path / "large", extra={})
    assert (manifest.dtype, manifest.vocab_size) == ("uint32", 70_001)
    assert TokenReader(manifest).read(3, 0, 99).tolist() == expected_tokens(large)[3]


def test_damage_is_named(data):
    first, second = (data / f"shards/shard-0000{i}.tar" for i in (0, 1))
    content = bytearray(first.read_bytes())
    content[700] ^= 1
    first.write_bytes(content)
    with pytest.raises(DataError, match=r"shard-00000\.tar: damaged .* sha256 is \w{64}, the"):
        TokenReader(load_manifest(data)).read(0, 0, 1)
    second.write_bytes(second.read_bytes()[:-512])
    with pytest.raises(DataError, match=r"shard-00001\.tar: cut .* \d+ bytes, the manifest says"):
        load_manifest(data)
    second.unlink()
    with pytest.raises(DataError, match=r"shard-00001\.tar: missing"):
        load_manifest(data)


def test_another_index_or_tokenizer_is_refused(data):
    index = data / "shards/shard-00000.index.npy"
    np.save(index, np.load(index) + 2)
    with pytest.raises(DataError, match=r"index\.npy: damaged"):
        TokenReader(load_manifest(data))
    tokenizer = data / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace("<|endoftext|>", "</s>"))
    with pytest.raises(DataError, match=r"tokenizer\.json: damaged or replaced"):
        load_manifest(data)


def test_an_unfinished_or_foreign_folder_is_refused(data):
    manifest = data / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format_version": 1', '"format_version": 9'))
    with pytest.raises(DataError, match="format version 9, this farspan reads 1"):
        load_manifest(data)
    manifest.write_text('{"format_version": 1}')
    with pytest.raises(DataError, match="not a manifest of farspan shards"):
        load_manifest(data)
    manifest.unlink()
    with pytest.raises(DataError, match="no such file; name a finished folder"):
        load_manifest(data)


def test_members_carry_no_time_or_owner(data):
    with tarfile.open(data / "shards/shard-00000.tar") as tar:
        assert {(member.mtime, member.uid, member.gid) for member in tar} == {(0, 0, 0)}
