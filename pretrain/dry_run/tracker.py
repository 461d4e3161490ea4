"""What a training step needs, seen at the dispatcher: live memory and collectives.

Real tensors and fake ones are seen alike, so that predictions and measurements are made by the same
code.
"""

import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

# What memory is for. Layers have parts of their own.
WEIGHTS = "weights"
OPTIMIZER = "optimizer state"
GRADIENTS = "gradients"
GATHERED = "gathered weights"
COMMUNICATION = "communication buffers"
EMBEDDING = "embedding"
LOSS = "loss"
BACKWARD = "backward pass"
UPDATE = "update"
LANES = "lanes"
OTHER = "other"
LASTING = {WEIGHTS, OPTIMIZER, GRADIENTS, GATHERED}
# The axes along which weights are gathered and gradients reduced.
OF_WEIGHTS = {"dp_replicate", "fsdp", "expert_shard"}


def part_of_layer(number: str) -> str:
    return f"layer {number}"


@dataclass
class Traffic:
    """Collectives of one kind on one axis: how many, and the bytes that this rank sent."""

    calls: int = 0
    bytes: int = 0


class StepTracker(TorchDispatchMode):
    """Counts the bytes of what operations made and is still alive, and the collectives.

    Memory that an operation needs inside is not seen. The bytes of collectives are those of ring
    algorithms: of n ranks, each sends (n - 1) / n of what an all-gather makes or a reduce-scatter
    takes, and twice that of what an all-reduce takes.

    Args:
        axes: process group name -> axis.

    Attributes:
        part: of what is made from now on, what it is for.
        live: bytes now.
        parts: of them, those of each part.
        gathered: those of them that FSDP frees and restores: whole weights, gathered to compute.
        peak: the most bytes since `reset`.
        gathered_at_peak, parts_at_peak: what they were then.
        traffic: (axis, kind) -> collectives since `reset`.
    """

    def __init__(self, axes: Mapping[str, str]) -> None:
        super().__init__()
        self.axes = axes
        self.part = OTHER
        self.live = self.gathered = 0
        self.parts: Counter[str] = Counter()
        self._bytes: dict[int, int] = {}
        self._part: dict[int, str] = {}
        self._resized: set[int] = set()
        self.reset()

    def reset(self) -> None:
        """Begin a new count of what comes and goes."""
        self._note_peak()
        self.traffic: dict[tuple[str, str], Traffic] = defaultdict(Traffic)

    def attribute(self, tensor: Tensor, part: str) -> None:
        """Count a tensor's memory to another part than the one it was made in."""
        self._move(tensor.untyped_storage()._cdata, part)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            # Let it be taken apart: what it does with its local tensors is seen then.
            return NotImplemented
        if func.namespace == "c10d":
            self._count(func._schema.name.removeprefix("c10d::"), args)
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            if not tensor.is_meta:
                self._add(tensor.untyped_storage())
        return result

    def __enter__(self) -> Self:
        # FSDP frees and restores gathered weights by resizing their storage: no operation.
        self._resizing = patch.object(torch.UntypedStorage, "resize_", self._noted_resize())
        self._resizing.start()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._resizing.stop()

    def _noted_resize(self) -> Callable[..., Any]:
        resize_ = torch.UntypedStorage.resize_

        def noted_resize_(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize_(storage, size)
            self._note_resize(storage._cdata, size)
            return result

        return noted_resize_

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._bytes:
            weakref.finalize(storage, self._forget, key)
            self._part[key] = self.part
            self._set(key, storage.nbytes())

    def _note_resize(self, key: int, size: int) -> None:
        if key not in self._bytes:
            return
        if key not in self._resized:
            self._resized.add(key)
            self.gathered += self._bytes[key]
            self._move(key, GATHERED)
        self._set(key, size)

    def attribute_all(self, before: str, part: str) -> None:
        """Count what is alive of one part to another."""
        for key in [key for key, is_of in self._part.items() if is_of == before]:
            self._move(key, part)

    def _move(self, key: int, part: str) -> None:
        if key in self._bytes:
            self.parts[self._part[key]] -= self._bytes[key]
            self.parts[part] += self._bytes[key]
            self._part[key] = part

    def _forget(self, key: int) -> None:
        self._set(key, 0)
        del self._bytes[key], self._part[key]
        self._resized.discard(key)

    def _set(self, key: int, size: int) -> None:
        change = size - self._bytes.get(key, 0)
        self._bytes[key] = size
        self.live += change
        if key in self._resized:
            self.gathered += change
        self.parts[self._part[key]] += change
        if self.live > self.peak:
            self._note_peak()

    def _note_peak(self) -> None:
        self.peak, self.gathered_at_peak = self.live, self.gathered
        self.parts_at_peak = {part: size for part, size in self.parts.items() if size}

    def _count(self, operation: str, args: Any) -> None:
        if operation not in _COLLECTIVES:
            return
        kind, sent_bytes = _COLLECTIVES[operation]
        group = next(
            dist.ProcessGroup.unbox(arg) for arg in args if isinstance(arg, torch.ScriptObject)
        )
        if group.size() > 1:
            axis = self.axes.get(group.group_name, "all ranks")
            traffic = self.traffic[axis, kind]
            traffic.calls += 1
            traffic.bytes += sent_bytes(args, group)
            for tensor in _tensors(list(args)) if axis in OF_WEIGHTS else ():
                if self._part.get(tensor.untyped_storage()._cdata) not in LASTING:
                    self.attribute(tensor, COMMUNICATION)


SentBytes = Callable[[Any, dist.ProcessGroup], int]


def _tensors(result: Any) -> Iterator[Tensor]:
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, tuple | list):
        for part in result:
            yield from _tensors(part)


def _bytes_of(argument: Any) -> int:
    return sum(tensor.nbytes for tensor in _tensors(argument))


def _ring(position: int, times: int) -> SentBytes:
    """`times` (n - 1) / n of the bytes of an argument."""

    def sent_bytes(args: Any, group: dist.ProcessGroup) -> int:
        return times * _bytes_of(args[position]) * (group.size() - 1) // group.size()

    return sent_bytes


def _to_others(args: Any, group: dist.ProcessGroup) -> int:
    _, sent, _, _, splits, *_ = args
    rows = sum(splits) - splits[group.rank()]
    return rows * sent[:1].nbytes


def _whole(args: Any, _group: dist.ProcessGroup) -> int:
    return _bytes_of(args[0])


_COLLECTIVES: dict[str, tuple[str, SentBytes]] = {
    "allreduce_": ("all-reduce", _ring(0, 2)),
    "_allgather_base_": ("all-gather", _ring(0, 1)),
    "_reduce_scatter_base_": ("reduce-scatter", _ring(1, 1)),
    "alltoall_base_": ("all-to-all", _to_others),
    "broadcast_": ("broadcast", _whole),
    "send": ("send", _whole),
}
