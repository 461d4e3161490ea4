"""What the metrics of a step cost, as a share of the step: `python -m bench.metrics`.

Each part of them is run by itself on what a real step has left, on one rank and one thread, beside
whole steps: CPU seconds, medians. Fails where all of them take more than 2 % of a step.
"""

import statistics
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist

from bench.gated_delta import cpu_model
from bench.parallel_step import VOCAB_SIZE, write_documents
from parallel.gradients import add_to_parts, part_of
from parallel.stopwatch import Stopwatch
from pretrain.config import load_config
from pretrain.metrics.sinks import JsonlSink, MetricsWriter
from pretrain.metrics.step import metrics_row
from pretrain.metrics.survey import survey
from pretrain.run_dir import RunDirectory
from pretrain.token_losses import LossGroups
from pretrain.trainer import Trainer

ALLOWED_SHARE = 0.02
# Collectives of a layer and microbatch, forward and backward, where every axis is used.
WAITS_PER_LAYER = 20
STEPS, REPEATS, TOKENS = 5, 30, 512
CPU = torch.device("cpu")
MODELS = {
    "tiny-hybrid-moe": [],
    "24 layers of 64 experts": [
        "model.n_layers=24",
        "model.moe={n_experts: 64, top_k: 4, d_expert: 48, d_shared_expert: 48}",
    ],
}


def main() -> int:
    dist.init_process_group(
        "gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=timedelta(minutes=5)
    )
    torch.set_num_threads(1)
    print(f"{cpu_model()}; torch {torch.__version__}, one thread, rows of {TOKENS} tokens\n")
    print("| model | what | CPU ms | of a step |\n| --- | --- | ---: | ---: |")
    is_cheap = True
    with TemporaryDirectory() as folder:
        shards = write_documents(Path(folder), STEPS * 8 * TOKENS)
        for model, overrides in MODELS.items():
            sizes = [f"model.vocab_size={VOCAB_SIZE}", f"data.seq_len={TOKENS}"]
            seconds = measure([*sizes, f"data.shards={shards}", *overrides], Path(folder) / model)
            step = seconds.pop("a step")
            seconds["all metrics"] = sum(seconds.values())
            for what, of_part in seconds.items():
                print(f"| {model} | {what} | {1e3 * of_part:.2f} | {of_part / step:.2%} |")
            print(f"| {model} | a step | {1e3 * step:.0f} | |", flush=True)
            is_cheap &= seconds["all metrics"] <= ALLOWED_SHARE * step
    dist.destroy_process_group()
    return 0 if is_cheap else 1


def measure(overrides: list[str], run: Path) -> dict[str, float]:
    """CPU seconds of a step, and in a step of each thing that it does for a metric alone."""
    config = load_config("tiny-hybrid-moe", overrides)
    trainer = Trainer(config, RunDirectory(run), CPU)
    trainer.step(False)
    spent = []
    for _ in range(STEPS - 1):
        lr, began = trainer.lr(), time.process_time()
        result = trainer.step(False)
        spent.append(time.process_time() - began)
    run.mkdir()
    rows = JsonlSink(run / "metrics.jsonl")
    writer = MetricsWriter([rows])
    row = metrics_row(trainer, result, lr, 0.0)

    train, model = config.train, config.model
    microbatches = train.global_batch // train.microbatch
    logits = torch.randn(train.microbatch, TOKENS, model.moe.n_experts)
    probability, lse = logits.softmax(-1), logits.logsumexp(-1)
    named = list(trainer.engine.weights.named_parameters())
    weights = [weight for _, weight in named]
    squares = torch.rand(len(weights))

    def of_layers() -> None:
        parts = [part_of(name, model.n_layers) for name, _ in named]
        add_to_parts(squares, weights, parts, model.n_layers, 1)

    def entropy() -> None:
        (lse - (probability * logits).sum(-1)).sum()

    tokens = train.global_batch, TOKENS
    groups, labels, losses = LossGroups(2, TOKENS), torch.ones(tokens), torch.rand(tokens)
    source, position = torch.ones(tokens, dtype=torch.int64), torch.arange(TOKENS).expand(tokens)

    def of_groups() -> None:
        groups.split(groups.add_up(losses, labels, groups.of_tokens(source, position)))

    watch, waits = Stopwatch(), WAITS_PER_LAYER * model.n_layers * microbatches

    def of_waits() -> None:
        for _ in range(waits):
            with watch.running(CPU):
                pass
        watch.take()

    routed = model.n_layers * microbatches
    every = train.survey_every
    return {
        "a step": statistics.median(spent),
        "router entropy": routed * median_of(entropy),
        "norms of layers": median_of(of_layers),
        "loss by source and position": median_of(of_groups),
        f"clocks at {waits} waits": median_of(of_waits),
        "count of what is sent": 2 * median_of(trainer.engine.parallelised.sent_bytes),
        "the row": median_of(lambda: metrics_row(trainer, result, lr, 0.0)),
        "writing it": median_of(lambda: writer.log(row)),
        f"weights and memory, every {every} rows": median_of(lambda: survey(trainer, lr)) / every,
    }


def median_of(run: Callable[[], Any]) -> float:
    """CPU seconds, after a call to warm up."""
    run()
    spent = []
    for _ in range(REPEATS):
        began = time.process_time()
        run()
        spent.append(time.process_time() - began)
    return statistics.median(spent)


if __name__ == "__main__":
    sys.exit(main())
