"""What an engine cannot do ends a command before any process starts, with what to do."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.test_cli import farspan
from tests.ranks import ROOT, TIMEOUT_S

# As on a machine where the extras are not installed, also where they are.
NOT_INSTALLED = """
import importlib.metadata as metadata
found = metadata.version
def version(package):
    if package in ("megatron-core", "deepspeed"):
        raise metadata.PackageNotFoundError(package)
    return found(package)
metadata.version = version
from launch.cli import main
main()
"""


@pytest.mark.parametrize(
    ("engine", "package"), [("megatron", "megatron-core"), ("deepspeed", "deepspeed")]
)
def test_an_engine_that_is_not_installed_says_what_to_install(
    engine: str, package: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    asked = ("train", "tiny-hybrid-moe", "--run-dir", str(run), f"train.engine={engine}")
    done = subprocess.run(
        [sys.executable, "-c", NOT_INSTALLED, *asked],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr == f"error: {package} is not installed; pip install 'farspan[{engine}]'\n"
    assert not run.exists()


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("engine", "settings", "told"),
    [
        (
            "megatron",
            ("model.moe.balance=bias", "context.segments=2"),
            ("model.moe.balance = bias", "context.segments"),
        ),
        ("deepspeed", ("parallel.tp=2", "parallel.offload=host"), ("parallel.tp", "offload")),
    ],
)
def test_what_an_engine_cannot_do_is_refused_all_at_once(
    engine: str, settings: tuple[str, ...], told: tuple[str, ...], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    recompute = "parallel.recompute=full"
    asked = ("train", "tiny-hybrid-moe", "--nproc", "2", "--run-dir", str(run), recompute)
    done = farspan(*asked, f"train.engine={engine}", *settings)
    assert done.returncode == 2, done.stdout + done.stderr
    problems = [line for line in done.stderr.splitlines() if line.startswith("- ")]
    assert len(problems) == len(told)
    for problem, setting in zip(problems, told, strict=True):
        assert setting in problem
    assert "The native engine can" in done.stderr
    assert not run.exists()
