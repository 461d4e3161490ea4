"""A whole training step on one GPU, and the longest context that fits.

The model is spread as every run spreads it, over one rank: FSDP keeps float32 weights and computes
in bf16. A step is forward, loss, backward, clipping and AdamW.
"""

import gc
import time
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bench.gpu_tools import Machine, print_table
from parallel.apply import Parallelised, Spread, apply
from parallel.fsdp import owned_region
from parallel.gradients import clip_gradients
from parallel.mesh import Mesh
from parallel.offload import Store
from parallel.recompute import Recompute
from parallel.segments.documents import cut_rows
from parallel.segments.memory import SegmentMemory
from parallel.stage import Objective
from pretrain.balancing import RouterState
from pretrain.metrics.flops import forward_flops
from pretrain.model.config import AttentionConfig, LinearAttentionConfig, ModelConfig, MoEConfig
from pretrain.model.init import initialize
from pretrain.model.kernels.cross_entropy import chunked_cross_entropy
from pretrain.model.kernels.documents import Documents
from pretrain.model.transformer import Transformer

# One period of the pattern of Qwen3-Next, with fewer experts.
MODEL = ModelConfig(vocab_size=32768, n_layers=4, moe=MoEConfig(n_experts=64, top_k=8))
SMOKE_MODEL = ModelConfig(
    vocab_size=512,
    d_model=64,
    n_layers=4,
    attention=AttentionConfig(n_heads=4, n_kv_heads=2, head_dim=16),
    linear=LinearAttentionConfig(n_key_heads=2, n_value_heads=4, key_dim=16, value_dim=16),
    moe=MoEConfig(n_experts=8, top_k=2, d_expert=32, d_shared_expert=32),
)
LOSS_CHUNK = 4096
# With the search for the longest context.
PATIENCE_S = 30.0


def step(machine: Machine) -> bool:
    """Time steps at two lengths, with activations kept and recomputed."""
    lengths = (256,) if machine.is_smoke else (8192, 32768)
    modes: tuple[Recompute, ...] = ("none", "selective", "full")
    print(
        "Training step, AdamW included. MFU = 3 x forward FLOP of `pretrain.metrics.flops` "
        "(recomputation does not count) / seconds / peak dense bf16 FLOP/s.\n"
    )
    rows = []
    for mode in modes:
        model = Model(machine, mode)
        for length in lengths:
            try:
                rows.append([str(length), mode, *measure_step(machine, model, length)])
            except torch.OutOfMemoryError:
                rows.append([str(length), mode, "out of memory", "", "", "", ""])
                break
        del model
        gc.collect()
    header = ["tokens", "recompute", "s", "tokens/s", "TFLOP/s", "MFU", "peak GB"]
    print_table(header, rows)
    return True


def measure_step(machine: Machine, model: "Model", length: int) -> list[str]:
    """Seconds, tokens/s, TFLOP/s, MFU and peak memory."""
    take = partial(model.step, *model.batch(length))
    take()
    memory = machine.peak_gb(take)
    seconds = machine.compare({"farspan": take})["farspan"]
    flops, peak = 3 * forward_flops(model.config, length) / seconds, machine.peak_flops
    mfu = f"{flops / peak:.1%}" if peak else "unknown peak"
    rates = [f"{seconds:.3f}", f"{length / seconds:.0f}", f"{flops / 1e12:.1f}"]
    return [*rates, mfu, f"{memory:.1f}"]


def longest(machine: Machine) -> bool:
    """Double the context until memory or patience ends; memory is linear in the length."""
    print("Longest context of one sequence on one GPU, activations recomputed (`full`).\n")
    model = Model(machine, "full")
    length, stop = (128, 512) if machine.is_smoke else (16384, 1 << 30)
    model.step(*model.batch(length))  # compiles
    taken: list[tuple[int, float, float]] = []
    began, end = time.perf_counter(), f"at {stop} tokens"
    while length <= stop:
        # Four times the last is where attention alone takes all the time.
        if taken and time.perf_counter() - began + 4 * taken[-1][2] > PATIENCE_S:
            end = f"before {length} tokens, to stay within {PATIENCE_S:.0f} s"
            break
        take = partial(model.step, *model.batch(length))
        start = time.perf_counter()
        try:
            memory = machine.peak_gb(take)
        except torch.OutOfMemoryError:
            end = f"out of memory at {length} tokens"
            break
        taken.append((length, memory, time.perf_counter() - start))
        length *= 2
    rows = [[str(n), f"{memory:.1f}", f"{seconds:.2f}"] for n, memory, seconds in taken]
    print_table(["tokens", "peak GB", "s"], rows)
    print(f"It ended {end}. {extrapolate(machine, taken)}\n", flush=True)
    return bool(taken)


def extrapolate(machine: Machine, taken: list[tuple[int, float, float]]) -> str:
    """Where the line through the two longest runs meets the GPU's memory."""
    if machine.device.type != "cuda" or len(taken) < 2:
        return ""
    (n1, memory1, _), (n2, memory2, _) = taken[-2:]
    per_token = (memory2 - memory1) / (n2 - n1)
    total = torch.cuda.get_device_properties(machine.device).total_memory / 1e9
    fits = n2 + (total - memory2) / per_token
    return f"At {1e6 * per_token:.0f} kB per token, {fits:.3g} tokens would fill {total:.0f} GB."


class Model:
    """A model on one rank with its optimizer.

    Attributes:
        segment: tokens that are computed at a time, with exact gradients; None is the whole row.
        gradient_norm: of the newest step, before clipping.
    """

    gradient_norm: Tensor

    def __init__(
        self,
        machine: Machine,
        recompute: Recompute,
        config: ModelConfig = MODEL,
        segment: int | None = None,
        dtype: torch.dtype = torch.bfloat16,
        store: Store | None = None,
    ) -> None:
        self.machine, self.segment = machine, segment
        self.config = SMOKE_MODEL if machine.is_smoke else config
        join_alone(machine)
        self.mesh = Mesh.build(machine.device)
        with torch.device("meta"):
            model = Transformer(self.config)
        self.parallelised: Parallelised = apply(
            {0: model},
            OBJECTIVE,
            self.mesh,
            Spread(dtype, recompute=[recompute], store=store, in_segments=segment is not None),
            machine.device,
        )
        routers = RouterState(self.config.n_layers, self.config.moe)
        for stage in self.parallelised.stages:
            stage.to_empty(device=machine.device)
            initialize(stage.model, self.config, seed=0, region=owned_region)
            routers.copy_to(stage.model.layers)
        weights = self.parallelised.weights.parameters()
        self.optimizer = torch.optim.AdamW(weights, lr=1e-4)

    def batch(self, length: int) -> tuple[Tensor, Tensor, Any]:
        device = self.machine.device
        tokens, labels = torch.randint(self.config.vocab_size, (2, 1, length))
        documents: Any = Documents.whole_rows(1, length, device)
        if self.segment is not None:
            n_segments = length // self.segment
            cut = cut_rows(documents.lengths, n_segments, SegmentMemory(n_segments))
            documents = [segment.to(device) for segment in cut]
        return tokens.to(device), labels.to(device), documents

    def step(self, tokens: Tensor, labels: Tensor, documents: Any) -> None:
        self.parallelised.forward_backward(tokens, labels, [documents], tokens.numel())
        weights = self.parallelised.weights.named_parameters()
        n_layers = self.parallelised.stages[0].model.config.n_layers
        self.gradient_norm = clip_gradients(weights, 1.0, self.mesh.pp.size(), n_layers).whole
        self.optimizer.step()
        self.optimizer.zero_grad()


def balance(out: Any) -> Tensor:
    slots = out.expert_counts.sum(-1)
    return 1e-3 * (out.balance / slots).mean()


OBJECTIVE = Objective(
    partial(chunked_cross_entropy, chunk=LOSS_CHUNK), balance, lambda out: out.balance.detach()
)


def join_alone(machine: Machine) -> None:
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if machine.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
