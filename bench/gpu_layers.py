"""The gated delta rule and the expert layer against those of transformers, forward + backward."""

import inspect
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.qwen3_next import modeling_qwen3_next

from bench.gated_delta import mended_fallback, transformers_rule
from bench.gpu_tools import Machine, print_table
from bench.peers import transformers_block
from pretrain.model.config import MoEConfig
from pretrain.model.kernels.backends import Setting, choose_rule
from pretrain.model.kernels.gated_delta import gated_delta_rule
from pretrain.model.moe import MoE


def gated_delta(machine: Machine) -> bool:
    """The rule alone, with the heads of Qwen3-Next; ours and the peer compute in float32."""
    length, heads, dim = (256, 2, 16) if machine.is_smoke else (16384, 32, 128)
    key_heads = heads // 2
    print(f"Gated delta rule, {length} tokens, {key_heads} key and {heads} value heads of {dim}.\n")
    q, k = (
        F.normalize(machine.random(1, key_heads, length, dim).detach(), dim=-1).requires_grad_()
        for _ in range(2)
    )
    v, d_out = (machine.random(1, heads, length, dim) for _ in range(2))
    g, beta = (machine.random(1, heads, length, dtype=torch.float32).detach() for _ in range(2))
    inputs = [q, k, v, (-0.1 * F.softplus(g)).requires_grad_(), beta.sigmoid().requires_grad_()]
    peer, rule = peer_rule()
    rules = {peer: transformers_rule(rule), "torch": partial(gated_delta_rule, backend="torch")}
    if choose_rule(Setting.here(machine.device, v.dtype, dim)) == "fla":
        rules["fla"] = partial(gated_delta_rule, backend="fla")
    sides = {name: partial(differentiate, rule, inputs, d_out) for name, rule in rules.items()}
    if machine.device.type == "cuda":
        sides["torch, not compiled"] = partial(uncompiled, sides["torch"])
    print_ratios(peer, machine.compare(sides), length)
    return True


def uncompiled(run: Callable[[], None]) -> None:
    with torch.compiler.set_stance("force_eager"):
        run()


def peer_rule() -> tuple[str, Callable[..., tuple[Tensor, Tensor | None]]]:
    """transformers' fallback in PyTorch, its backward made linear where we know how."""
    try:
        return "transformers, mended", mended_fallback()
    except SystemExit as error:
        print(f"not mended: {error}\n")
        shipped = modeling_qwen3_next.torch_chunk_gated_delta_rule
        return "transformers", inspect.unwrap(shipped)


def differentiate(
    rule: Callable[..., tuple[Tensor, Tensor | None]], inputs: list[Tensor], d_out: Tensor
) -> None:
    out, _ = rule(*inputs)
    torch.autograd.grad(out, inputs, d_out.to(out.dtype))


def moe(machine: Machine) -> bool:
    """A layer, its router and shared expert included, against that of transformers."""
    tokens, d_model, config = 16384, 2048, MoEConfig()
    if machine.is_smoke:
        tokens, d_model = 256, 64
        config = MoEConfig(n_experts=8, top_k=2, d_expert=32, d_shared_expert=32)
    print(
        f"Expert layer, {tokens} tokens of {d_model}, {config.n_experts} experts top-"
        f"{config.top_k} of {config.d_expert}, bf16; the peer's experts are `grouped_mm`.\n"
    )
    with machine.device:
        layer = MoE(d_model, config).bfloat16()
        for weight in layer.parameters():
            nn.init.normal_(weight, std=0.02)
        block = transformers_block(layer, d_model).bfloat16()
    x, d_out = (machine.random(1, tokens, d_model) for _ in range(2))
    layers = {"transformers": block, "farspan": lambda x: layer(x)[0]}
    seconds = machine.compare(
        {name: partial(train_layer, layer, x, d_out) for name, layer in layers.items()}
    )
    print_ratios("transformers", seconds, tokens)
    return True


def train_layer(layer: Callable[[Tensor], Tensor], x: Tensor, d_out: Tensor) -> None:
    """Gradients add up in the weights, as they do over microbatches."""
    layer(x).backward(d_out)


def print_ratios(peer: str, seconds: dict[str, float], tokens: int) -> None:
    rows = [
        [name, f"{1e3 * s:.2f}", f"{tokens / s:.3g}", f"{seconds[peer] / s:.2f}"]
        for name, s in seconds.items()
    ]
    print_table(["", "ms", "tokens/s", "ratio"], rows)
