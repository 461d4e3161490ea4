import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pretrain.model.config import YarnConfig
from pretrain.model.rope import Rotation, rotary_frequencies

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


@pytest.mark.parametrize("yarn", [YarnConfig(), YarnConfig(32.0, 8192)])
@pytest.mark.parametrize("last", [4096, 1 << 20, 1 << 22, 1 << 28])
def test_angles_are_those_of_a_float64_reference(last: int, yarn: YarnConfig) -> None:
    position = torch.arange(last - 512, last)[None]
    rotation = Rotation.of_positions(position, 64, 1e7, yarn)

    angle = position[0, :, None].double() * rotary_frequencies(64, 1e7, yarn).double()
    scale = yarn.scale_of_rotated()
    for ours, exact in ((rotation.cos, angle.cos()), (rotation.sin, angle.sin())):
        assert (ours[0, 0].double() / scale - exact).abs().max() < 4e-7


def test_scores_at_four_million_are_those_at_the_beginning() -> None:
    """What angles in fp32 lose: neighbours there are turned by anything but one step."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 64).expand(2, 1, 1, 512, 64)
    near, far = (
        Rotation.of_positions(torch.arange(first, first + 512)[None], 64, 1e7)
        for first in (0, 1 << 22)
    )
    torch.testing.assert_close(near(q) @ near(k).mT, far(q) @ far(k).mT, rtol=1e-5, atol=3e-5)


@given(
    factor=st.floats(1.01, 128),
    original_length=st.integers(256, 1 << 20),
    pairs=st.integers(2, 64),
    base=st.floats(1e3, 1e9),
)
def test_yarn_slows_down_only_what_does_not_turn_often(
    factor: float, original_length: int, pairs: int, base: float
) -> None:
    plain = rotary_frequencies(2 * pairs, base).double()
    scaled = rotary_frequencies(2 * pairs, base, YarnConfig(factor, original_length)).double()
    slower, turns = plain / scaled, plain * original_length / (2 * math.pi)

    # The ramp may begin or end a pair earlier or later, where it has whole pairs.
    a_pair = base ** (1 / pairs)
    expected = slower.clamp(1, factor)
    expected[turns > 32 * a_pair] = 1
    expected[turns < 1 / a_pair] = factor
    torch.testing.assert_close(slower, expected, rtol=1e-5, atol=0)
