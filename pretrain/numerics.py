"""What the last bits of a step depend on, besides the layout: two runs with the same may be bitwise
the same.
"""

from importlib.metadata import version

import torch

from pretrain.config import Config
from pretrain.engines.extra import TESTED
from pretrain.model.kernels.backends import kernels_in_use


def numerics_of(config: Config, device: torch.device) -> dict[str, str]:
    """The engine, the version of torch, the kind of device and the kernels of `config`."""
    model, dtype = config.model, getattr(torch, config.train.dtype)
    return {
        "engine": _version_of(config.train.engine),
        "version of torch": torch.__version__,
        "device": _kind_of(device),
        "kernels": kernels_in_use(device, dtype, model.attention.head_dim, model.linear.key_dim),
    }


def _version_of(engine: str) -> str:
    packages = TESTED.get(engine, {})
    return " ".join([engine, *(f"{package} {version(package)}" for package in packages)])


def _kind_of(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    # Sums are cut into pieces by threads.
    return f"cpu ({torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads)"
