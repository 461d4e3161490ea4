"""A training step of a small hybrid on a row of 128k tokens: two processes against one.

    python -m bench.context_parallel step

The same configuration but for `parallel.cp`, from the same weights, on the same row: loss and
gradient norm must be equal. The first of the two steps warms up; the time is the CPU time of the
second one, of two processes that of the slower. Exit code 1: they differ, or the ratio is below
what is required.
"""

import json
import os
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from bench.gated_delta import cpu_model
from bench.parallel_step import write_documents
from bench.ranks import run_on_ranks
from parallel.mesh import join_ranks
from pretrain.config import load_config
from pretrain.memory import resident_peak
from pretrain.run_dir import RunDirectory
from pretrain.trainer import Trainer

TOKENS, STEPS = 131_072, 2
MODEL = [
    "model.vocab_size=4096",
    "model.d_model=256",
    "model.n_layers=4",
    "model.layer_pattern=[linear, linear, linear, softmax]",
    "model.attention={n_heads: 2, n_kv_heads: 1, head_dim: 32}",
    "model.linear={n_key_heads: 2, n_value_heads: 4, key_dim: 64, value_dim: 64}",
    "model.moe={n_experts: 8, top_k: 2, d_expert: 128, d_shared_expert: 128}",
    f"data.seq_len={TOKENS}",
    "train.global_batch=1",
    "train.microbatch=1",
    "train.dtype=float32",
    "parallel.recompute=full",
]
REQUIRED_RATIO, TOLERANCE = 1.7, 1e-5


def main() -> int:
    print(f"{cpu_model()}; torch {torch.__version__}")
    print(
        f"{TOKENS} tokens, float32, activations recomputed, one thread per process, CPU seconds\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        shards = write_documents(Path(folder), TOKENS)
        one, two = (run(ranks, shards, Path(folder)) for ranks in (1, 2))
    seconds = [max(rank["seconds"] for rank in ranks) for ranks in (one, two)]
    ratio = seconds[0] / seconds[1]
    errors = {
        name: max(abs(rank[name] / one[0][name] - 1) for rank in two)
        for name in ("loss", "grad_norm")
    }
    print("| one process | two | ratio | required | error of loss | of gradient norm | GB each |")
    print("|---:|---:|---:|---:|---:|---:|---|")
    memory = ", ".join(f"{max(rank['peak_gb'] for rank in ranks):.1f}" for ranks in (one, two))
    print(
        f"| {seconds[0]:.1f} | {seconds[1]:.1f} | {ratio:.2f} | {REQUIRED_RATIO} | "
        f"{errors['loss']:.1e} | {errors['grad_norm']:.1e} | {memory} |"
    )
    return int(ratio < REQUIRED_RATIO or not max(errors.values()) <= TOLERANCE)


def run(ranks: int, shards: Path, folder: Path) -> list[dict[str, Any]]:
    """What each of so many processes measured."""
    if run_on_ranks(ranks, "bench.context_step", str(ranks), str(shards), str(folder)):
        sys.exit("a process failed")
    files = (folder / f"{ranks}-{rank}.json" for rank in range(ranks))
    return [json.loads(file.read_text()) for file in files]


def run_rank(ranks: str, shards: str, folder: str) -> None:

    torch.set_num_threads(1)
    device = join_ranks(timedelta(minutes=20))
    overrides = [*MODEL, f"data.shards={shards}", f"parallel.cp={ranks}", f"train.steps={STEPS}"]
    config = load_config("tiny-hybrid-moe", overrides)
    trainer = Trainer(config, RunDirectory(Path(folder) / "run"), device)
    for _ in range(STEPS):
        start = time.process_time()
        result = trainer.step(False)
        seconds = time.process_time() - start
    measured = {
        "seconds": seconds,
        "loss": result.measured.loss,
        "grad_norm": result.norms.whole,
        "peak_gb": resident_peak() / 1e9,
    }
    file = Path(folder) / f"{ranks}-{os.environ['RANK']}.json"
    file.write_text(json.dumps(measured))
    # Threads of gloo may still free tensors, and abort a process whose interpreter ends meanwhile.
    torch.distributed.barrier()
    os._exit(0)


if __name__ == "__main__":
    run_rank(*sys.argv[1:])
