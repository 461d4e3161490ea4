"""A W&B server, and the environment of an account that it knows."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.wandb_runs import home_of
from tests.wandb_server import WandbServer


@pytest.fixture
def server() -> Iterator[WandbServer]:
    with WandbServer().serving() as server:
        yield server
        assert server.unknown == []


@pytest.fixture
def home(tmp_path: Path, server: WandbServer) -> dict[str, str]:
    return home_of(tmp_path, server.url)
