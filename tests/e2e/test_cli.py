"""The command line, from training to a model that transformers loads."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.ranks import ROOT, TIMEOUT_S

TEXT = "abc def the cab of ghij. " * 80


def farspan(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "launch.cli", *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


def succeed(*arguments: str, **environment: str) -> str:
    done = farspan(*arguments, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def refusal(*arguments: str) -> str:
    """The one message of a command that must be the user's mistake."""
    done = farspan(*arguments)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("cli") / "run"
    succeed(
        *("train", "tiny-hybrid-moe", "--run-dir", str(directory), f"data.shards={shards}"),
        *("train.steps=4", "data.seq_len=64"),
    )
    return directory


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys, launch.cli;"
        "print({'torch', 'numpy', 'pyarrow', 'daft', 'transformers', 'pydantic'} & {*sys.modules})"
    )
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True) == "set()\n"
    commands = ("demo", "data", "train", "eval", "generate", "export", "report", "audit", "config")
    listed = succeed("--help")
    assert all(command in listed for command in (*commands, "launch", "wandb"))


def test_config_prints_a_tree_that_can_be_a_recipe(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(succeed("config", "tiny", "optim.lr=0.25"))
    assert "lr: 0.25" in recipe.read_text()
    assert succeed("config", str(recipe)) == recipe.read_text()


def test_a_run_directory_holds_the_whole_run(run: Path) -> None:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["train/step"] for row in rows] == [1, 2, 3, 4]
    assert rows[-1]["train/tokens"] == 4 * 8 * 64
    assert {"train/loss", "train/grad_norm", "perf/tokens_per_s"} <= rows[0].keys()
    assert all(0 < row["perf/goodput"] < 1 for row in rows)
    spent_s = [sum([row["perf/productive_s"], *row["perf/lost_s"].values()]) for row in rows]
    began = json.loads((run / "began.json").read_text())["time"]
    assert 0 < spent_s[0] < spent_s[-1] <= (run / "done.json").stat().st_mtime - began + 0.1
    for name in ("config.yaml", "report.html", "tokenizer.json", "done.json", "checkpoints"):
        assert (run / name).exists(), name
    assert (run / "attempts" / "0001" / "rank-0.log").read_text()


def test_the_report_is_utf8_whatever_the_locale(run: Path, tmp_path: Path) -> None:
    """Some sites have `LANG=en_US`, which is Latin-1; every machine has ASCII."""
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    page = tmp_path / "report.html"
    succeed("report", str(run), "--out", str(page), **plain)
    assert "▸" in page.read_text(encoding="utf-8")


def test_an_audit_proves_what_was_trained_and_names_what_is_missing(
    run: Path, shards: Path, tmp_path: Path
) -> None:
    table = succeed("audit", str(run))
    assert f"source 0: {shards}\n" in table
    assert re.search(r"0 +2,048 +0 +\d+ +0\.\d+ +0-1 times +100\.000% +100\.000%\n", table), table
    assert "every token was used exactly as often as the mixture says" in table
    audit = json.loads(succeed("audit", str(run), "--json"))
    assert (audit["holds"], audit["steps"], audit["trained_tokens"]) == (True, 4, 2048)

    cut = tmp_path / "run"
    # The links to W&B's logs may lead nowhere.
    shutil.copytree(run, cut, ignore=shutil.ignore_patterns("wandb"))
    ledger = cut / "ledger.bin"
    ledger.write_bytes(ledger.read_bytes()[:-1])
    done = farspan("audit", str(cut))
    assert done.returncode == 1, done.stdout + done.stderr
    assert "does not hold: the newest checkpoint is that of step 4, and the ledger" in done.stdout
    ledger.write_bytes(b"x" + ledger.read_bytes()[1:])
    done = farspan("audit", str(cut))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"error: {ledger}: damaged at byte 0")


def test_processes_that_share_a_text_find_the_same_loss(run: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    # Windows of 51 tokens: two processes cannot halve them without filling them up.
    command = ("eval", str(run), "--text", str(text), "--context", "51", "--json")
    alone, shared = json.loads(succeed(*command)), json.loads(succeed(*command, "--nproc", "2"))
    assert shared["loss"] == pytest.approx(alone["loss"], rel=1e-6)
    assert shared | {"loss": 0} == alone | {"loss": 0}


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel ends the processes")
def test_processes_that_share_a_text_end_with_the_command(run: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 1000)
    command = ("eval", str(run), "--text", str(text), "--nproc", "2")
    with subprocess.Popen([sys.executable, "-m", "launch.cli", *command], cwd=ROOT) as process:
        while len(children := children_of(process.pid)) < 2:
            time.sleep(0.02)
        process.terminate()
    deadline = time.monotonic() + TIMEOUT_S
    while any(is_running(child) for child in children):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def children_of(pid: int) -> list[int]:
    of_threads = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for children in of_threads for child in children.read_text().split()]


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    # Where nobody collects orphans, what is left of one stays.
    return state != "Z"


def test_the_exported_model_has_the_same_loss_in_transformers(run: Path, tmp_path: Path) -> None:
    import transformers

    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    ours = json.loads(succeed("eval", str(run), "--text", str(text), "--json"))
    succeed("export", str(run), "--to", "hf", "--out", str(tmp_path / "hf"))

    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    ids = tokenizer(TEXT, add_special_tokens=False, return_tensors="pt").input_ids
    assert ours["tokens"] == ids.shape[1] - 1
    assert ours["context"] == 64
    total = 0.0
    with torch.no_grad():
        for start in range(0, ids.shape[1] - 1, 64):
            window = ids[:, start : start + 65]
            total += model(window, labels=window).loss.item() * (window.shape[1] - 1)
    assert ours["loss"] == pytest.approx(total / ours["tokens"], rel=1e-5)


def test_generation_continues_the_prompt_and_repeats_itself(run: Path) -> None:
    arguments = ("generate", str(run), "--prompt", "abc def", "--max-new-tokens", "8")
    sampled = (*arguments, "--temperature", "1", "--seed", "3")
    assert succeed(*arguments).startswith("abc def")
    assert succeed(*sampled) == succeed(*sampled)


def test_two_runs_that_need_the_sample_at_once_share_one(tmp_path: Path) -> None:
    code = "from launch.sample import sample_shards; print(sample_shards())"
    both = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env=os.environ | {"FARSPAN_CACHE": str(tmp_path)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=TIMEOUT_S) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0]
    assert sum("making sample shards" in errors for _, errors in outputs) == 1
    assert (Path(outputs[0][0].strip()) / "manifest.json").exists()


def test_a_dry_run_prints_a_plan_and_starts_nothing(tmp_path: Path) -> None:
    where = f"run.dir={tmp_path / 'new'}"
    plan = succeed(
        "train", "tiny", where, "--dry-run", "--ranks", "8", "--rank", "5", "parallel.tp=2"
    )
    assert "rank 5 (pp 0, dp_replicate 0, dp_shard 2, cp 0, tp 1): layers 0-3" in plan
    for line in (r"peak +[\d.]+ MiB", r"tp +reduce-scatter +\d+ +[\d.]+ MiB"):
        assert re.search(line, plan), plan
    assert not (tmp_path / "new").exists()
    assert "belongs to --dry-run" in refusal("train", "tiny", where, "--ranks", "8")
    explained = refusal("train", "tiny", where, "--explain-memory", "--ranks", "8")
    assert "on --nproc ranks; leave out" in explained


def test_mistakes_are_told_in_one_message(run: Path, shards: Path, tmp_path: Path) -> None:
    where = ("--run-dir", str(tmp_path / "new"))
    data = f"data.shards={shards}"
    assert "did you mean tiny?" in refusal("train", "tinny", *where)
    assert "no such file" in refusal("train", "tiny", *where, "data.shards=nowhere")
    assert "layout" in refusal("train", "tiny", *where, data, "--nproc", "3")
    assert "1024" in refusal("train", "tiny", *where, data, "model.vocab_size=512")
    assert "not a run directory" in refusal("eval", str(tmp_path), "--text", str(tmp_path))
    assert "not a run directory" in refusal("audit", str(tmp_path))
    assert "gone cannot be read" in refusal("eval", str(run), "--text", str(tmp_path / "gone"))
    assert "allowed: hf" in refusal("export", str(run), "--to", "gguf", "--out", str(tmp_path))
    assert not (tmp_path / "new").exists()


def test_the_demo_does_not_replace_a_folder_it_did_not_make(tmp_path: Path) -> None:
    thesis = tmp_path / "mine" / "data" / "thesis.txt"
    thesis.parent.mkdir(parents=True)
    thesis.write_text("years of work")
    assert "no demo made" in refusal("demo", "--out", str(tmp_path / "mine"))
    assert thesis.read_text() == "years of work"


def test_a_shard_with_another_hash_stops_the_run_and_is_named(shards: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(shards, damaged)
    tar = next(damaged.glob("shards/*.tar"))
    content = bytearray(tar.read_bytes())
    content[len(content) // 2] ^= 1
    tar.write_bytes(content)
    message = refusal(
        *("train", "tiny", "--run-dir", str(tmp_path / "run"), f"data.shards={damaged}"),
        "train.steps=2",
    )
    assert tar.name in message
    assert "sha256" in message


def test_deterministic_kernels_are_asked_for_in_the_configuration(
    shards: Path, tmp_path: Path
) -> None:
    settings = [f"data.shards={shards}", "train.steps=1", "train.deterministic=true"]
    done = farspan("train", "tiny", "--run-dir", str(tmp_path / "run"), *settings)
    assert done.returncode == 0, done.stderr
    assert "kernels: attention cpu_flash, gated delta rule torch, deterministic\n" in done.stdout
