import pytest
import torch
from torch import Tensor, nn

from pretrain.balancing import RouterState, auxiliary_loss
from pretrain.model.config import ModelConfig, MoEConfig
from pretrain.model.transformer import Transformer


def test_frequencies_are_uniform_before_the_first_step_and_then_those_of_the_step() -> None:
    state = RouterState(2, MoEConfig(n_experts=4))
    assert state.frequencies.tolist() == [[0.25] * 4] * 2
    state.update(torch.tensor([[8, 0, 4, 4], [0, 0, 0, 0]]))
    assert state.frequencies.tolist() == [[0.5, 0.0, 0.25, 0.25], [0.0] * 4]
    assert not state.selection_bias.any()


def test_the_selection_bias_follows_the_load() -> None:
    state = RouterState(1, MoEConfig(n_experts=4, balance="bias", bias_rate=0.5))
    for _ in range(3):
        state.update(torch.tensor([[9, 1, 5, 5]]))
    assert state.selection_bias.tolist() == [[-1.5, 1.5, 0.0, 0.0]]


def test_each_layer_gets_its_own_row_by_its_number_in_the_whole_model() -> None:
    moe = MoEConfig(n_experts=4, top_k=2, d_expert=8, balance="bias", bias_rate=1.0)
    model = Transformer(ModelConfig(32, 16, n_layers=3, layer_pattern=("softmax",), moe=moe))
    state = RouterState(3, moe)
    state.update(torch.tensor([[4, 0, 0, 0], [0, 4, 0, 0], [0, 0, 4, 0]]))
    state.copy_to({number: model.layers[number] for number in ("1", "2")})

    rows: list[Tensor] = [layer.moe.frequencies for layer in model.layers.values()]
    assert torch.stack(rows).argmax(-1).tolist() == [0, 1, 2]
    assert rows[0].tolist() == [0.25] * 4
    biases = [layer.moe.selection_bias.tolist() for layer in model.layers.values()]
    assert biases == [[0.0] * 4, [1, -1, 1, 1], [1, 1, -1, 1]]


def test_a_dense_model_has_no_state_and_no_auxiliary_loss() -> None:
    dense = MoEConfig(n_experts=0)
    state = RouterState(2, dense)
    state.update(torch.zeros(0, 0))
    layer = nn.Module()
    layer.moe = None
    state.copy_to({"0": layer})
    assert auxiliary_loss(torch.zeros(0), torch.zeros(0), 8, 0, dense).item() == 0


def test_the_auxiliary_loss_is_the_weighted_mean_over_tokens_and_layers() -> None:
    moe = MoEConfig(n_experts=4, aux_loss=0.5, z_loss=0.1)
    balance, z = torch.tensor([10.0, 12.0]), torch.tensor([30.0, 50.0])
    whole = auxiliary_loss(balance, z, 10, 2, moe).item()
    assert whole == pytest.approx(0.5 * 1.1 + 0.1 * 4)
    parts = [auxiliary_loss(balance[i : i + 1], z[i : i + 1], 10, 2, moe).item() for i in (0, 1)]
    assert sum(parts) == pytest.approx(whole)


def test_a_selection_bias_takes_the_place_of_the_balance_loss() -> None:
    moe = MoEConfig(n_experts=4, aux_loss=0.5, z_loss=0.1, balance="bias")
    loss = auxiliary_loss(torch.tensor([10.0]), torch.tensor([30.0]), 10, 1, moe).item()
    assert loss == pytest.approx(0.1 * 3)
