"""`farspan demo`: the whole path on this machine, each step a command that a user would type."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from launch.local import rank_pids
from pretrain.errors import UserError
from pretrain.metrics.sinks import read_metrics
from pretrain.run_dir import RunDirectory

PAGES = 600
ARCHIVES = 5
SEED = 1
RANKS = 2
KILL_AFTER_STEP = 15
HELD_OUT_SHARE = 0.05
EVALUATE_EVERY = 20
HELD_OUT_CHARACTERS = 100_000
# A folder with this file was made by a demo, and the next one may replace it.
MARKER = ".farspan-demo"


@dataclass(frozen=True)
class Demo:
    """What lies where in the demo's folder."""

    root: Path

    @property
    def crawl(self) -> Path:
        return self.root / "crawl"

    @property
    def data(self) -> Path:
        return self.root / "data"

    @property
    def pages(self) -> Path:
        return self.root / "pages"

    @property
    def held_out(self) -> Path:
        return self.root / "held-out.txt"

    @property
    def run(self) -> RunDirectory:
        return RunDirectory(self.root / "run")

    @property
    def export(self) -> Path:
        return self.root / "export"


def run_demo(out: Path) -> None:
    """Crawl, clean, train on two ranks, kill one, resume, evaluate, export, report.

    Raises:
        UserError: `out` holds something that the demo did not make, or a step failed.
    """
    console = Console(soft_wrap=True, highlight=False)
    began = time.monotonic()
    demo = Demo(out)
    _make_room(demo)

    _title(console, "A crawl, made on the spot from this machine's own documentation")
    archives = _make_crawl(demo, console)

    _title(console, "From web archives to token shards")
    data = ["data", "run", *archives, "--out", str(demo.data), "--recipe", "demo"]
    _farspan(console, *data, "--workers", "2", "--vocab-size", "4096")
    divide = ["data", "hold-out", str(demo.data), "--share", str(HELD_OUT_SHARE)]
    _farspan(console, *divide, "--out", str(demo.pages))
    _hold_out_text(console, demo)

    train = ["train", "demo", "--nproc", str(RANKS), "--run-dir", str(demo.run.root)]
    train += [f"data.shards={demo.pages}", f"eval.every={EVALUATE_EVERY}"]
    _title(
        console,
        f"Training on {RANKS} processes; one is killed after step {KILL_AFTER_STEP}, and the run "
        "goes on from its last checkpoint",
    )
    console.print(f"to follow it in a browser, elsewhere: farspan report {demo.run.root} --serve")
    _train_and_kill_a_rank(console, demo, train)

    _title(console, "Evaluation, generation, export")
    run = str(demo.run.root)
    evaluation = json.loads(_farspan(console, "eval", run, "--text", str(demo.held_out), "--json"))
    _farspan(console, "generate", run, "--prompt", "Return a new", "--max-new-tokens", "24")
    _farspan(console, "export", run, "--to", "hf", "--out", str(demo.export))
    loss_in_transformers = _loss_in_transformers(demo, evaluation["context"])

    _title(console, "What was made")
    console.print(_summary(demo, evaluation, loss_in_transformers))
    console.print(f"{time.monotonic() - began:.0f} seconds in all")


def _make_room(demo: Demo) -> None:
    marker = demo.root / MARKER
    if demo.root.exists():
        if any(demo.root.iterdir()) and not marker.exists():
            raise UserError(
                f"{demo.root} holds files that no demo made; name another folder with --out"
            )
        shutil.rmtree(demo.root)
    demo.root.mkdir(parents=True)
    marker.touch()


def _title(console: Console, text: str) -> None:
    console.print(f"\n[bold]{text}[/bold]")


def _make_crawl(demo: Demo, console: Console) -> list[str]:
    from data_pipeline.sample import make_sample_crawl

    report = make_sample_crawl(demo.crawl, pages=PAGES, files=ARCHIVES, seed=SEED)
    planted = ", ".join(f"{count} {kind}" for kind, count in report.planted.items())
    console.print(f"{len(report.files)} WARC files in {demo.crawl}: {planted}")
    return sorted(map(str, demo.crawl.glob("*.warc.gz")))


def _hold_out_text(console: Console, demo: Demo) -> None:
    texts_file = demo.root / "held-out.jsonl"
    export = ["data", "export", str(demo.pages / "held-out"), "--to", "jsonl"]
    _farspan(console, *export, "--out", str(texts_file))
    texts = [json.loads(line)["text"] for line in texts_file.read_text().splitlines()]
    demo.held_out.write_text("\n\n".join(texts)[:HELD_OUT_CHARACTERS])


def _command(arguments: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "launch.cli", *arguments]


def _farspan(console: Console, *arguments: str) -> str:
    """Show and run a command; what it prints is shown, and returned."""
    console.print(f"[cyan]$ farspan {shlex.join(arguments)}[/cyan]")
    with subprocess.Popen(_command(arguments), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            console.print(line, end="", markup=False)
            lines.append(line)
    if process.returncode:
        raise UserError(f"`farspan {shlex.join(arguments)}` ended with {process.returncode}")
    return "".join(lines)


def _train_and_kill_a_rank(console: Console, demo: Demo, train: Sequence[str]) -> None:
    console.print(f"[cyan]$ farspan {shlex.join(train)}[/cyan]")
    process = subprocess.Popen(_command(train))
    while _last_step(demo) < KILL_AFTER_STEP:
        if process.poll() is not None:
            raise UserError(f"training ended with {process.returncode} before it could be killed")
        time.sleep(0.05)
    victim = rank_pids(demo.run)[-1]
    console.print(f"[cyan]$ kill -9 {victim}[/cyan]   (rank {RANKS - 1})")
    os.kill(victim, signal.SIGKILL)
    if process.wait():
        raise UserError(f"training ended with {process.returncode} after a rank was killed")


def _last_step(demo: Demo) -> int:
    if not demo.run.metrics.exists():
        return 0
    return max((row["train/step"] for row in read_metrics(demo.run.metrics)), default=0)


def _loss_in_transformers(demo: Demo, context: int) -> float:
    """The loss of the exported model on the held-out text, over the windows of `farspan eval`."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(demo.export, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(demo.export)
    text = demo.held_out.read_text()
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    total = 0.0
    with torch.no_grad():
        for start in range(0, ids.shape[1] - 1, context):
            window = ids[:, start : start + context + 1]
            total += model(window, labels=window).loss.item() * (window.shape[1] - 1)
    return total / (ids.shape[1] - 1)


def _summary(demo: Demo, evaluation: dict[str, Any], loss_in_transformers: float) -> Table:
    manifest = json.loads((demo.data / "manifest.json").read_text())
    rows = list(read_metrics(demo.run.metrics))
    held_out = [loss for row in rows for loss in row.get("eval/heldout_loss", {}).values()]
    table = Table.grid(padding=(0, 2))
    for name, value in (
        ("documents kept", f"{manifest['documents']:,} of {_documents_seen(manifest):,}"),
        ("tokens", f"{manifest['tokens']:,}"),
        ("unigram entropy of the tokens", f"{manifest['unigram_entropy']:.4f} nats"),
        ("training loss", f"{rows[0]['train/loss']:.4f} -> {rows[-1]['train/loss']:.4f} nats"),
        ("held-out loss", f"{held_out[0]:.4f} -> {held_out[-1]:.4f} nats"),
        ("loss on held-out text, farspan", f"{evaluation['loss']:.6f} nats"),
        ("the same in transformers", f"{loss_in_transformers:.6f} nats"),
        ("token shards, audit", str(demo.data)),
        ("shards held out", str(demo.pages / "held-out")),
        ("run: metrics, checkpoints, logs", str(demo.run.root)),
        ("charts", str(demo.run.report)),
        ("model for transformers and vLLM", str(demo.export)),
    ):
        table.add_row(name, value)
    return table


def _documents_seen(manifest: dict[str, Any]) -> int:
    return sum(row["documents"] for row in manifest["extra"]["funnel"])
