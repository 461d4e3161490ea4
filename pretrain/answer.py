"""The end of a program that ranks run together for one result."""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, NoReturn

import torch.distributed as dist


def answer(compute: Callable[[], Any]) -> NoReturn:
    """Print the dataclass that `compute` returns, from rank 0, as one JSON object, and exit.

    An error that carries an `exit_code` is told in its own words.
    """
    code = 0
    try:
        result = compute()
        if dist.get_rank() == 0:
            print(json.dumps(asdict(result)), flush=True)
        dist.barrier()
    except Exception as error:
        if (of_error := getattr(error, "exit_code", None)) is None:
            raise
        print(f"error: {error}", file=sys.stderr, flush=True)
        code = int(of_error)
    # Threads of gloo may still free tensors, and abort a process whose interpreter ends meanwhile.
    os._exit(code)
