import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from data_pipeline.shards import load_manifest
from launch.cli import app
from pretrain.config import load_config
from pretrain.data import open_stream, require_enough
from pretrain.errors import UserError


def settings(*sources: dict, steps: int = 20) -> list[str]:
    return [f"data.shards={json.dumps(sources)}", f"train.steps={steps}", "data.seq_len=64"]


def test_the_table_has_epochs_and_a_share_for_each_phase(shards: Path) -> None:
    web = {"path": str(shards), "name": "web", "weight": 3}
    books = {"path": str(shards), "name": "books", "upsample": {"100": 2.5}}
    curriculum = "data.curriculum=[{tokens: 4e3, weights: {books: 9}}]"
    command = ["data", "mixture", "tiny-hybrid-moe", *settings(web, books), curriculum]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    rows = [line.split() for line in result.output.splitlines()]
    size = load_manifest(shards).tokens
    # 20 steps of 8 x 64 tokens: 4000 as 3 to 1, 6240 as 3 to 9.
    assert ["web", f"{size:,}", "4,560", f"{4560 / size:.2f}", "75.0%", "25.0%"] in rows
    assert ["books", f"{size:,}", "5,680", f"{5680 / size:.2f}", "25.0%", "75.0%"] in rows


def test_a_run_longer_than_its_data_is_refused_before_it_starts(shards: Path) -> None:
    size = load_manifest(shards).tokens
    source = {"path": str(shards), "epochs": 1.5}
    fits = int(1.5 * size) // 512
    for steps in (fits, fits + 10):
        config = load_config("tiny-hybrid-moe", settings(source, steps=steps))
        if steps == fits:
            assert open_stream(config).outlook(10**9)[0].epochs == pytest.approx(1.5, abs=1e-3)
            continue
        with pytest.raises(UserError, match=rf"set train\.steps to {fits} or less"):
            require_enough(open_stream(config), config)


def test_lanes_need_data_for_all_of_their_rows_whichever_phase_has_begun_them(
    shards: Path,
) -> None:
    size = load_manifest(shards).tokens
    source = {"path": str(shards), "epochs": 1.5}
    fits = int(1.5 * size) // 512 // 4 * 4
    lanes = ["context.lane_rows=4", "phases=[{from_step: 2, optim.lr: 1e-4}]"]
    for steps in (fits, fits + 1):
        config = load_config("tiny-hybrid-moe", [*settings(source, steps=steps), *lanes])
        stream = open_stream(config)
        if steps == fits:
            require_enough(stream, config)
            for _ in range(steps):
                stream.next_batch(config.train.global_batch)
        else:
            with pytest.raises(UserError, match=r"in whole lanes take"):
                require_enough(stream, config)
