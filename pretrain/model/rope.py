"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), and YaRN for longer contexts."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pretrain.model.config import YarnConfig
from pretrain.model.norm import upcast

NO_YARN = YarnConfig()


@dataclass(frozen=True)
class Rotation:
    """The rotation of each token's queries and keys; cos and sin are [B, 1, T, R / 2] in fp32.

    Not a tuple: FSDP would cast the tensors of one to bf16, too coarse for far positions.
    """

    cos: Tensor
    sin: Tensor

    @classmethod
    def of_positions(
        cls, position: Tensor, rotary_dim: int, base: float, yarn: YarnConfig = NO_YARN
    ) -> "Rotation":
        """For positions [B, T]: pair i of `rotary_dim / 2` turns by position * frequency i.

        Frequencies are fp32, as in inference engines. Their product with a position is not: in
        fp32 it is off by 0.004 at 128k, and by 0.12 at 4M. In fp64 it is exact up to 2^29, and
        whole turns are taken off before cos and sin, so that these are right to 3e-7 anywhere.
        """
        frequency = rotary_frequencies(rotary_dim, base, yarn).double()
        # A GPU's host does not wait for what was asked of it before.
        frequency = frequency.to(position.device, non_blocking=True)
        angle = position[:, None, :, None] * frequency
        angle = angle.remainder_(2 * math.pi).float()
        scale = yarn.scale_of_rotated()
        return cls(angle.cos().mul_(scale), angle.sin().mul_(scale))

    def __call__(self, x_bhtd: Tensor) -> Tensor:
        """Rotate the first R of D dimensions, pairing dimension i with i + R / 2."""
        half = self.cos.shape[-1]
        first, second, rest = x_bhtd.split([half, half, x_bhtd.shape[-1] - 2 * half], dim=-1)
        first, second = upcast(first), upcast(second)
        rotated = [first * self.cos - second * self.sin, second * self.cos + first * self.sin]
        return torch.cat([*(part.to(rest.dtype) for part in rotated), rest], dim=-1)


def rotary_frequencies(rotary_dim: int, base: float, yarn: YarnConfig = NO_YARN) -> Tensor:
    """How far each pair turns from one position to the next, [R / 2] fp32 on the CPU.

    Bit for bit what transformers computes. YaRN ("NTK-by-parts", Peng et al. 2023,
    arXiv:2309.00071, section 3.2) leaves pairs alone that turn `beta_fast` times or more within the
    original length, slows those down by `factor` that turn `beta_slow` times or less, and blends in
    between.
    """
    wavelength = base ** (torch.arange(0, rotary_dim, 2, device="cpu").float() / rotary_dim)
    if yarn.factor == 1:
        return 1 / wavelength
    first, last = (
        rotary_dim * math.log(yarn.original_length / (turns * 2 * math.pi)) / (2 * math.log(base))
        for turns in (yarn.beta_fast, yarn.beta_slow)
    )
    if yarn.whole_pairs:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rotary_dim - 1)
    pair = torch.arange(rotary_dim // 2, dtype=torch.float32, device="cpu")
    kept = 1 - ((pair - first) / (last - first or 0.001)).clamp(0, 1)
    return 1 / (yarn.factor * wavelength) * (1 - kept) + 1 / wavelength * kept
