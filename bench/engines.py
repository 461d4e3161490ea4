"""A training step of each engine, on the same batches from the same weights, on two CPU ranks.

    .venv-oracles/bin/python -m bench.engines

A step is `Trainer.step`: it reads its batch, runs forward and backward, clips and updates. Each
engine has ranks of its own, of one thread each, and all of them stay while they take their steps in
turns, in another order each round. All share rows out over the ranks; farspan shares out weights,
too (FSDP2), as ZeRO 3 does; megatron-core and ZeRO 1 leave them whole. CPU seconds are those of all
ranks, which other work on the machine disturbs little; wall seconds are those of the slowest rank.
Memory is the most that a rank has had resident, what its imports take included. The first step
warms up. Exit code 1: losses differ by more than 1e-4 of themselves.
"""

import gc
import math
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack, closing
from datetime import timedelta
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from bench.gated_delta import cpu_model
from data_pipeline.shards import write_shards
from launch.local import free_port, rank_environment
from pretrain.config import parse_config
from pretrain.memory import resident_peak

RANKS = 2
REPEATS = 3
TOLERANCE = 1e-4
PATIENCE_S = 60
VOCAB_SIZE = 4096
SEQ_LEN = 512
GLOBAL_BATCH = 4
DENSE = {
    "vocab_size": VOCAB_SIZE,
    "d_model": 512,
    "n_layers": 4,
    "layer_pattern": ["softmax"],
    "d_ff": 1536,
    "attention": {"n_heads": 8, "n_kv_heads": 2, "head_dim": 64},
    "moe": {"n_experts": 0},
}
MODELS: dict[str, dict[str, Any]] = {
    "hybrid MoE": DENSE
    | {
        "layer_pattern": ["linear", "linear", "linear", "softmax"],
        "linear": {"n_key_heads": 4, "n_value_heads": 8, "key_dim": 64, "value_dim": 64},
        "moe": {"n_experts": 16, "top_k": 4, "d_expert": 128, "d_shared_expert": 128},
    },
    "dense, softmax": DENSE,
}
ENGINES: dict[str, tuple[str, dict[str, Any]]] = {
    "farspan": ("native", {}),
    "megatron-core": ("megatron", {}),
    "DeepSpeed, ZeRO 1": ("deepspeed", {"zero": {"stage": 1}}),
    "DeepSpeed, ZeRO 3": ("deepspeed", {"zero": {"stage": 3}}),
}


class Taken(NamedTuple):
    """A step: the loss before it, seconds by the clock and of CPU, and the most memory so far."""

    loss: float
    wall_s: float
    cpu_s: float
    peak_gb: float


class Side:
    """Ranks that take a step when they are asked to."""

    def __init__(self, tree: dict[str, Any], run: Path) -> None:
        spawn = multiprocessing.get_context("spawn")
        port = free_port()
        self.pipes, self.ranks = [], []
        for rank in range(RANKS):
            pipe, remote = spawn.Pipe()
            environment = rank_environment(rank, RANKS, port)
            process = spawn.Process(target=take_steps, args=(remote, environment, tree, run))
            process.start()
            remote.close()
            self.pipes.append(pipe)
            self.ranks.append(process)
        for pipe in self.pipes:
            pipe.recv()

    def step(self) -> Taken:
        for pipe in self.pipes:
            pipe.send("step")
        ranks: list[Taken] = [pipe.recv() for pipe in self.pipes]
        return Taken(
            ranks[0].loss,
            max(rank.wall_s for rank in ranks),
            sum(rank.cpu_s for rank in ranks),
            max(rank.peak_gb for rank in ranks),
        )

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.close()
        for process in self.ranks:
            # One that waits for a rank that died never ends.
            process.join(PATIENCE_S)
            process.kill()


def take_steps(
    pipe: Connection, environment: dict[str, str], tree: dict[str, Any], run: Path
) -> None:
    """Prepare, say so, and take steps until the other end closes."""
    os.environ |= environment
    import torch

    from parallel.mesh import join_ranks
    from pretrain.run_dir import RunDirectory
    from pretrain.trainer import Trainer

    torch.set_num_threads(1)
    device = join_ranks(timedelta(minutes=10))
    trainer = Trainer(parse_config(tree), RunDirectory(run), device)
    pipe.send("ready")
    while True:
        try:
            pipe.recv()
        except EOFError:
            # Threads of gloo may still free tensors, and abort a process that ends meanwhile.
            os._exit(0)
        gc.collect()
        start, cpu_start = time.perf_counter(), time.process_time()
        loss = trainer.step(False).measured.loss
        wall_s, cpu_s = time.perf_counter() - start, time.process_time() - cpu_start
        pipe.send(Taken(loss, wall_s, cpu_s, resident_peak() / 1e9))


def main() -> int:
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    # Of engines that miss their kernels for GPUs.
    os.environ["PYTHONWARNINGS"] = "ignore"
    versions = (f"{name} {version(name)}" for name in ("torch", "megatron-core", "deepspeed"))
    print(f"{cpu_model()}; {', '.join(versions)}")
    rows = f"{GLOBAL_BATCH} rows of {SEQ_LEN} tokens"
    print(f"float32, {RANKS} ranks of one thread, {rows}; median of {REPEATS}; ratios to farspan\n")
    print("| model | engine | wall s | ratio | CPU s | ratio | GB of a rank | losses |")
    print("|---|---|---:|---:|---:|---:|---:|---|", flush=True)
    differ = 0.0
    with tempfile.TemporaryDirectory() as folder:
        write_documents(Path(folder))
        for model, sizes in MODELS.items():
            steps = measure(sizes, Path(folder))
            differ = max(differ, largest_difference(steps))
            report(model, steps)
    print(f"\nlargest difference of losses: {differ:.1e}, allowed {TOLERANCE:.0e}")
    return 1 if differ > TOLERANCE else 0


def measure(model: dict[str, Any], folder: Path) -> dict[str, list[Taken]]:
    """Steps of each engine, the first of which warms up."""
    with ExitStack() as stack:
        sides = {
            name: stack.enter_context(
                closing(Side(settings(model, engine, parallel, folder), folder / name))
            )
            for name, (engine, parallel) in ENGINES.items()
        }
        steps: dict[str, list[Taken]] = {name: [] for name in sides}
        order = list(sides)
        for _ in range(1 + REPEATS):
            for name in order:
                steps[name].append(sides[name].step())
            order = order[1:] + order[:1]
    return steps


def settings(
    model: dict[str, Any], engine: str, parallel: dict[str, Any], shards: Path
) -> dict[str, Any]:
    return {
        "model": model,
        "data": {"shards": str(shards), "seq_len": SEQ_LEN},
        "train": {
            "engine": engine,
            "global_batch": GLOBAL_BATCH,
            "microbatch": 1,
            "dtype": "float32",
        },
        "parallel": parallel,
        "schedule": {"name": "constant"},
    }


def largest_difference(steps: dict[str, list[Taken]]) -> float:
    """Of a loss from that of farspan, relative; infinite where one is not finite."""
    ours = [step.loss for step in steps["farspan"]]
    found = [
        abs(step.loss - loss) / loss
        for taken in steps.values()
        for step, loss in zip(taken, ours, strict=True)
    ]
    # No comparison with a NaN would find it.
    return max(found) if all(map(math.isfinite, found)) else math.inf


def report(model: str, steps: dict[str, list[Taken]]) -> None:
    medians = {
        name: [statistics.median(step[i] for step in taken[1:]) for i in (1, 2)]
        for name, taken in steps.items()
    }
    wall_of_ours, cpu_of_ours = medians["farspan"]
    for name, taken in steps.items():
        wall_s, cpu_s = medians[name]
        times = f"{wall_s:.2f} | {wall_s / wall_of_ours:.2f} | {cpu_s:.2f} | "
        times += f"{cpu_s / cpu_of_ours:.2f} | {taken[-1].peak_gb:.2f}"
        losses = " ".join(f"{step.loss:.5f}" for step in taken)
        print(f"| {model} | {name} | {times} | {losses} |", flush=True)


def write_documents(folder: Path) -> None:
    """Shards of documents of random words, enough for every step."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<|endoftext|>", *(f"w{i}" for i in range(1, VOCAB_SIZE))]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "words.json"))
    draw = random.Random(0)
    tokens = SEQ_LEN * GLOBAL_BATCH * (REPEATS + 2)
    documents = [
        (str(number), " ".join(draw.choices(words[1:], k=draw.randint(20, 400))))
        for number in range(tokens // 200)
    ]
    write_shards(documents, folder / "words.json", folder, extra={})


if __name__ == "__main__":
    sys.exit(main())
