"""The models of docs/megatron.md, on ranks that share rows or heads, and on ranks that do not."""

import re
from collections.abc import Iterator
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.transformer import TransformerConfig
from megatron.core.utils import get_batch_on_this_cp_rank
from torch import Tensor, nn

from pretrain.config import Config
from pretrain.engines.megatron import GatedDeltaNet
from pretrain.engines.megatron.cpu import on_any_device
from pretrain.model.kernels.documents import Documents
from tests.oracle.cases import run_cases
from tests.ranks import ROOT

VOCABULARY, TOKENS = 64, 48
ROWS = [[13, 20, 15], [48]]


def documented() -> dict[str, Any]:
    """What the documentation's Python defines."""
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs/megatron.md").read_text(), re.S):
        exec(block, names)
    return names


def theirs(ranks: int, tp: int = 1) -> TransformerConfig:
    return TransformerConfig(
        num_layers=4,
        hidden_size=32,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=16,
        normalization="RMSNorm",
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=F.silu,
        hidden_dropout=0,
        attention_dropout=0,
        context_parallel_size=ranks,
        tensor_model_parallel_size=tp,
        sequence_parallel=tp > 1,
        use_cpu_initialization=True,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
    )


def loss_and_gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """Summed over the ranks that share rows."""
    group = parallel_state.get_context_parallel_group()
    loss.backward()
    found = {name: weight.grad for name, weight in model.named_parameters()}
    found["loss"] = loss.detach()
    for tensor in found.values():
        torch.distributed.all_reduce(tensor, group=group)
    return found


def documents_of(batch: dict[str, Tensor]) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Each document as a row of its own, with its positions."""
    for row, lengths in enumerate(ROWS):
        for end, length in zip(accumulate(lengths), lengths, strict=True):
            mine = (slice(row, row + 1), slice(end - length, end))
            yield {name: x[mine] for name, x in batch.items()}, torch.arange(length)[None]


def first_weights() -> dict[str, Any]:
    """Of a gated delta net whose heads two ranks share, on each of them."""
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    torch.manual_seed(1)
    layer = GatedDeltaNet(theirs(1, tp=2), layer_number=1)
    mine: dict[str, Any] = dict(layer.named_parameters())
    of_ranks: list[Any] = [None] * 2
    torch.distributed.all_gather_object(of_ranks, mine)
    parallel_state.destroy_model_parallel()
    # A generator that differs among the ranks would spoil the layers after it.
    draws: list[Any] = [None] * 2
    torch.distributed.all_gather_object(draws, torch.rand(3))
    return {"of_ranks": of_ranks, "draws_afterwards": draws}


def run_case(name: str, _: Config, __: torch.device) -> dict[str, Any]:
    if name == "first-weights":
        return first_weights()
    ranks = 2 if "cp2" in name else 1
    parallel_state.initialize_model_parallel(context_parallel_size=ranks)
    docs = documented()
    torch.manual_seed(1)
    build = docs["build_hybrid_model" if "hybrid" in name else "build_model"]
    model = build(theirs(ranks), VOCABULARY, TOKENS)
    tokens = torch.randint(VOCABULARY, (2, TOKENS + 1))
    batch = {"tokens": tokens[:, :-1], "labels": tokens[:, 1:]}
    if "whole" in name:
        mine = get_batch_on_this_cp_rank(batch)
        loss = model(mine["tokens"], None, None, labels=mine["labels"]).sum()
    elif "packed" in name:
        position = Documents.from_lengths(ROWS).position
        loss = docs["losses_of"](model, batch, position)[0].sum()
    else:
        loss = sum(docs["losses_of"](model, *alone)[0].sum() for alone in documents_of(batch))
    found = loss_and_gradients(model, loss)
    parallel_state.destroy_model_parallel()
    return found


if __name__ == "__main__":
    with on_any_device():
        run_cases(run_case)
