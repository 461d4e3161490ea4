"""Which kernel runs where: a function of the device, the type and what is installed."""

import warnings
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import NamedTuple

import torch

HALF = (torch.float16, torch.bfloat16)
HOPPER = (9, 0)

# Backend -> the compiled module without which it is nothing.
_COMPILED = {"flash_attn_2": "flash_attn_2_cuda", "flash_attn_3": "flash_attn_3._C"}


class Setting(NamedTuple):
    """What the choice of a kernel depends on.

    Attributes:
        device: its type.
        capability: the CUDA device's compute capability, (0, 0) for another device.
        installed: the backends whose packages can be imported.
        deterministic: whether torch is to use deterministic algorithms only.
    """

    device: str
    capability: tuple[int, int]
    dtype: torch.dtype
    head_dim: int
    installed: frozenset[str]
    deterministic: bool

    @classmethod
    def here(cls, device: torch.device, dtype: torch.dtype, head_dim: int) -> "Setting":
        """On a device of this machine, with torch as it is set now."""
        is_cuda = device.type == "cuda"
        return cls(
            device.type,
            _capability(device) if is_cuda else (0, 0),
            dtype,
            head_dim,
            _installed() if is_cuda else frozenset(),
            torch.are_deterministic_algorithms_enabled(),
        )


@cache
def usable_backends(setting: Setting) -> tuple[str, ...]:
    """The backends of block attention that handle it forward and backward, the preferred first."""
    s = setting
    is_half, is_ampere = s.dtype in HALF, s.capability >= (8, 0)
    takes_flash = is_half and is_ampere and s.head_dim % 8 == 0 and s.head_dim <= 256
    takes_efficient = s.device == "cuda" and s.head_dim % (8 if is_half else 4) == 0
    usable = {
        "cpu_flash": s.device == "cpu",
        "flash_attn_3": (
            takes_flash
            and s.capability == HOPPER
            and "flash_attn_3" in s.installed
            # Its deterministic backward does not exist for heads over 192.
            and (s.head_dim <= 192 or not s.deterministic)
        ),
        "flash_attn_2": takes_flash and "flash_attn_2" in s.installed,
        "torch_flash": takes_flash,
        # Never the first: cuDNN builds a graph for each new length, and documents have many.
        "torch_cudnn": takes_flash and s.head_dim <= 128 and not s.deterministic,
        "torch_efficient": takes_efficient
        and (s.dtype in (torch.float16, torch.float32) or (is_half and is_ampere)),
        "reference": True,
    }
    return tuple(backend for backend, is_usable in usable.items() if is_usable)


def choose_backend(setting: Setting) -> str:
    """The backend of block attention."""
    return usable_backends(setting)[0]


def kernels_in_use(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """What a run computes with, for people to read."""
    attention = choose_backend(Setting.here(device, dtype, head_dim))
    if attention == "reference":
        attention += " (slow, memory quadratic in the length)"
    return f"attention {attention}, gated delta rule torch"


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@cache
def _installed() -> frozenset[str]:
    return frozenset(backend for backend, module in _COMPILED.items() if _loads(module))


def _loads(module: str) -> bool:
    """Whether a compiled module is there and fits this torch; warns of one that does not."""
    if find_spec(module.partition(".")[0]) is None:
        return False
    try:
        import_module(module)
    except ImportError as error:
        warnings.warn(
            f"{module} is installed but does not load, and is not used: {error}", stacklevel=2
        )
        return False
    return True
