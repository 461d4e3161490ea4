"""Initial weights as a function of (seed, parameter name, index), never of rank or layout.

A counter-based generator (Salmon et al. 2011, doi:10.1145/2063384.2063405) gives any region of
any parameter alone, so each rank fills what it holds and nobody makes the whole model.
"""

import hashlib
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from pretrain.model.config import ModelConfig

Region = tuple[slice, ...]

_BLOCK = 1 << 20
_RESIDUAL_OUTPUTS = ("o_proj.weight", "down.weight", "experts.down")


def whole(parameter: Tensor) -> Region:
    """The region of a parameter that is not sharded: all of it."""
    return tuple(slice(0, size) for size in parameter.shape)


@torch.no_grad()
def initialize(
    model: nn.Module,
    config: ModelConfig,
    seed: int,
    region: Callable[[Tensor], Region] = whole,
) -> None:
    """Fill every parameter's local storage in place.

    `region(parameter)` tells which slice of the parameter's global shape is stored here.
    """
    for name, parameter in model.named_parameters():
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        values = initial_values(
            name, tuple(parameter.shape), region(parameter), config, seed, local.device
        )
        local.copy_(values)


def initial_values(
    name: str,
    shape: tuple[int, ...],
    region: Region,
    config: ModelConfig,
    seed: int,
    device: torch.device | str = "cpu",
) -> Tensor:
    """The slice `region` of the initial value of parameter `name` of global `shape`, in fp32.

    `name` is the parameter's in `Transformer`. It decides the distribution:
    linear layers and embeddings are N(0, init_std^2), the projections that end a residual branch
    divided by sqrt(2 n_layers) (Radford et al. 2019, section 2.3); decay and step size of the
    gated delta net are those of Mamba-2 (Dao & Gu 2024, arXiv:2405.21060).
    """
    bounds = [s.indices(size)[:2] for s, size in zip(region, shape, strict=True)]
    local_shape = [stop - start for start, stop in bounds]
    values = torch.empty(local_shape, device=device)
    key = _key(seed, name)
    flat = values.view(-1)
    for start in range(0, flat.numel(), _BLOCK):
        local_index = torch.arange(start, min(start + _BLOCK, flat.numel()), device=device)
        coordinates = torch.unravel_index(local_index, local_shape)
        index = torch.zeros_like(local_index)
        for coordinate, (first, _), size in zip(coordinates, bounds, shape, strict=True):
            index = index * size + coordinate + first
        flat[start : start + _BLOCK] = _transform(name, _uniform(key, index), shape, config)
    return values


def _transform(name: str, u: Tensor, shape: tuple[int, ...], config: ModelConfig) -> Tensor:
    """Uniforms in (0, 1) -> the distribution of parameter `name`."""
    leaf = name.rsplit(".", 1)[-1]
    if name.endswith("norm.weight"):
        zero_centered = config.zero_centered_norm and "gated_delta.norm" not in name
        return torch.full_like(u, 0.0 if zero_centered else 1.0)
    if leaf == "A_log":
        # A in U(0, 16), kept off 0, where its logarithm has no floor.
        return torch.log(0.01 + (16 - 0.01) * u)
    if leaf == "dt_bias":
        step = torch.exp(math.log(1e-3) + (math.log(1e-1) - math.log(1e-3)) * u)
        return step + torch.log(-torch.expm1(-step))
    if leaf.endswith("_conv"):
        return (2 * u - 1) / math.sqrt(shape[-1])
    std = config.init_std
    if name.endswith(_RESIDUAL_OUTPUTS):
        std /= math.sqrt(2 * config.n_layers)
    return torch.erfinv(2 * u - 1) * (math.sqrt(2) * std)


def _key(seed: int, name: str) -> int:
    """A signed 64-bit hash of (seed, name)."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def _uniform(key: int, index: Tensor) -> Tensor:
    """float64 in (0, 1): output `index` of SplitMix64 (Steele et al. 2014) seeded with `key`."""
    z = index * _signed(0x9E3779B97F4A7C15) + key
    z = (z ^ _shift_right(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shift_right(z, 27)) * _signed(0x94D049BB133111EB)
    z = z ^ _shift_right(z, 31)
    return (_shift_right(z, 11).double() + 0.5) * 2.0**-53


def _signed(word: int) -> int:
    """The 64-bit word as the two's complement integer that torch can hold."""
    return word - (1 << 64) if word >> 63 else word


def _shift_right(z: Tensor, bits: int) -> Tensor:
    """Logical shift; that of torch.int64 repeats the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)
