"""Arrays that one process makes and all others map, as compiled code is kept."""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.compiled import cache_folder
from data_pipeline.stage import is_made, make_stage

Arrays = Mapping[str, NDArray[Any]]


def prepare(name: str, of: bytes, make: Callable[[], Arrays]) -> Arrays:
    """What `make` returns, read-only; it is called once for each content of `of`.

    The files are checked against their hashes, and made again where they are damaged. Where no
    folder can be written, every process makes its own.

    Args:
        of: all that the arrays depend on, such as the model that they are read from.
    """
    folder = cache_folder(Path(__file__).parent) / f"{name}-{hashlib.sha256(of).hexdigest()[:16]}"
    try:
        if not is_made(folder):
            make_stage(folder, lambda aside: _write(make(), aside))
    except OSError:
        return make()
    return {path.stem: np.asarray(np.load(path, "r")) for path in folder.glob("*.npy")}


def _write(arrays: Arrays, folder: Path) -> None:
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array, allow_pickle=False)
