"""Whether what an engine needs is installed."""

import warnings
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

from pretrain.errors import UserError

# Version of each package that has to be there; None is any.
TESTED: dict[str, Mapping[str, str | None]] = {
    # Without psutil its checkpoints hang, without einops it fails late.
    "megatron": {"megatron-core": "0.16.1", "psutil": None, "einops": None},
    "deepspeed": {"deepspeed": "0.19.8"},
}


def check_extra(extra: str, tested: Mapping[str, str | None]) -> None:
    """Warn of versions that were not tested.

    Args:
        extra: of farspan.
        tested: version of each package that has to be there; None is any.

    Raises:
        UserError: a package is not installed.
    """
    install = f"pip install 'farspan[{extra}]'"
    for package, wanted in tested.items():
        try:
            found = version(package)
        except PackageNotFoundError:
            raise UserError(f"{package} is not installed; {install}") from None
        if wanted not in (None, found):
            warnings.warn(
                f"{package} {found} was not tested, {wanted} was: compare losses with those of the "
                f"native engine, or {install}",
                stacklevel=2,
            )
