"""Save and load on two ranks; run by test_ranks.py.

Arguments: the folder for checkpoints and results.
"""

import errno
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist

from parallel.mesh import join_ranks
from pretrain.checkpoint import store
from pretrain.checkpoint.manifest import MANIFEST
from pretrain.checkpoint.region import Region
from pretrain.checkpoint.staging import Staging
from pretrain.checkpoint.store import checkpoint_in
from pretrain.checkpoint.target import Target
from tests.unit.pretrain.checkpoint.conftest import Saved


@contextmanager
def asked(refused: str = "") -> Iterator[list[str]]:
    """Which folders are listed, and which files are opened or asked for their size.

    Args:
        refused: a file that cannot be opened.
    """
    seen: list[str] = []
    originals = {name: getattr(Target, name) for name in ("names", "size", "read", "open")}

    def record(name: str):
        def call(self: Target):
            seen.append(self.url.rpartition("/")[2])
            if name == "open" and seen[-1] == refused:
                raise OSError(errno.EIO, "Input/output error", self.url)
            return originals[name](self)

        return call

    for name in originals:
        setattr(Target, name, record(name))
    yield seen
    for name, original in originals.items():
        setattr(Target, name, original)


def error_of(saved: Saved) -> str:
    try:
        saved.load()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def times_made() -> int:
    """How often this rank makes a region that both ranks have."""
    made = []

    def make() -> torch.Tensor:
        made.append(torch.zeros(2, 3))
        return made[-1]

    region = Region(torch.empty(2, 3, device="meta"), (2, 3), (0, 0), make)
    Staging({"x": region}, attempt=1).copy({"x": region})
    return len(made)


def cases(saved: Saved) -> Iterator[tuple[str, object]]:
    saved.train()
    saved.save(1)
    values = saved.values()
    saved.train()
    saved.save(2)
    with asked() as seen:
        saved.load()
    yield "asked for", sorted(set(seen))

    newest = Path(str(checkpoint_in(saved.target, 2)))
    mine, others = sorted(newest.glob("*.safetensors"))
    yield "written", [mine.stat().st_size, others.stat().st_size]

    yield "made", times_made()

    # Rank 1 looks at that file.
    with asked(refused=others.name):
        yield "cannot be read", error_of(saved).replace(str(newest), "")
    # As clients of object stores have of their own.
    fails = patch.object(store, "read_tensors", side_effect=RuntimeError("no answer"))
    with fails if dist.get_rank() == 1 else nullcontext():
        yield "fails in another way", error_of(saved)

    if dist.get_rank() == 0:
        *content, last = others.read_bytes()
        others.write_bytes(bytes([*content, last ^ 1]))
    dist.barrier()
    step = saved.load().step
    same = all(map(torch.equal, saved.values(), values))
    yield "damaged", [step, same, (newest / MANIFEST).exists()]

    saved.weights = torch.nn.Sequential(torch.nn.Linear(6, 8 + dist.get_rank()))
    yield "of another shape on rank 1", error_of(saved)


def main() -> None:
    join_ranks(timedelta(minutes=1))
    folder = Path(sys.argv[1])
    results = dict(cases(Saved(Target(str(folder / "checkpoints")))))
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
