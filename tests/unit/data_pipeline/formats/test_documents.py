"""Files of texts become shards, whatever their type and however often the run is killed."""

import gzip
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from data_pipeline.errors import DataError
from data_pipeline.formats import tokenize_files, tokenizer_of
from data_pipeline.shards import load_manifest, write_shards
from data_pipeline.stream import Source, TokenStream
from data_pipeline.tokenize import load_tokenizer
from tests.ranks import ROOT
from tests.unit.data_pipeline.formats.corpus import (
    bytes_of,
    ids_of,
    make_documents,
    make_tokenizer,
    tokens_of,
    write_jsonl,
)

DOCUMENTS = make_documents(700)
# Dies as if killed from outside, after so many documents of the file.
DIE_AFTER = """
import os, sys
from pathlib import Path
from data_pipeline.formats import documents

read = documents.read_documents
def read_some(*arguments):
    for number, document in enumerate(read(*arguments)):
        if number == 600:
            os.kill(os.getpid(), 9)
        yield document

documents.read_documents = read_some
source, tokenizer, out = map(Path, sys.argv[1:])
documents.tokenize_files([source], tokenizer, out)
"""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "texts.jsonl", DOCUMENTS)


def expected(tokenizer: Path) -> list[list[int]]:
    coder = load_tokenizer(tokenizer)
    return [[*coder.encode(text), coder.eos_id] for _, text in DOCUMENTS]


def test_every_type_of_file_gives_the_same_shards(
    tmp_path: Path, source: Path, tokenizer: Path
) -> None:
    ids, texts = zip(*DOCUMENTS, strict=True)
    pq.write_table(
        pa.table({"n": range(len(ids)), "text": texts, "id": ids}),
        tmp_path / "texts.parquet",
        row_group_size=100,
    )
    (tmp_path / "texts.jsonl.gz").write_bytes(gzip.compress(source.read_bytes()))
    (tmp_path / "texts.jsonl.zst").write_bytes(zstandard.compress(source.read_bytes()))
    wanted = expected(tokenizer)
    for suffix in ("jsonl", "jsonl.gz", "jsonl.zst", "parquet"):
        out = tmp_path / f"from-{suffix}"
        made = tokenize_files([tmp_path / f"texts.{suffix}"], tokenizer, out)
        assert made.is_new
        assert tokens_of(out) == wanted
        assert ids_of(out) == list(ids)


def test_a_document_without_an_id_is_called_by_its_file_and_row(
    tmp_path: Path, tokenizer: Path
) -> None:
    for folder in ("b", "a"):
        (tmp_path / folder).mkdir()
        lines = [{"body": "one", "key": "mine"}, {"body": "two"}, {"body": "three", "key": None}]
        (tmp_path / folder / "0.jsonl").write_text("\n\n".join(map(json.dumps, lines)))
    pq.write_table(pa.table({"body": ["four"]}), tmp_path / "c.parquet")
    inputs = [tmp_path / name for name in ("b/0.jsonl", "a/0.jsonl", "c.parquet")]
    names = {"text_field": "body", "id_field": "key"}
    tokenize_files(inputs, tokenizer, tmp_path / "out", **names)
    assert ids_of(tmp_path / "out") == [
        "mine",
        "a/0.jsonl:1",
        "a/0.jsonl:2",
        "mine",
        "b/0.jsonl:1",
        "b/0.jsonl:2",
        "c.parquet:0",
    ]
    tokenize_files(inputs[::-1], tokenizer, tmp_path / "again", **names)
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "again")


def test_a_link_is_read_as_what_it_is_called(tmp_path: Path, source: Path, tokenizer: Path) -> None:
    """In the cache of the Hugging Face Hub every file is a link to one that a hash names."""
    cached = tmp_path / "cache"
    cached.mkdir()
    pq.write_table(pa.table({"text": ["four"]}), tmp_path / "texts.parquet")
    (tmp_path / "texts.jsonl.gz").write_bytes(gzip.compress(b'{"text": "two"}'))
    links = []
    for number, name in enumerate(("texts.jsonl.gz", "texts.parquet")):
        (tmp_path / name).rename(cached / f"{number}d5b")
        links.append(tmp_path / name)
        links[-1].symlink_to(cached / f"{number}d5b")
    tokenize_files(links, tokenizer, tmp_path / "out")
    assert ids_of(tmp_path / "out") == ["texts.jsonl.gz:0", "texts.parquet:0"]
    (tmp_path / "same.jsonl").symlink_to(source)
    with pytest.raises(DataError, match=r"texts\.jsonl: is named twice"):
        tokenize_files([source, tmp_path / "same.jsonl"], tokenizer, tmp_path / "twice")


def test_a_killed_run_is_repeated_to_the_same_bytes(
    tmp_path: Path, source: Path, tokenizer: Path
) -> None:
    tokenize_files([source], tokenizer, tmp_path / "undisturbed")
    out = tmp_path / "out"
    killed = subprocess.run(
        [sys.executable, "-c", DIE_AFTER, source, tokenizer, out],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL
    assert list(out.glob("shards/*.tar"))
    with pytest.raises(DataError):
        load_manifest(out)
    assert tokenize_files([source], tokenizer, out).is_new
    assert bytes_of(out) == bytes_of(tmp_path / "undisturbed")


def test_a_finished_folder_stays_as_it_is(tmp_path: Path, source: Path, tokenizer: Path) -> None:
    out = tmp_path / "out"
    tokenize_files([source], tokenizer, out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.tar")}
    assert not tokenize_files([source], tokenizer, out).is_new
    with pytest.raises(DataError, match=r"other inputs or options, text_field: text -> body"):
        tokenize_files([source], tokenizer, out, text_field="body")
    source.write_text(source.read_text() + '\n{"text": "more"}')
    with pytest.raises(DataError, match=r"other inputs or options, inputs\.texts\.jsonl\.sha256"):
        tokenize_files([source], tokenizer, out)
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*.tar")}


def test_shards_of_others_are_not_replaced(tmp_path: Path, source: Path, tokenizer: Path) -> None:
    write_shards(DOCUMENTS[:2], tokenizer, tmp_path / "mine", extra={})
    with pytest.raises(DataError, match=r"mine: holds .*choose another --out"):
        tokenize_files([source], tokenizer, tmp_path / "mine")
    assert load_manifest(tmp_path / "mine").documents == 2


def test_they_train_beside_a_crawl_of_the_same_tokenizer(
    tmp_path: Path, source: Path, tokenizer: Path
) -> None:
    write_shards(DOCUMENTS[:20], tokenizer, tmp_path / "crawl", extra={})
    like = tokenizer_of(None, tmp_path / "crawl")
    tokenize_files([source], like, tmp_path / "books")
    sources = [Source(str(tmp_path / name), 0.5) for name in ("crawl", "books")]
    assert TokenStream(sources, seq_len=16, seed=1).next_batch(4)


@pytest.mark.parametrize(
    ("tokenizer_given", "message"), [(True, "both are given"), (False, "none is given")]
)
def test_one_tokenizer_is_named(tmp_path: Path, tokenizer_given: bool, message: str) -> None:
    given = tmp_path if tokenizer_given else None
    with pytest.raises(DataError, match=message):
        tokenizer_of(given, given)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"body": "b"}', r"document 1 .*in\.jsonl has no `text`.*--text-field"),
        ('{"text": "a"}\n{"text": "b", "id": 5}', r"document 1 .* `id` must be a string, not 5"),
        ('{"text": "a"}\n{"text"', r"document 1 .*not JSON"),
        ("", r"no document in .*in\.jsonl"),
    ],
)
def test_what_is_no_document_is_named(
    tmp_path: Path, tokenizer: Path, content: str, message: str
) -> None:
    (tmp_path / "in.jsonl").write_text(content)
    with pytest.raises(DataError, match=message):
        tokenize_files([tmp_path / "in.jsonl"], tokenizer, tmp_path / "out")


def test_parquet_without_texts_is_refused(tmp_path: Path, tokenizer: Path) -> None:
    path, out = tmp_path / "in.parquet", tmp_path / "out"
    pq.write_table(pa.table({"body": ["a"], "id": [1]}), path)
    with pytest.raises(DataError, match=r"in\.parquet: no column `text` among body, id"):
        tokenize_files([path], tokenizer, out)
    with pytest.raises(DataError, match=r"in\.parquet: column `id` is int64, it must be string"):
        tokenize_files([path], tokenizer, out, text_field="body")
    pq.write_table(pa.table({"text": ["a", None]}), path)
    with pytest.raises(DataError, match=r"document 1 .*in\.parquet has no `text`"):
        tokenize_files([path], tokenizer, out)


@pytest.mark.parametrize(
    ("name", "message"),
    [("in.txt", "unknown file type; allowed are .parquet, .jsonl"), ("none.jsonl", "No such file")],
)
def test_files_that_cannot_be_read_are_refused_before_anything_is_made(
    tmp_path: Path, tokenizer: Path, name: str, message: str
) -> None:
    (tmp_path / "in.txt").write_text("text")
    with pytest.raises(DataError, match=message):
        tokenize_files([tmp_path / name], tokenizer, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_is_named_once(tmp_path: Path, source: Path, tokenizer: Path) -> None:
    with pytest.raises(DataError, match=r"texts\.jsonl: is named twice; .* larger weight"):
        tokenize_files([source, source], tokenizer, tmp_path / "out")
