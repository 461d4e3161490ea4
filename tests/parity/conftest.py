"""Data, ranks to train on it, and how far layouts are from one of them."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.shards import write_shards
from data_pipeline.tokenize import train_tokenizer
from tests.parity.matrix import Difference, Ranks, difference
from tests.parity.models import Setting

VOCABULARY = 508
TOLERANCE = 1e-5
STEPS = 3

Compare = Callable[..., Difference]
CompareAll = Callable[[Sequence[Setting]], dict[Setting, Difference]]


@pytest.fixture(scope="session")
def parity_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `packed`, of documents of 2 to 15 words, and `whole`, of a few endless ones."""
    folder = tmp_path_factory.mktemp("parity-shards")
    draw = random.Random(7)
    words = ["".join(draw.choices("abcdefghijklmnop", k=draw.randint(2, 9))) for _ in range(500)]
    lengths = {"packed": [draw.randint(2, 15) for _ in range(2000)], "whole": [8000] * 3}
    texts = {
        name: [" ".join(draw.choices(words, k=length)) for length in lengths[name]]
        for name in lengths
    }
    tokenizer = folder / "bpe.json"
    train_tokenizer(texts["packed"], VOCABULARY, tokenizer)
    for name in texts:
        documents = ((str(number), text) for number, text in enumerate(texts[name]))
        write_shards(documents, tokenizer, folder / name, extra={})
    return folder


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    return Ranks(tmp_path_factory.mktemp("parity"))


@pytest.fixture(scope="session")
def compare(ranks: Ranks, parity_shards: Path) -> Compare:
    """How far a setting is from one rank."""

    def compare(setting: Setting, steps: int = STEPS, breaks: str | None = None) -> Difference:
        one_rank = ranks.run(1, setting.of_one_rank(parity_shards), steps)
        overrides = setting.overrides(parity_shards)
        return difference(ranks.run(setting.ranks, overrides, steps, breaks=breaks), one_rank)

    return compare


@pytest.fixture(scope="session")
def compare_all(ranks: Ranks, parity_shards: Path) -> CompareAll:
    """How far each of settings on equally many ranks is from one rank."""

    def compare_all(settings: Sequence[Setting]) -> dict[Setting, Difference]:
        references = [setting.of_one_rank(parity_shards) for setting in settings]
        ours = [setting.overrides(parity_shards) for setting in settings]
        results = zip(
            settings,
            ranks.run_together(settings[0].ranks, ours, STEPS),
            ranks.run_together(1, references, STEPS),
            strict=True,
        )
        return {setting: difference(spread, alone) for setting, spread, alone in results}

    return compare_all


@pytest.fixture
def one_rank(ranks: Ranks, parity_shards: Path) -> dict[str, Any]:
    setting = Setting("hybrid-moe", "packed")
    return ranks.run(1, setting.of_one_rank(parity_shards), STEPS).ranks[0]
