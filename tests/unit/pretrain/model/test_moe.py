from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.model.config import MoEConfig
from pretrain.model.moe import MoE

D_MODEL = 16


def make_moe(**settings: Any) -> MoE:
    torch.manual_seed(0)
    moe = MoE(D_MODEL, MoEConfig(**{"n_experts": 6, "top_k": 2, "d_expert": 8} | settings))
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return moe


def token_by_token(moe: MoE, x: Tensor) -> Tensor:
    """The definition of a mixture of experts, in float64."""
    moe = make_moe_like(moe)
    out = []
    for token in x.double().flatten(0, 1):
        probability = (moe.router.weight @ token).softmax(0)
        chosen = probability.sort(descending=True).indices[: moe.config.top_k]
        total = probability[chosen].sum() if moe.config.renormalise_top_k else 1.0
        y = torch.zeros_like(token)
        for e in chosen.tolist():
            gate, up = (moe.experts.gate_up[e] @ token).chunk(2)
            y = y + probability[e] / total * (moe.experts.down[e] @ (F.silu(gate) * up))
        if moe.shared_expert is not None and moe.shared_gate is not None:
            y = y + torch.sigmoid(moe.shared_gate(token)) * moe.shared_expert(token)
        out.append(y)
    return torch.stack(out).view(x.shape)


def make_moe_like(moe: MoE) -> MoE:
    shared = 0 if moe.shared_expert is None else moe.shared_expert.up.out_features
    copy = make_moe(
        top_k=moe.config.top_k,
        renormalise_top_k=moe.config.renormalise_top_k,
        d_shared_expert=shared,
    )
    copy.load_state_dict(moe.state_dict())
    return copy.double()


@pytest.mark.parametrize(
    "settings",
    [
        {"d_shared_expert": 0, "renormalise_top_k": False},
        {"d_shared_expert": 12, "renormalise_top_k": True},
        {"d_shared_expert": 12, "top_k": 6},
    ],
)
def test_moe_matches_its_definition(settings: dict[str, Any]) -> None:
    moe = make_moe(**settings)
    x = torch.randn(2, 7, D_MODEL)
    torch.testing.assert_close(moe(x)[0].double(), token_by_token(moe, x), rtol=1e-4, atol=1e-5)


def frequencies_of(moe: MoE, chosen: Tensor) -> Tensor:
    return torch.bincount(chosen.flatten(), minlength=moe.config.n_experts) / chosen.numel()


def test_routing_reports_every_slot_and_the_sums_of_the_losses() -> None:
    moe = make_moe(d_shared_expert=0)
    moe.frequencies.copy_(torch.rand(6).softmax(-1))
    x = torch.randn(2, 7, D_MODEL)
    routing = moe(x)[1]

    logits = x @ moe.router.weight.T
    chosen = logits.topk(2).indices.flatten()
    assert routing.counts.tolist() == [int((chosen == e).sum()) for e in range(6)]
    mean_probability = logits.softmax(-1).flatten(0, 1).mean(0)
    balance = 6 * (moe.frequencies * mean_probability).sum()
    torch.testing.assert_close(routing.balance / 14, balance)
    torch.testing.assert_close(routing.z / 14, logits.exp().sum(-1).log().square().mean())
    for loss in (routing.balance, routing.z):
        (gradient,) = torch.autograd.grad(loss, moe.router.weight, retain_graph=True)
        assert gradient.abs().sum() > 0


def test_the_sequence_balance_loss_takes_the_frequencies_of_each_row() -> None:
    moe = make_moe(d_shared_expert=0, balance="sequence")
    x = torch.randn(3, 7, D_MODEL)
    balance = moe(x)[1].balance

    rows = []
    for row in x:
        probability = (row @ moe.router.weight.T).softmax(-1)
        frequencies = frequencies_of(moe, probability.topk(2).indices)
        rows.append(6 * (frequencies * probability.mean(0)).sum())
    torch.testing.assert_close(balance / 21, torch.stack(rows).mean())


def test_the_selection_bias_chooses_and_does_not_weigh() -> None:
    moe = make_moe(d_shared_expert=0, balance="bias", renormalise_top_k=False, top_k=1)
    x = torch.randn(2, 7, D_MODEL)
    moe.selection_bias[4] = 1.5
    out, routing = moe(x)

    assert routing.counts.tolist() == [0, 0, 0, 0, 14, 0]
    probability = (x @ moe.router.weight.T).softmax(-1)[..., 4:5]
    gate, up = (x @ moe.experts.gate_up[4].T).chunk(2, dim=-1)
    torch.testing.assert_close(out, probability * ((F.silu(gate) * up) @ moe.experts.down[4].T))


def test_routing_is_in_fp32_under_bf16_weights() -> None:
    moe = make_moe(d_shared_expert=0).bfloat16()
    x = torch.randn(2, 200, D_MODEL, dtype=torch.bfloat16)
    out, routing = moe(x)

    logits = x.flatten(0, 1).double() @ moe.router.weight.double().T
    assert out.dtype == torch.bfloat16
    assert routing.balance.dtype == routing.z.dtype == torch.float32
    z = logits.logsumexp(-1).square().sum()
    torch.testing.assert_close(routing.z.double(), z, rtol=1e-6, atol=0)
    assert torch.equal(routing.counts, torch.bincount(logits.topk(2).indices.flatten(), None, 6))


def test_gradients_are_bitwise_reproducible_with_threads() -> None:
    moe = make_moe(d_shared_expert=0, top_k=4)
    x = torch.randn(8, 256, D_MODEL)

    def gradients() -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        (moe(leaf)[0] * x).sum().backward()
        grads = [leaf.grad, *(parameter.grad for parameter in moe.parameters())]
        moe.zero_grad()
        return [grad for grad in grads if grad is not None]

    first = gradients()
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, gradients(), strict=True))


def test_an_expert_over_capacity_serves_the_first_tokens_of_each_row() -> None:
    moe = make_moe(d_shared_expert=0, capacity_factor=0.75, top_k=1)
    x = torch.randn(2, 8, D_MODEL)
    out, routing = moe(x)
    whole = moe.eval()(x)[0]

    chosen = (x @ moe.router.weight.T).argmax(-1)
    over = torch.zeros(2, 8, dtype=torch.bool)
    for row in range(2):
        for e in range(6):
            over[row, (chosen[row] == e).nonzero().flatten()[1:]] = True
    assert routing.dropped == over.sum() > 0
    assert routing.counts.sum() == 16
    torch.testing.assert_close(out, whole.masked_fill(over[..., None], 0.0))
