"""The end of a program that ranks run together for one result."""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, NoReturn

import torch.distributed as dist

from pretrain.errors import LOST_RANK


def answer(compute: Callable[[], Any]) -> NoReturn:
    """Print what `compute` returns, from rank 0, as JSON, and exit; dataclasses as objects.

    An error that carries an `exit_code` is told in its own words, and so is a rank that is lost.
    """
    code = 0
    try:
        result = compute()
        if dist.get_rank() == 0:
            print(json.dumps(result, default=asdict), flush=True)
        dist.barrier()
    except Exception as error:
        code, told = _describe(error)
        if not code:
            raise
        print(f"error: {told}", file=sys.stderr, flush=True)
    # Threads of gloo may still free tensors, and abort a process whose interpreter ends meanwhile.
    os._exit(code)


def _describe(error: Exception) -> tuple[int, str]:
    """Exit code and words; 0 for an error that only a traceback explains."""
    if isinstance(error, dist.DistError):
        return LOST_RANK, f"the ranks did not come together: {error}"
    return int(getattr(error, "exit_code", 0)), str(error)
