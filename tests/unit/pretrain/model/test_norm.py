import pytest
import torch

from pretrain.model.norm import RMSNorm, l2_norm


@pytest.mark.parametrize("zero_centered", [False, True])
def test_rms_norm_matches_its_definition(zero_centered: bool) -> None:
    torch.manual_seed(0)
    norm = RMSNorm(6, eps=1e-3, zero_centered=zero_centered)
    weight = torch.randn(6)
    norm.load_state_dict({"weight": weight})
    x = torch.randn(2, 3, 6)

    scale = weight.double() + 1 if zero_centered else weight.double()
    expected = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-3).sqrt() * scale
    torch.testing.assert_close(norm(x).double(), expected, rtol=1e-6, atol=1e-6)


def test_rms_norm_rounds_bf16_only_once() -> None:
    torch.manual_seed(0)
    norm = RMSNorm(512, eps=1e-6, zero_centered=True).bfloat16()
    norm.load_state_dict({"weight": torch.randn(512)})
    x = torch.randn(64, 512, dtype=torch.bfloat16)

    exact = torch.nn.functional.rms_norm(x.double(), (512,), 1 + norm.weight.double(), 1e-6)
    assert norm(x).dtype == torch.bfloat16
    assert (norm(x) == exact.bfloat16()).float().mean() > 0.999


def test_l2_norm_gives_unit_vectors_in_fp32_and_keeps_zero() -> None:
    x = torch.tensor([[300.0, 400.0], [0.0, 0.0]], dtype=torch.bfloat16)
    torch.testing.assert_close(l2_norm(x), torch.tensor([[0.6, 0.8], [0.0, 0.0]]))
