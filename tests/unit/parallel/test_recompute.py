"""Recompute trades memory for time and changes no bit of a gradient."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from parallel.recompute import Recompute, recompute_layers
from pretrain.model.config import AttentionConfig, LinearAttentionConfig, ModelConfig, MoEConfig
from pretrain.model.init import initialize
from pretrain.model.kernels.documents import Documents
from pretrain.model.transformer import Transformer

CONFIG = ModelConfig(
    vocab_size=50,
    d_model=64,
    n_layers=4,
    layer_pattern=("linear", "softmax"),
    attention=AttentionConfig(4, 2, 16),
    linear=LinearAttentionConfig(2, 4, 16, 16),
    moe=MoEConfig(n_experts=4, top_k=2, d_expert=32, d_shared_expert=32),
    init_std=0.1,
)
DOCUMENTS = Documents.from_lengths([[30, 66], [96]])
N_DOCUMENTS = 3
SCAN = torch.ops.farspan.gated_delta_scan.default
ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
EXPENSIVE = [
    torch.ops.aten.mm.default,
    torch.ops.farspan.looped_mixture.default,
    ATTENTION,
    SCAN,
]


class Operations(TorchDispatchMode):
    """Counts operations, and the bytes of their results that are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[Any] = Counter()
        self.results: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls[func] += 1
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                self.results[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return result

    def live_bytes(self, except_for: Sequence[Tensor]) -> int:
        known = {x.untyped_storage()._cdata for x in except_for}
        return sum(
            nbytes
            for address, (storage, nbytes) in self.results.items()
            if address not in known and not storage.expired()
        )


class Trained(NamedTuple):
    """A step's gradients, its activations after forward, and the operations of its backward."""

    gradients: dict[str, Tensor]
    activation_bytes: int
    backward: Counter[Any]


def train(*modes: Recompute, numbers: str = "0123") -> Trained:
    model = Transformer(CONFIG)
    initialize(model, CONFIG, seed=0)
    recompute_layers({number: model.layers[number] for number in numbers}, modes)
    tokens = torch.randint(50, (2, 96), generator=torch.Generator().manual_seed(0))
    with Operations() as forward:
        out = model(tokens, DOCUMENTS, lambda hidden, _: hidden)
    weights = [*model.parameters(), tokens, DOCUMENTS.position]
    activation_bytes = forward.live_bytes(except_for=weights)
    with Operations() as backward:
        (out.value.square().mean() + out.balance.sum() + out.z.sum()).backward()
    gradients = {name: w.grad for name, w in model.named_parameters() if w.grad is not None}
    return Trained(gradients, activation_bytes, backward.calls)


@pytest.fixture(scope="module")
def kept() -> Trained:
    return train("none")


@pytest.mark.parametrize("modes", [["selective"], ["full"], ["none", "full", "selective"]])
def test_gradients_do_not_change_by_a_bit(modes: list[Recompute], kept: Trained) -> None:
    gradients = train(*modes).gradients
    assert gradients.keys() == kept.gradients.keys()
    assert all(torch.equal(gradients[name], kept.gradients[name]) for name in gradients)


def test_memory_falls_from_none_to_selective_to_full(kept: Trained) -> None:
    selective, full = train("selective").activation_bytes, train("full").activation_bytes
    assert selective < 0.7 * kept.activation_bytes
    assert full < 0.25 * selective


def test_selective_repeats_only_what_is_cheap(kept: Trained) -> None:
    selective, full = train("selective").backward, train("full").backward
    for operation in EXPENSIVE:
        assert selective[operation] == kept.backward[operation], operation
        assert full[operation] > kept.backward[operation], operation
    silu = torch.ops.aten.silu.default
    assert selective[silu] == full[silu] > kept.backward[silu]


def test_modes_repeat_over_the_layers_by_their_number_in_the_whole_model() -> None:
    def recomputed(*modes: Recompute, numbers: str = "0123") -> tuple[int, int]:
        calls = train(*modes, numbers=numbers).backward
        return calls[SCAN], calls[ATTENTION] // N_DOCUMENTS

    assert recomputed("full", "none") == (2, 0)
    assert recomputed("none", "full") == (0, 2)
    assert recomputed("none", "none", "none", "full", numbers="3") == (0, 1)


def test_a_recomputed_region_can_go_backward_twice() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.SiLU(), nn.Linear(32, 32))
    recompute_layers({"0": model}, ["selective"])
    loss = model(torch.ones(4, 32)).sum()
    once = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    again = torch.autograd.grad(loss, list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
