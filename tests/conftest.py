"""What every test shares: calm threads, and a small folder of token shards."""

import os
import random
from pathlib import Path

import pytest

# Before torch is imported: the machine's cores are shared with the ranks that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("WANDB_MODE", "offline")


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 300 documents of 5 to 400 words, made of 500 words in a skewed distribution."""
    from data_pipeline.shards import write_shards
    from data_pipeline.tokenize import train_tokenizer

    folder = tmp_path_factory.mktemp("shards")
    draw = random.Random(7)
    words = ["".join(draw.choices("abcdefghijklmnop", k=draw.randint(2, 9))) for _ in range(500)]
    weights = [1 / (rank + 1) for rank in range(len(words))]
    texts = [" ".join(draw.choices(words, weights, k=draw.randint(5, 400))) for _ in range(300)]
    tokenizer = folder / "bpe.json"
    train_tokenizer(texts, 1024, tokenizer)
    write_shards(
        ((str(number), text) for number, text in enumerate(texts)), tokenizer, folder, extra={}
    )
    return folder
