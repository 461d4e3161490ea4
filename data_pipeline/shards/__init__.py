"""Token shards: WebDataset tars of token arrays, an index beside each, one manifest.

DIR/manifest.json                  written last: a folder without it is not finished
DIR/manifest.growing.json          the shards so far, while they are written; removed at the end
DIR/tokenizer.json
DIR/shards/shard-00000.tar         one .npy member per document, its tokens and end-of-document
DIR/shards/shard-00000.index.npy   int64 [2, documents]: byte offset of the tokens, their number
DIR/shards/shard-00000.ids.parquet the documents' ids, in the same order

DIR may be a folder on this machine or, to read from, one behind https:// or s3://.
"""

from data_pipeline.shards.cache import Cache
from data_pipeline.shards.loading import load_manifest
from data_pipeline.shards.manifest import Manifest, Shard
from data_pipeline.shards.reader import TokenReader
from data_pipeline.shards.writer import write_shards, write_token_shards

__all__ = [
    "Cache",
    "Manifest",
    "Shard",
    "TokenReader",
    "load_manifest",
    "write_shards",
    "write_token_shards",
]
