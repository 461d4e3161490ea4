"""Our AdamW against torch's, its moments, and what a configuration may ask of it."""

from typing import Any

import pytest
import torch
from torch import nn

from pretrain import optim
from pretrain.config import OptimConfig, load_config
from pretrain.errors import UserError
from pretrain.layouts import resolve_layout
from pretrain.optim import AdamWByWeight, build_optimizer, moments, set_learning_rate

STEPS = 20
FREELY: dict[str, Any] = {"clip": None, "in_backward": True}


def trained(config: OptimConfig, steps: int = STEPS) -> tuple[nn.Module, torch.optim.AdamW]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 30), nn.SiLU(), nn.Linear(30, 10))
    optimizer = build_optimizer(model, config)
    for step in range(steps):
        set_learning_rate(optimizer, 0.01 * (step + 1) / steps)
        model(torch.randn(8, 40)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def test_with_float32_moments_it_has_the_bits_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optim, "UPDATED_AT_A_TIME", 77)
    (ours, by_weight), (torchs, at_once) = trained(OptimConfig(**FREELY)), trained(OptimConfig())
    assert isinstance(by_weight, AdamWByWeight)
    assert not isinstance(at_once, AdamWByWeight)
    for a, b in zip(ours.parameters(), torchs.parameters(), strict=True):
        assert torch.equal(a, b)
        for name in ("step", "exp_avg", "exp_avg_sq"):
            assert torch.equal(by_weight.state[a][name], at_once.state[b][name]), name


def test_moments_in_bfloat16_are_the_rounded_ones_and_training_goes_the_same_way() -> None:
    (ours, optimizer), (exact, at_once) = (
        trained(OptimConfig(state_dtype=dtype)) for dtype in ("bfloat16", "float32")
    )
    start, _ = trained(OptimConfig(), steps=0)
    for a, b, before in zip(ours.parameters(), exact.parameters(), start.parameters(), strict=True):
        assert a.dtype == torch.float32
        assert not torch.equal(a, b)
        assert (a - b).norm() <= 0.02 * (b - before).norm()
        for name in ("exp_avg", "exp_avg_sq"):
            moment, expected = optimizer.state[a][name], at_once.state[b][name]
            assert moment.dtype == torch.bfloat16
            # The roundings of some steps, each of at most 2^-9.
            assert (moment - expected).norm() <= 0.02 * expected.norm(), name


def test_one_step_rounds_once() -> None:
    (ours, optimizer), (exact, at_once) = (
        trained(OptimConfig(state_dtype=dtype), steps=1) for dtype in ("bfloat16", "float32")
    )
    for a, b in zip(ours.parameters(), exact.parameters(), strict=True):
        assert torch.equal(a, b), "the update is computed before the moments are rounded"
        assert torch.equal(moments(optimizer, a)["exp_avg"], at_once.state[b]["exp_avg"].bfloat16())


def test_a_moment_in_bfloat16_fades_with_every_beta_that_is_allowed() -> None:
    beta = 1 - 2**-8
    config = load_config(
        "tiny", ["optim.state_dtype=bfloat16", f"optim.betas=[{beta}, {beta}]"]
    ).optim
    weight = nn.Parameter(torch.zeros(512))
    optimizer = build_optimizer(nn.ParameterList([weight]), config)
    # All mantissas.
    moments(optimizer, weight)["exp_avg_sq"].copy_(torch.linspace(1, 2, 512))
    before = moments(optimizer, weight)["exp_avg_sq"].clone()
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert (moments(optimizer, weight)["exp_avg_sq"] < before).all()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["optim.in_backward=true"], ["optim.clip = 1.0", "set optim.clip=null"]),
        (
            ["optim.in_backward=true", "optim.clip=null", "parallel.pp=2"],
            ["parallel.pp = 2", "set parallel.pp=1"],
        ),
        (
            ["optim.state_dtype=bfloat16", "optim.betas=[0.9, 0.999]"],
            ["[0.9, 0.999]", "at most 0.996", "optim.state_dtype=float32"],
        ),
        (["optim.state_dtype=float16"], ["optim.state_dtype", "float16", "bfloat16"]),
    ],
)
def test_what_cannot_work_is_refused_with_the_reason(
    overrides: list[str], words: list[str]
) -> None:
    with pytest.raises(UserError) as refusal:
        load_config("tiny-hybrid-moe", overrides)
    for word in words:
        assert word in str(refusal.value)


def test_updates_in_the_backward_pass_want_one_microbatch() -> None:
    overrides = ["optim.in_backward=true", "optim.clip=null", "train.microbatch=2"]
    with pytest.raises(UserError) as refusal:
        resolve_layout(load_config("tiny-hybrid-moe", [*overrides, "train.global_batch=8"]), 2)
    for word in ("optim.in_backward", "makes 2 of them", "train.global_batch=4"):
        assert word in str(refusal.value)
    resolve_layout(load_config("tiny-hybrid-moe", [*overrides, "train.global_batch=4"]), 2)
