"""What a thread is doing, read from its stack: in which collective it is, or in which line."""

import sys
import threading
import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch.distributed as dist

from parallel.comm import Communicator, Pending

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
    """What this process is doing, in the first of its other threads that is in a collective.

    Gradients of a GPU are computed in a thread of their own.
    """
    frames = sys._current_frames()
    main = threading.main_thread().ident
    ordered = sorted(frames.keys() - {threading.get_ident()}, key=lambda thread: thread != main)
    activities = [
        _activity([frame for frame, _ in traceback.walk_stack(frames[thread])])
        for thread in ordered
    ]
    return next((activity for activity in activities if activity.ranks), activities[0])


def _activity(frames: list[FrameType]) -> Activity:
    """Args: frames, innermost first."""
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
    what = f"{_collective(inner)}{' in backward' if is_backward else ''} ({_who(group, axis)})"
    return Activity(what, tuple(dist.get_process_group_ranks(group)))


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


def _who(group: dist.ProcessGroup, axis: str) -> str:
    ranks = dist.get_process_group_ranks(group)
    named = f"ranks {', '.join(map(str, ranks[:8]))}{', ...' if len(ranks) > 8 else ''}"
    if len(ranks) == dist.get_world_size():
        named = "all ranks"
    return named if axis in UNNAMED else f"axis {axis}, {named}"
