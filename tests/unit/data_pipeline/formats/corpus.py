"""A small corpus as files, and what a folder of shards holds."""

import json
import random
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from data_pipeline.shards import TokenReader, load_manifest
from data_pipeline.tokenize import train_tokenizer

Documents = list[tuple[str, str]]


def make_documents(count: int) -> Documents:
    draw = random.Random(count)
    words = ["water", "stone", "bridge", "Öl", "日本語", "\n", "<|endoftext|>", "🜁"]
    texts = [" ".join(draw.choices(words, k=draw.randint(0, 40))) for _ in range(count)]
    return [(f"doc-{number}", text) for number, text in enumerate(texts)]


def make_tokenizer(path: Path, vocab_size: int = 300) -> Path:
    train_tokenizer([text for _, text in make_documents(50)], vocab_size, path)
    return path


def write_jsonl(path: Path, documents: Documents) -> Path:
    lines = [json.dumps({"id": name, "text": text, "n": 1}) for name, text in documents]
    path.write_text("\n".join(lines))
    return path


def ids_of(folder: Path) -> list[str]:
    files = sorted(folder.glob("shards/*.ids.parquet"))
    return [name for file in files for name in pq.read_table(file)["id"].to_pylist()]


def tokens_of(folder: Path) -> list[list[int]]:
    reader = TokenReader(load_manifest(folder))
    return [
        np.asarray(reader.read(document, 0, length)).tolist()
        for document, length in enumerate(reader.lengths.tolist())
    ]


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
