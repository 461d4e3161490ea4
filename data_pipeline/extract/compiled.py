"""Functions that numba compiles once for all processes."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba

FOLDER = Path(__file__).parent
config: Any = numba.config


def _sources_digest() -> str:
    digest = hashlib.sha256()
    for path in sorted(FOLDER.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


# numba keeps what it compiled until the file with the function changes. Functions here also hold
# constants and functions of other files, so each state of the folder has a cache of its own.
CACHE = Path(config.CACHE_DIR or FOLDER / "__pycache__") / f"compiled-{_sources_digest()}"


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function on its first call; where no folder can be written, in every process."""
    configured, config.CACHE_DIR = config.CACHE_DIR, str(CACHE)
    try:
        return numba.njit(cache=True)(function)
    except RuntimeError:  # no place for a cache
        return numba.njit(function)
    finally:
        config.CACHE_DIR = configured
