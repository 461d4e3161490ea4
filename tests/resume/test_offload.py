"""A run without room for what it offloads says so, and its checkpoint is as before."""

from pathlib import Path

import pytest

from tests.e2e.test_cli import farspan


@pytest.mark.slow
def test_a_step_without_room_is_not_taken(shards: Path, tmp_path: Path) -> None:
    run, disk = tmp_path / "run", tmp_path / "disk"
    command = (
        "train",
        "tiny-hybrid-moe",
        *("--run-dir", str(run), "--max-restarts", "0"),
        f"data.shards={shards}",
        "data.seq_len=64",
        "wandb.mode=disabled",
        "parallel.recompute=full",
    )
    offload = ("parallel.offload=disk", f"parallel.offload_dir={disk}")
    done = farspan(*command, "train.steps=1")
    assert done.returncode == 0, done.stdout + done.stderr
    checkpoint = run / "checkpoints" / "step-00000001"
    before = {path.name: path.read_bytes() for path in checkpoint.iterdir()}

    done = farspan(*command, *offload, "train.steps=2", "parallel.offload_gib=0.0001")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "error: no room to offload" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    assert {path.name: path.read_bytes() for path in checkpoint.iterdir()} == before

    done = farspan(*command, *offload, "train.steps=2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(disk.iterdir()) == []
