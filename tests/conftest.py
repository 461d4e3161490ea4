"""What every test shares: calm threads, a small folder of token shards, and a bucket."""

import gc
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# Before torch is imported: the machine's cores are shared with the ranks that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("WANDB_MODE", "offline")
# What tests import is much and stays; to look through it for garbage takes 5 % of their time.
gc.set_threshold(10_000)


# Their tests share nothing that is slow to make.
LAYOUTS = {
    f"tests/parity/test_{name}.py"
    for name in ("any_layout", "broken_collectives", "layouts", "long_runs", "offload", "optimizer")
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Layouts last: one by one, they keep all workers busy to the end."""
    items.sort(key=lambda item: _file(item.nodeid) in LAYOUTS)


def pytest_collection_finish() -> None:
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With several workers, one of them gets all tests of a file, which may share what is slow to
    make; whichever is free gets the next layout.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = _file(nodeid)
            return nodeid if file in LAYOUTS else file

    return ByFile(config, log)


def _file(nodeid: str) -> str:
    return nodeid.partition("::")[0]


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """What is compressed holds the time of day, and workers must agree on names."""
    return argname if isinstance(val, bytes) else None


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


@pytest.fixture(scope="session")
def bucket() -> Iterator[str]:
    """The URL of a bucket, of a server on this machine that speaks S3."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (
            ("AWS_ENDPOINT_URL", f"http://{host}:{port}"),
            ("AWS_ACCESS_KEY_ID", "key"),
            ("AWS_SECRET_ACCESS_KEY", "secret"),
            ("AWS_DEFAULT_REGION", "us-east-1"),
        ):
            patch.setenv(name, value)
        boto3.client("s3").create_bucket(Bucket="runs")
        yield "s3://runs"
    server.stop()
