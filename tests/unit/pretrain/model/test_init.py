import math

import pytest
import torch
from torch import Tensor

from pretrain.model.config import AttentionConfig, LinearAttentionConfig, ModelConfig, MoEConfig
from pretrain.model.init import initial_values, initialize, whole
from pretrain.model.transformer import Transformer

CONFIG = ModelConfig(
    vocab_size=50,
    d_model=32,
    n_layers=2,
    layer_pattern=("linear", "softmax"),
    attention=AttentionConfig(2, 2, 16),
    linear=LinearAttentionConfig(2, 2, 8, 8),
    moe=MoEConfig(4, 2, 16, 16),
)
Q_PROJ = "layers.1.attention.q_proj.weight"


def values(name: str, *shape: int, seed: int = 0) -> Tensor:
    return initial_values(name, shape, tuple(slice(0, size) for size in shape), CONFIG, seed)


def test_linear_layers_are_normal() -> None:
    z = values(Q_PROJ, 2000, 1000).double() / CONFIG.init_std

    standard_error = z.numel() ** -0.5
    assert abs(z.mean()) < 4 * standard_error
    assert abs(z.square().mean() - 1) < 4 * math.sqrt(2) * standard_error
    assert abs(z.pow(3).mean()) < 4 * math.sqrt(15) * standard_error
    assert abs(z.pow(4).mean() - 3) < 4 * math.sqrt(96) * standard_error
    assert 4.5 < z.abs().max() < 7


def test_neighbours_names_and_seeds_are_uncorrelated() -> None:
    base = values(Q_PROJ, 1000, 1000)
    others = {
        "next column": base.roll(1, dims=1),
        "next row": base.roll(1, dims=0),
        "another name": values("layers.3.attention.q_proj.weight", 1000, 1000),
        "another seed": values(Q_PROJ, 1000, 1000, seed=1),
    }
    for what, other in others.items():
        correlation = torch.corrcoef(torch.stack([base.flatten(), other.flatten()]))[0, 1]
        assert abs(correlation) < 4e-3, what


@pytest.mark.parametrize(
    "region",
    [
        (slice(3, 7), slice(0, 11), slice(2, 5)),
        (slice(None), slice(9, 10), slice(None)),
        (slice(4, 4), slice(None), slice(None)),
    ],
)
def test_a_region_is_a_slice_of_the_whole(region: tuple[slice, ...]) -> None:
    name, shape = "layers.0.moe.experts.gate_up", (8, 11, 6)
    assert torch.equal(initial_values(name, shape, region, CONFIG, 0), values(name, *shape)[region])


def test_a_region_past_the_first_block_is_a_slice_of_the_whole() -> None:
    shape = (2100, 1000)
    region = (slice(5, 2099), slice(1, 999))
    assert torch.equal(
        initial_values(Q_PROJ, shape, region, CONFIG, 0), values(Q_PROJ, *shape)[region]
    )


@pytest.mark.parametrize(
    "name",
    [
        "layers.1.attention.o_proj.weight",
        "layers.0.gated_delta.o_proj.weight",
        "layers.0.mlp.down.weight",
        "layers.0.moe.shared_expert.down.weight",
        "layers.0.moe.experts.down",
    ],
)
def test_residual_outputs_shrink_with_depth(name: str) -> None:
    std = values(name, 400, 400).std()
    assert std == pytest.approx(CONFIG.init_std / math.sqrt(2 * CONFIG.n_layers), rel=0.02)


def test_decay_and_step_size_are_those_of_mamba2() -> None:
    A = values("layers.0.gated_delta.A_log", 10_000).exp()
    assert A.min() > 0
    assert A.max() <= 16
    assert A.mean() == pytest.approx(8, rel=0.03)

    step = torch.nn.functional.softplus(values("layers.0.gated_delta.dt_bias", 10_000))
    assert step.min() > 0.99e-3
    assert step.max() < 1.01e-1
    assert step.log().mean() == pytest.approx(math.log(1e-2), rel=0.01)


def test_convolutions_are_uniform_by_width() -> None:
    weight = values("layers.0.gated_delta.k_conv", 5000, 4)
    assert 0.499 < weight.max() <= 0.5
    assert weight.std() == pytest.approx(1 / math.sqrt(12), rel=0.02)


@pytest.mark.parametrize("zero_centered", [False, True])
def test_norms_start_as_the_identity(zero_centered: bool) -> None:
    config = ModelConfig(**{**vars(CONFIG), "zero_centered_norm": zero_centered})
    model = Transformer(config)
    initialize(model, config, seed=0)
    x = torch.randn(3, 32)
    unit = x / x.square().mean(-1, keepdim=True).sqrt()

    torch.testing.assert_close(model.norm(x), unit)
    gated_delta_norm = model.get_submodule("layers.0.gated_delta.norm")
    torch.testing.assert_close(gated_delta_norm(unit[:, :8]).norm(dim=-1), torch.full((3,), 8**0.5))


def test_rows_initialised_by_two_ranks_make_the_whole_model() -> None:
    with torch.device("meta"):
        meta = Transformer(CONFIG)
    model = Transformer(CONFIG)
    initialize(model, CONFIG, seed=3)

    for name, parameter in meta.named_parameters():
        half = parameter.shape[0] // 2
        rest = whole(parameter)[1:]
        parts = [
            initial_values(name, tuple(parameter.shape), (rows, *rest), CONFIG, 3)
            for rows in (slice(0, half), slice(half, None))
        ]
        assert torch.equal(torch.cat(parts), model.get_parameter(name)), name
