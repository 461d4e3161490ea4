import math

import torch

from pretrain.model.rope import Rotation

ROTARY_DIM, BASE = 8, 100.0


def test_pairs_turn_by_their_own_frequency() -> None:
    rotation = Rotation.of_positions(torch.tensor([[3]]), ROTARY_DIM, BASE)
    x = torch.zeros(1, 1, 1, 12)
    x[..., 1] = 1.0

    angle = 3 * BASE ** (-2 / ROTARY_DIM)
    expected = torch.zeros(12)
    expected[1], expected[1 + ROTARY_DIM // 2] = math.cos(angle), math.sin(angle)
    torch.testing.assert_close(rotation(x).flatten(), expected)


def test_scores_depend_on_the_distance_only() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 12).expand(2, 1, 1, 40, 12).double()
    near = Rotation.of_positions(torch.arange(40)[None], ROTARY_DIM, BASE)
    far = Rotation.of_positions(torch.arange(500, 540)[None], ROTARY_DIM, BASE)

    torch.testing.assert_close(near(q) @ near(k).mT, far(q) @ far(k).mT, rtol=1e-4, atol=1e-4)


def test_dimensions_past_the_rotary_ones_are_untouched() -> None:
    x = torch.randn(2, 3, 5, 12, dtype=torch.bfloat16)
    rotated = Rotation.of_positions(torch.arange(5).expand(2, 5), ROTARY_DIM, BASE)(x)

    assert rotated.dtype == x.dtype
    assert torch.equal(rotated[..., ROTARY_DIM:], x[..., ROTARY_DIM:])


def test_far_positions_keep_fp32_angles_under_bf16() -> None:
    x = torch.randn(1, 1, 1, ROTARY_DIM, dtype=torch.bfloat16)
    rotation = Rotation.of_positions(torch.tensor([[100_001]]), ROTARY_DIM, BASE)

    torch.testing.assert_close(rotation(x).float(), rotation(x.float()), rtol=2**-7, atol=1e-6)
