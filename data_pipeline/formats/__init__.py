"""Other formats of documents and tokens, into token shards and out of them."""

from data_pipeline.formats.documents import tokenize_files
from data_pipeline.formats.export import export_jsonl, export_megatron, export_parquet
from data_pipeline.formats.imports import import_megatron
from data_pipeline.formats.made import Made, tokenizer_of

__all__ = [
    "Made",
    "export_jsonl",
    "export_megatron",
    "export_parquet",
    "import_megatron",
    "tokenize_files",
    "tokenizer_of",
]
