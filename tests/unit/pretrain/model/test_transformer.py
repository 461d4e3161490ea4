import dataclasses

import pytest
import torch
from torch import Tensor

from pretrain.model.config import (
    AttentionConfig,
    LayerKind,
    LinearAttentionConfig,
    ModelConfig,
    MoEConfig,
    Positions,
)
from pretrain.model.init import initialize
from pretrain.model.kernels.documents import Documents
from pretrain.model.transformer import Transformer


def make_config(n_layers: int = 2, n_experts: int = 0, tie_embeddings: bool = False) -> ModelConfig:
    return ModelConfig(
        vocab_size=50,
        d_model=32,
        n_layers=n_layers,
        layer_pattern=("linear", "softmax"),
        d_ff=48,
        attention=AttentionConfig(4, 2, 16),
        linear=LinearAttentionConfig(2, 4, 8, 8),
        moe=MoEConfig(n_experts, 2, 16, 16),
        tie_embeddings=tie_embeddings,
        init_std=0.2,
    )


def make_model(config: ModelConfig) -> Transformer:
    model = Transformer(config)
    initialize(model, config, seed=0)
    return model


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(50, (2, 70), generator=torch.Generator().manual_seed(0))


def test_no_token_sees_a_later_one(tokens: Tensor) -> None:
    model = make_model(make_config(n_experts=4))
    changed = tokens.clone()
    changed[:, 40] = (changed[:, 40] + 1) % 50
    before, after = model(tokens).value, model(changed).value

    torch.testing.assert_close(before[:, :40], after[:, :40], rtol=0, atol=1e-5)
    assert ((before[:, 40:] - after[:, 40:]).abs().amax(-1) > 1e-4).all()


@pytest.mark.parametrize(
    ("pattern", "reach"),
    [
        (("sliding",), 1 * 5),
        (("sliding", "sliding"), 2 * 5),
        (("sliding", "softmax"), 30),
        (("linear", "sliding"), 30),
    ],
)
def test_a_sliding_layer_does_not_see_beyond_its_window(
    pattern: tuple[LayerKind, ...], reach: int, tokens: Tensor
) -> None:
    config = make_config(n_layers=len(pattern))
    attention = dataclasses.replace(config.attention, window=6)
    model = make_model(dataclasses.replace(config, layer_pattern=pattern, attention=attention))
    # The second row goes on after its first document.
    documents = Documents.from_lengths([[70], [45, 25]])
    changed = tokens.clone()
    changed[:, 40] = (changed[:, 40] + 1) % 50
    before, after = (model(t, documents).value for t in (tokens, changed))

    is_other = (before - after).abs().amax(-1) > 1e-3
    positions = torch.arange(70)
    first = (positions >= 40) & (positions <= 40 + reach)
    assert is_other[0].tolist() == first.tolist()
    assert is_other[1].tolist() == (first & (positions < 45)).tolist()


@pytest.mark.parametrize(("positions", "is_blind"), [(("none",), True), (("rope",), False)])
def test_a_layer_without_positions_cannot_tell_the_order_of_the_past(
    tokens: Tensor, positions: tuple[Positions, ...], is_blind: bool
) -> None:
    config = dataclasses.replace(make_config(n_layers=1), layer_pattern=("softmax",))
    attention = dataclasses.replace(config.attention, positions=positions)
    model = make_model(dataclasses.replace(config, attention=attention))
    reversed_past = torch.cat([tokens[:, :-1].flip(1), tokens[:, -1:]], dim=1)

    change = (model(tokens).value - model(reversed_past).value)[:, -1].abs().max()
    assert (change < 1e-5) == is_blind


def test_positions_repeat_over_the_layers_that_attend() -> None:
    config = make_config(n_layers=12)
    attention = dataclasses.replace(config.attention, positions=("rope", "rope", "none"))
    pattern = ("linear", "sliding", "softmax")
    config = dataclasses.replace(config, layer_pattern=pattern, attention=attention)
    model = Transformer(config)

    rotating = {
        int(number)
        for number, layer in model.layers.items()
        if layer.attention is not None and layer.attention.rotates
    }
    assert rotating == {1, 2, 5, 7, 10, 11}


def test_output_is_applied_to_the_hidden_state_and_the_output_embedding(tokens: Tensor) -> None:
    model = make_model(make_config())
    targets = tokens.roll(-1, dims=1)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        logits = hidden @ weight.T
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    logits = model(tokens).value
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(model(tokens, output=loss).value, expected)


def test_tied_embedding_gets_both_gradients(tokens: Tensor) -> None:
    tied = make_model(make_config(tie_embeddings=True))
    untied = make_model(make_config())
    untied.load_state_dict({**tied.state_dict(), "lm_head.weight": tied.embedding.weight})
    assert untied.lm_head is not None
    for model in (tied, untied):
        model(tokens).value.square().mean().backward()

    assert untied.embedding.weight.grad is not None
    torch.testing.assert_close(
        tied.embedding.weight.grad,
        untied.embedding.weight.grad + untied.lm_head.weight.grad,
    )


def test_router_statistics_cover_every_layer_and_token(tokens: Tensor) -> None:
    result = make_model(make_config(n_layers=3, n_experts=4))(tokens)

    assert result.balance.shape == result.z.shape == result.dropped.shape == (3,)
    assert result.expert_counts.sum(1).tolist() == [280, 280, 280]


def test_dense_model_has_no_router_statistics(tokens: Tensor) -> None:
    result = make_model(make_config())(tokens)
    assert len(result.balance) == len(result.z) == len(result.expert_counts) == 0


def test_default_model_is_the_80b_one_and_is_built_without_memory() -> None:
    with torch.device("meta"):
        model = Transformer(ModelConfig())
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert 79e9 < parameters < 81e9
    assert model.state_dict().keys() == dict(model.named_parameters()).keys()
