"""A whole training step on one rank, against the same weights in transformers.

    python -m bench.parallel step

A step is forward, loss, backward, clipping and AdamW; ours is `Trainer.step`, which reads its batch
too. The peer is Qwen3-Next of transformers with an export of our weights: its PyTorch gated delta
rule mended as `bench.gated_delta` says, `grouped_mm` experts, SDPA, and the same optimizer. Each
side has a process of its own, on one thread, and they take their steps in turns, on the same
batches. The times are medians of CPU time, which other work on the machine disturbs little; page
faults are part of it. The first step warms up, and has to give equal losses and gradient norms.
32k tokens take the peer 16 GB of memory. Exit code 1: a ratio is below what is required.
"""

import gc
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch.distributed.tensor import DTensor
from transformers.models.qwen3_next import modeling_qwen3_next

from bench.gated_delta import cpu_model, mended_fallback
from data_pipeline.shards import write_shards
from data_pipeline.stream import Batch
from launch.local import free_port, rank_environment
from parallel.mesh import join_ranks
from pretrain.checkpoint import hf
from pretrain.config import Config, parse_config
from pretrain.data import open_stream
from pretrain.memory import resident_peak
from pretrain.optim import build_optimizer
from pretrain.run_dir import RunDirectory
from pretrain.trainer import Trainer

VOCAB_SIZE = 4096
MODEL = {
    "vocab_size": VOCAB_SIZE,
    "d_model": 512,
    "n_layers": 4,
    "layer_pattern": ["linear", "linear", "linear", "softmax"],
    "attention": {"n_heads": 8, "n_kv_heads": 2, "head_dim": 64},
    "linear": {"n_key_heads": 4, "n_value_heads": 8, "key_dim": 64, "value_dim": 64},
    # No balance loss: transformers takes its frequencies from the step itself, we from the last.
    "moe": {"n_experts": 16, "top_k": 4, "d_expert": 128, "d_shared_expert": 128, "aux_loss": 0.0},
}
REQUIRED_RATIO = {8192: 1.2, 32768: 1.5}
REPEATS = 3

# Takes a step; returns the loss before it and the norm of the gradient.
Step = Callable[[], tuple[float, float]]


def main() -> int:
    # One thread, also where a process of ours gets its number of threads from the environment.
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    print(f"{cpu_model()}; torch {torch.__version__}, transformers {transformers.__version__}")
    print(f"float32, one thread; median of {REPEATS}, CPU seconds; peak memory in GB\n")
    print("| tokens | transformers, mended | farspan | ratio | required | memory |")
    print("|---:|---:|---:|---:|---:|---:|")
    slow = False
    for length, required in REQUIRED_RATIO.items():
        with tempfile.TemporaryDirectory() as folder:
            config = step_config(length, write_documents(Path(folder), length))
            with (
                closing(Side(farspan, config, Path(folder))) as ours,
                closing(Side(qwen3_next, config, Path(folder))) as theirs,
            ):
                seconds, memory = measure([theirs, ours])
        ratio = seconds[0] / seconds[1]
        slow |= ratio < required
        numbers = f"{seconds[0]:.1f} | {seconds[1]:.1f} | {ratio:.2f} | {required}"
        print(f"| {length} | {numbers} | {memory[0]:.1f}, {memory[1]:.1f} |", flush=True)
    return 1 if slow else 0


class Taken(NamedTuple):
    """A step: the loss before it, the gradient's norm, its CPU time, the memory so far."""

    loss: float
    grad_norm: float
    seconds: float
    peak_gb: float


class Side:
    """A process that takes a step when it is asked to."""

    def __init__(
        self, prepare: Callable[[Config, Path], Step], config: Config, folder: Path
    ) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.pipe, remote = spawn.Pipe()
        self.process = spawn.Process(target=take_steps, args=(remote, prepare, config, folder))
        self.process.start()
        remote.close()
        self.pipe.recv()

    def step(self) -> Taken:
        self.pipe.send("step")
        taken: Taken = self.pipe.recv()
        return taken

    def close(self) -> None:
        self.pipe.close()
        self.process.join()


def take_steps(
    pipe: Connection, prepare: Callable[[Config, Path], Step], config: Config, folder: Path
) -> None:
    """Prepare, say so, and take steps until the other end closes."""
    torch.set_num_threads(1)
    step = prepare(config, folder)
    pipe.send("ready")
    while True:
        try:
            pipe.recv()
        except EOFError:
            return
        gc.collect()
        start = time.process_time()
        loss, grad_norm = step()
        seconds = time.process_time() - start
        pipe.send(Taken(loss, grad_norm, seconds, resident_peak() / 1e9))


def measure(sides: list[Side]) -> tuple[list[float], list[float]]:
    """Median CPU seconds and peak memory of each side, after a step that must be the same."""
    first = [side.step()[:2] for side in sides]
    # torch's norm of a large tensor in float32 is off by 1e-5 on CPUs.
    torch.testing.assert_close(first[0], first[1], rtol=1e-4, atol=0)
    rounds = [[side.step() for side in sides] for _ in range(REPEATS)]
    by_side = list(zip(*rounds, strict=True))
    seconds = [statistics.median(step.seconds for step in steps) for steps in by_side]
    return seconds, [steps[-1].peak_gb for steps in by_side]


def farspan(config: Config, folder: Path) -> Step:
    """`Trainer.step`, and its weights before the first one as an export in `folder`."""
    os.environ |= rank_environment(0, 1, free_port())
    device = join_ranks(timedelta(minutes=1))
    trainer = Trainer(config, RunDirectory(folder / "run"), device)
    state = {
        name: weight.full_tensor() if isinstance(weight, DTensor) else weight
        for name, weight in trainer.engine.weights.state_dict().items()
    }
    tokenizer, length = trainer.stream.tokenizer, config.data.seq_len
    hf.export(config.model, state, tokenizer, folder / "export", eos_id=0, max_positions=length)

    def step() -> tuple[float, float]:
        result = trainer.step(False)
        return result.measured.loss, result.norms.whole

    return step


def qwen3_next(config: Config, folder: Path) -> Step:
    """The same in transformers, from that export."""
    modeling_qwen3_next.torch_chunk_gated_delta_rule = mended_fallback()
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "export", attn_implementation="sdpa", experts_implementation="grouped_mm"
    ).train()
    optimizer = build_optimizer(model, config.optim)
    batches = read_batches(config)

    def step() -> tuple[float, float]:
        batch = next(batches)
        tokens, labels = torch.from_numpy(batch.tokens), torch.from_numpy(batch.labels)
        loss = model(tokens, labels=labels, shift_labels=labels, use_cache=False).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item(), norm.item()

    return step


def read_batches(config: Config) -> Iterator[Batch]:
    """What the trainer reads, from its first step on."""
    stream = open_stream(config)
    while True:
        yield stream.read(stream.next_batch(1), range(1))


def step_config(length: int, shards: Path) -> Config:
    tree: dict[str, Any] = {
        "model": MODEL,
        "data": {"shards": str(shards), "seq_len": length},
        "train": {"global_batch": 1, "microbatch": 1, "dtype": "float32"},
        "schedule": {"name": "constant"},
    }
    return parse_config(tree)


def write_documents(folder: Path, length: int) -> Path:
    """Shards of one document of random words, long enough for every step."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<|endoftext|>", *(f"w{i}" for i in range(1, VOCAB_SIZE))]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "words.json"))
    text = " ".join(random.Random(0).choices(words[1:], k=length * (REPEATS + 2)))
    write_shards([("0", text)], folder / "words.json", folder, extra={})
    return folder


if __name__ == "__main__":
    sys.exit(main())
