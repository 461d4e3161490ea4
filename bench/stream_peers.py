"""What other projects make of the documents of `bench.stream`; prints tokens and CPU seconds.

    PYTHON bench/stream_peers.py webdataset|mosaicml|megatron FOLDER ROWS SEQ_LEN

FOLDER has shards/*.tar of .npy members, and tokens.npy and lengths.npy of the same documents. A row
ends in tokens and labels, int64; what is measured begins with the second row.
"""

import sys
import time
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np


def main(peer: str, folder: Path, rows: int, seq_len: int) -> None:
    peers = {"webdataset": webdataset, "mosaicml": mosaicml, "megatron": megatron}
    made = peers[peer](folder, seq_len)
    next(made)
    began = time.process_time()
    size = sum(row.size for row in islice(made, rows))
    print(size, time.process_time() - began)


def webdataset(folder: Path, seq_len: int) -> Iterator[np.ndarray]:
    """Documents of shuffled shards, through a buffer of 1000, laid end to end."""
    import webdataset as wds

    tars = sorted(map(str, folder.glob("shards/*.tar")))
    documents = wds.WebDataset(tars, shardshuffle=len(tars), seed=0).shuffle(1000).decode()
    return laid_end_to_end((document["npy"] for document in documents), seq_len)


def mosaicml(folder: Path, seq_len: int) -> Iterator[np.ndarray]:
    """StreamingDataset over its own shards, shuffled as it does by default, laid end to end."""
    from streaming import MDSWriter, StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    clean_stale_shared_memory()
    tokens, lengths = np.load(folder / "tokens.npy"), np.load(folder / "lengths.npy")
    out = str(folder / "mosaicml")
    with MDSWriter(out=out, columns={"tokens": "ndarray:uint16"}, exist_ok=True) as writer:
        for document in np.split(tokens, np.cumsum(lengths)[:-1]):
            writer.write({"tokens": document})
    documents = StreamingDataset(local=out, shuffle=True, shuffle_seed=0, batch_size=1)
    return laid_end_to_end((document["tokens"] for document in documents), seq_len)


def laid_end_to_end(documents: Iterable[np.ndarray], seq_len: int) -> Iterator[np.ndarray]:
    rest = np.empty(0, np.int64)
    for document in documents:
        rest = np.concatenate([rest, document])
        while len(rest) > seq_len:
            tokens, labels = rest[:seq_len], rest[1 : seq_len + 1].copy()
            labels[tokens == 0] = -100
            yield tokens
            rest = rest[seq_len:]


def megatron(folder: Path, seq_len: int) -> Iterator[np.ndarray]:
    """GPTDataset over its own file format, with positions that begin anew in each document."""
    import torch
    import torch.distributed as dist
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    prefix, documents = str(folder / "megatron"), np.load(folder / "tokens.npy")
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    lengths = np.load(folder / "lengths.npy")
    for document in np.split(documents, np.cumsum(lengths)[:-1]):
        builder.add_document(torch.from_numpy(document), [len(document)])
    builder.finalize(f"{prefix}.idx")
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    config = GPTDatasetConfig(
        random_seed=0,
        sequence_length=seq_len,
        blend=([prefix], None),
        split="1,0,0",
        path_to_cache=str(folder / "cache"),
        tokenizer=_Tokenizer(),
        reset_position_ids=True,
        reset_attention_mask=False,
        eod_mask_loss=True,
        create_attention_mask=False,
    )
    samples = int(lengths.sum()) // seq_len
    dataset, *_ = BlendedMegatronDatasetBuilder(
        GPTDataset, [samples, None, None], lambda: True, config
    ).build()
    for number in range(len(dataset)):
        yield dataset[number]["tokens"].numpy()


class _Tokenizer:
    eod = 0
    vocab_size = 4096
    unique_identifiers = "none"


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:]))
