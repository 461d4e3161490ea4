"""What a thread is doing, read from its stack: in which collective it is, or in which line."""

import sys
import threading
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import dropwhile
from pathlib import Path
from types import FrameType

import torch.distributed as dist

from parallel.comm import Communicator, Pending
from parallel.flight_recorder import Recorded, is_timed, oldest_pending

PROJECT = str(Path(__file__).parents[1])
COMMUNICATING = (
    "parallel.comm",
    "torch.distributed.distributed_c10d",
    "torch.distributed._functional_collectives",
    "torch.distributed.fsdp",
    "torch.distributed.pipelining",
)
# What torch calls groups that lie along no axis.
UNNAMED = ("default_pg", "default", "undefined", "")
POINT_TO_POINT = {"_batch_p2p": "send and receive", "_wait_batch_p2p": "send and receive"}


@dataclass(frozen=True)
class Activity:
    """What a rank is doing.

    Attributes:
        what: a collective and the axis it goes along, or a function and a line.
        ranks: those that take part in the collective; () outside of one.
    """

    what: str
    ranks: tuple[int, ...] = ()


def activity_at_error(error: BaseException) -> Activity:
    """What the rank was doing when `error` was raised."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return _activity(frames[::-1])


def current_activity() -> Activity:
    """What this process is doing: the collective that it waits in, or where its main thread is.

    Gradients of a GPU are computed in a thread of their own, and collectives of NCCL wait in none.
    """
    if pending := oldest_pending():
        return activity_on_gpu(pending, is_timed=is_timed())
    frames = sys._current_frames()
    main = threading.main_thread().ident
    # Threads that Python has not started are those of autograd.
    helpers = {thread.ident for thread in threading.enumerate() if _is_helper(thread)}
    ordered = sorted(frames.keys() - helpers, key=lambda thread: thread != main)
    activities = [
        _activity([frame for frame, _ in traceback.walk_stack(frames[thread])])
        for thread in ordered
    ]
    return next((activity for activity in activities if activity.ranks), activities[0])


def activity_on_gpu(pending: Recorded, *, is_timed: bool) -> Activity:
    """What a rank is doing whose oldest collective that has not completed is `pending`.

    Args:
        is_timed: whether the recorder knows when a collective begins.
    """
    name = f"{pending.name} ({_who(pending.ranks, pending.group.removeprefix('mesh_'))})"
    if pending.has_begun:
        return Activity(name, pending.ranks)
    if is_timed:
        return Activity(f"GPU work before {name}")
    return Activity(f"{name}, or GPU work before it", pending.ranks)


def _is_helper(thread: threading.Thread) -> bool:
    is_foreign = isinstance(thread, threading._DummyThread)
    return thread is not threading.main_thread() and not is_foreign


def waits_in_collective() -> bool:
    """Whether the main thread is in a collective of gloo; cheap enough to ask all the time."""
    frame: FrameType | None = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame and _is_call_of_operator(frame):
        frame = frame.f_back
    return frame is not None and _communicates(frame)


def _activity(frames: list[FrameType]) -> Activity:
    """Args: frames, innermost first."""
    frames = list(dropwhile(_is_call_of_operator, frames))
    if not _communicates(frames[0]):
        frame = next((f for f in frames if f.f_code.co_filename.startswith(PROJECT)), frames[0])
        line = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
        return Activity(f"{frame.f_code.co_name} ({line})")
    inner = [frame for frame in frames if _communicates(frame)]
    group = next((group for frame in frames if (group := _group(frame))), dist.group.WORLD)
    assert group is not None
    axes = (comm.axis for frame in inner if (comm := _communicator(frame)))
    axis = next(axes, group.group_desc.removeprefix("mesh_"))
    is_backward = any(frame.f_code.co_name == "_engine_run_backward" for frame in frames)
    if group not in dist.distributed_c10d._world.pg_group_ranks:
        return Activity(f"{_collective(inner)} (a group that has been given up)")
    ranks = tuple(dist.get_process_group_ranks(group))
    what = f"{_collective(inner)}{' in backward' if is_backward else ''} ({_who(ranks, axis)})"
    return Activity(what, ranks)


def _is_call_of_operator(frame: FrameType) -> bool:
    return frame.f_globals.get("__name__") == "torch._ops"


def _communicates(frame: FrameType) -> bool:
    module = str(frame.f_globals.get("__name__"))
    if module.startswith("torch.distributed.pipelining"):
        # A schedule also calls the stages.
        return frame.f_code.co_name in POINT_TO_POINT
    return module.startswith(COMMUNICATING)


def _communicator(frame: FrameType) -> Communicator | None:
    owner = frame.f_locals.get("self")
    comm = owner.comm if isinstance(owner, Pending) else owner
    return comm if isinstance(comm, Communicator) else None


def _collective(frames: Iterable[FrameType]) -> str:
    names = []
    for frame in frames:
        owner = frame.f_locals.get("self")
        kind = owner.kind if isinstance(owner, Pending) else frame.f_locals.get("kind")
        if _communicator(frame) and kind:
            return str(kind)
        name = frame.f_code.co_name
        names.append(POINT_TO_POINT.get(name, name))
    return next((name for name in names if not name.startswith("_")), names[0])


def _group(frame: FrameType) -> dist.ProcessGroup | None:
    """The group among the local variables of a function that communicates."""
    if not str(frame.f_globals.get("__name__")).startswith(("parallel.comm", "torch.distributed")):
        return None
    owner = frame.f_locals.get("self")
    holders = [owner, getattr(owner, "comm", None), getattr(owner, "_stage", None)]
    holders += getattr(owner, "_stages", [])
    candidates = [
        frame.f_locals.get("group"),
        *(getattr(holder, "group", None) for holder in holders),
    ]
    return next((found for found in candidates if isinstance(found, dist.ProcessGroup)), None)


def _who(ranks: Sequence[int], axis: str) -> str:
    named = f"ranks {', '.join(map(str, ranks[:8]))}{', ...' if len(ranks) > 8 else ''}"
    if len(ranks) == dist.get_world_size():
        named = "all ranks"
    return named if axis in UNNAMED else f"axis {axis}, {named}"
