"""Whether megatron-core is there, and of the version that was tested."""

import warnings
from importlib.metadata import PackageNotFoundError, version

from pretrain.errors import UserError

TESTED = "0.16.1"
INSTALL = "pip install 'farspan[megatron]'"


def check_installed() -> None:
    """Warn of a version that was not tested.

    Raises:
        UserError: megatron-core, or what it takes for granted, is not installed.
    """
    # Without psutil a checkpoint of megatron-core hangs, without einops it fails late.
    for package in ("megatron-core", "psutil", "einops"):
        try:
            version(package)
        except PackageNotFoundError:
            raise UserError(f"{package} is not installed; {INSTALL}") from None
    found = version("megatron-core")
    if found != TESTED:
        warnings.warn(
            f"megatron-core {found} was not tested, {TESTED} was: check losses against those of "
            f"farspan alone, or {INSTALL}",
            stacklevel=2,
        )
