"""Which kernel runs where: a function of the device, the type and what is installed."""

import os
import re
import warnings
from functools import cache
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from typing import NamedTuple

import torch

HALF = (torch.float16, torch.bfloat16)
HOPPER = (9, 0)
# Before it, lengths that 128 does not divide were wrong.
MENDED_CUDNN = 91501
# On Hopper its releases from the first on, and before the second, give wrong gradients of gated
# rules (flash-linear-attention issue 640); without Triton, tilelang does the same.
BROKEN_TRITON = ((3, 4, 0), (3, 7, 1))

# Backend -> the module without which it is nothing.
_MODULES = {
    "flash_attn_2": "flash_attn_2_cuda",
    "flash_attn_3": "flash_attn_3._C",
    "fla": "fla.ops.gated_delta_rule",
}


class Setting(NamedTuple):
    """What the choice of a kernel depends on.

    Attributes:
        device: its type.
        capability: the CUDA device's compute capability, (0, 0) for another device.
        installed: the backends whose packages can be imported, and `torch_cudnn` where cuDNN
            computes every length right.
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
        capability = _capability(device) if is_cuda else (0, 0)
        return cls(
            device.type,
            capability,
            dtype,
            head_dim,
            _installed(capability) if is_cuda else frozenset(),
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
        "torch_cudnn": (
            takes_flash
            and s.head_dim <= (256 if s.capability == HOPPER else 128)
            and not s.deterministic
        ),
        "torch_efficient": takes_efficient
        and (s.dtype in (torch.float16, torch.float32) or (is_half and is_ampere)),
        "reference": True,
    }
    return tuple(backend for backend, is_usable in usable.items() if is_usable)


def choose_backend(setting: Setting, recurs: bool = False) -> str:
    """The backend of block attention.

    Args:
        recurs: blocks of the same lengths come again and again. On Hopper cuDNN then is nearly
            twice as fast as what was written for Ampere; but it builds a graph for each new length,
            which takes 2 s, and documents have many.
    """
    usable = usable_backends(setting)
    is_right = "torch_cudnn" in usable and "torch_cudnn" in setting.installed
    is_fastest = setting.capability == HOPPER and usable[0] != "flash_attn_3"
    return "torch_cudnn" if recurs and is_right and is_fastest else usable[0]


def choose_rule(setting: Setting) -> str:
    """What computes the gated delta rule with keys of `head_dim`: `fla` or `torch`."""
    s = setting
    takes_fla = s.dtype in HALF and s.capability >= (8, 0) and s.head_dim <= 256
    return "fla" if takes_fla and "fla" in s.installed else "torch"


def kernels_in_use(device: torch.device, dtype: torch.dtype, head_dim: int, key_dim: int) -> str:
    """What a run computes with, for people to read.

    Args:
        head_dim: of softmax attention.
        key_dim: of the gated delta net.
    """
    setting = Setting.here(device, dtype, head_dim)
    attention, of_whole_rows = choose_backend(setting), choose_backend(setting, recurs=True)
    if of_whole_rows != attention:
        attention += f", {of_whole_rows} for rows of one document"
    if attention == "reference":
        attention += " (slow, memory quadratic in the length)"
    rule = choose_rule(Setting.here(device, dtype, key_dim))
    if rule == "torch" and device.type == "cuda":
        rule += ", compiled"
    bits = ", deterministic" if torch.are_deterministic_algorithms_enabled() else ""
    return f"attention {attention}, gated delta rule {rule}{bits}"


def make_deterministic() -> None:
    """Choose kernels that give the same bits each time, from now on in this process.

    Before the first one on a GPU: cuBLAS reads its setting once. torch warns of an operation of its
    own that has no such kernel, and runs it.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Of what is about to be written anyway.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@cache
def _installed(capability: tuple[int, int]) -> frozenset[str]:
    cudnn = torch.backends.cudnn.version() or 0
    found = {"torch_cudnn"} if cudnn >= MENDED_CUDNN else set()
    return frozenset(
        found | {name for name, module in _MODULES.items() if _loads(module, capability)}
    )


def _loads(module: str, capability: tuple[int, int]) -> bool:
    """Whether a module is there and fits this GPU, torch and us; warns of one that does not."""
    package = module.partition(".")[0]
    if find_spec(package) is None:
        return False
    try:
        import_module(module)
    except ImportError as error:
        problem = f"does not load: {error}"
    else:
        problem = _problem_of_fla(capability) if package == "fla" else ""
    if problem:
        warnings.warn(f"{module} is installed but not used: it {problem}", stacklevel=3)
    return not problem


def _problem_of_fla(capability: tuple[int, int]) -> str:
    if _numbers(import_module("fla").__version__) < (0, 5):
        # Older ones take as many value heads as key heads, and do not check.
        return "is older than 0.5"
    first, mended = BROKEN_TRITON
    triton = version("triton")
    if capability == HOPPER and first <= _numbers(triton) < mended and not find_spec("tilelang"):
        return (
            f"gives wrong gradients with Triton {triton} on Hopper; take Triton "
            f"{'.'.join(map(str, mended))} or newer, or install tilelang"
        )
    return ""


def _numbers(version: str) -> tuple[int, ...]:
    """(3, 6, 0) of 3.6.0+git1."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])
