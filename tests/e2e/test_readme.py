"""Every command of README and docs, run as it stands there; the demo's result is checked."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ranks import ROOT

pytestmark = pytest.mark.slow
MINUTES = 60
COMMANDS = [
    line
    for page in (
        "README.md",
        "docs/data.md",
        "docs/layouts.md",
        "docs/memory.md",
        "docs/resuming.md",
        "docs/ledger.md",
        "docs/checkpoints.md",
        "docs/evaluation.md",
        "docs/long_context.md",
        "docs/wandb.md",
        "docs/report.md",
    )
    for block in re.findall(r"```sh\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    for line in block.splitlines()
]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What each command printed, all run in one folder; `make` runs on the checkout."""
    folder = tmp_path_factory.mktemp("newcomer")
    (folder / "README.md").write_bytes((ROOT / "README.md").read_bytes())
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "DEMO_DIR": str(folder / "demo"),
        "FARSPAN_CACHE": str(folder / "cache"),
        "HF_HOME": str(folder / "hugging-face"),
    }
    outputs = {}
    for command in COMMANDS:
        if command == "make test":
            continue
        done = subprocess.run(
            command,
            shell=True,
            cwd=ROOT if command.startswith("make") else folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=20 * MINUTES,
            check=False,
        )
        assert done.returncode == 0, f"$ {command}\n{done.stdout}"
        outputs[command] = done.stdout
    return outputs


def number(name: str, text: str) -> float:
    found = re.search(rf"{re.escape(name)}\D*(?:[\d.]+ -> )?([\d.]+)", text)
    assert found, f"{name} is not in\n{text}"
    return float(found.group(1))


def test_ci_runs_the_command_that_runs_the_tests() -> None:
    assert "make test" in COMMANDS
    assert "\nmake test\n" in (ROOT / ".ci" / "run").read_text()


def test_the_demo_learns_resumes_and_exports_the_same_model(outputs: dict[str, str]) -> None:
    printed = outputs["make demo"]
    assert "was killed by signal 9" in printed
    assert number("training loss", printed) < 0.9 * number("unigram entropy", printed)
    assert number("loss on held-out text, farspan", printed) == pytest.approx(
        number("the same in transformers", printed), rel=1e-5
    )


def test_raising_the_steps_resumes(outputs: dict[str, str]) -> None:
    longer = next(output for command, output in outputs.items() if "train.steps=30" in command)
    assert "step 21/30" in longer
    assert "step 20/30" not in longer
