"""No text or token is lost on the way through another format and back."""

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.formats import export_jsonl, export_megatron, import_megatron, tokenize_files
from data_pipeline.shards import TokenReader, load_manifest
from data_pipeline.tokenize import train_tokenizer

TEXTS = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=60), min_size=1)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(["some words of a text", "other words", "and \n lines"], 290, path)
    return path


def tokens_of(folder: Path) -> list[list[int]]:
    reader = TokenReader(load_manifest(folder))
    return [
        reader.read(document, 0, length).tolist()
        for document, length in enumerate(reader.lengths.tolist())
    ]


@settings(max_examples=25, deadline=None)
@given(texts=TEXTS, append_eod=st.booleans())
def test_texts_and_tokens_come_back(tokenizer: Path, texts: list[str], append_eod: bool) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lines = [json.dumps({"id": str(n), "text": text}) for n, text in enumerate(texts)]
        (folder / "in.jsonl").write_text("\n".join(lines))
        tokenize_files([folder / "in.jsonl"], tokenizer, folder / "shards")

        export_jsonl(folder / "shards", folder / "out.jsonl")
        with (folder / "out.jsonl").open() as file:
            assert [json.loads(line)["text"] for line in file] == texts

        if any(texts) or append_eod:
            export_megatron(folder / "shards", folder / "data", append_eod=append_eod)
            import_megatron([folder / "data"], tokenizer, folder / "back")
            assert tokens_of(folder / "back") == tokens_of(folder / "shards")
