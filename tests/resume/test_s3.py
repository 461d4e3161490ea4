"""A run whose checkpoints lie in an object store."""

from pathlib import Path

import pytest

from pretrain.checkpoint.store import check_alone, checkpoint_in, saved_steps
from pretrain.checkpoint.target import Target
from tests.e2e.test_cli import TEXT, farspan, succeed


@pytest.mark.slow
def test_it_resumes_evaluates_and_falls_back_from_s3(
    shards: Path, tmp_path: Path, bucket: str
) -> None:
    run, text = tmp_path / "run", tmp_path / "text.txt"
    text.write_text(TEXT)
    checkpoints = Target(f"{bucket}/tiny")
    train = (
        *("train", "tiny-hybrid-moe", "--nproc", "2", "--run-dir", str(run)),
        *(f"data.shards={shards}", f"checkpoint.dir={checkpoints}", "checkpoint.every=2"),
        *("data.seq_len=64", "schedule.name=constant", "wandb.mode=disabled"),
    )
    succeed(*train, "train.steps=5")
    assert saved_steps(checkpoints) == [4, 5]
    assert not (run / "checkpoints").exists()

    newest = checkpoint_in(checkpoints, 5)
    file = newest / sorted(check_alone(newest).files)[0]
    content = bytearray(file.read())
    content[-1] ^= 1
    file.commit(bytes(content), lambda: None)
    told = succeed(*train, "train.steps=6", "checkpoint.asynchronous=false")
    assert f"the checkpoint of step 5 is damaged: {file} has another sha256" in told
    assert saved_steps(checkpoints) == [4, 6]
    assert "nats per token" in succeed("eval", str(run), "--text", str(text))
    assert "exactly as often" in succeed("audit", str(run))

    elsewhere = ("checkpoint.dir=gs3://nowhere/x", "--allow-change", "checkpoint.dir")
    refused = farspan(*train, "train.steps=7", *elsewhere)
    assert refused.returncode == 2, refused.stdout + refused.stderr
    assert "gs3://nowhere/x is on no file system that is known" in refused.stdout + refused.stderr

    checkpoints.remove()
    refused = farspan(*train, "train.steps=7")
    assert refused.returncode == 2, refused.stdout + refused.stderr
    assert (
        f"no checkpoint in {checkpoints}, but the run has saved step 6"
        in refused.stdout + refused.stderr
    )
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 6
