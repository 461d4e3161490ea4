"""What the segments of a row hand on to later ones, and the gradients that come back.

Each segment is a graph of its own, which ends where it takes something from an earlier one. The
gradient that arrives there is kept here; what a segment hands on gets it while the segment itself
goes backward, in the middle of the layer that made it. So a layer's weights are there when they are
needed, and its activations may be recomputed.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from parallel.offload import SMALLEST_BYTES, Handle, Store
from parallel.segments.lanes import LaneMemory


class SegmentMemory:
    """The memory of one microbatch.

    Attributes:
        segments: how many there are.
        reach: gradients flow among so many of them, the first of which has a number that `reach`
            divides; by default among all.
        lanes: the memory beyond the rows; None where there is none.
        rows: of the batch, which this microbatch has.
        store: where what is handed on waits; None leaves it on the device.
    """

    def __init__(
        self,
        segments: int,
        reach: int | None = None,
        lanes: LaneMemory | None = None,
        rows: slice | None = None,
    ) -> None:
        self.segments = segments
        self.reach = reach or segments
        self.lanes, self.rows = lanes, rows or slice(None)
        self.store: Store | None = None
        self._handed: defaultdict[str, Handed] = defaultdict(Handed)

    def receive(
        self,
        name: str,
        source: int,
        segment: int,
        complete: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """What segment `source` has handed on under a name, for `segment` to compute with; -1 is
        the row before.

        Args:
            complete: makes the whole gradient of what this rank has found; None where it is that.
        """
        if source < 0:
            assert self.lanes is not None
            return self.lanes.values[name][self.rows]
        handed = self._handed[name]
        if not torch.is_grad_enabled() or source // self.reach != segment // self.reach:
            return handed.value(source)
        result: Tensor = _Receive.apply(_end_of_graph(), handed, source, complete)
        return result

    def hand_on(self, name: str, segment: int, out: Tensor, value: Tensor) -> Tensor:
        """Keep `value`, unless an earlier pass has, and return `out`, whose backward also goes
        through `value`.
        """
        handed = self._handed[name]
        if segment not in handed.values:
            handed.keep(segment, self.segments, value.detach(), self.store)
        if not torch.is_grad_enabled():
            return out
        result: Tensor = _HandOn.apply(out, value, handed, segment)
        return result

    def end(self) -> None:
        """Hand on to the rows after what the last segment has handed on, and forget the rest."""
        for name, handed in self._handed.items():
            if self.lanes is not None and self.segments - 1 in handed.values:
                self.lanes.keep(name, self.rows, handed.value(self.segments - 1))
        self._handed.clear()


@dataclass
class Handed:
    """What segments have handed on under one name, and the gradients of it, by segment.

    Attributes:
        values: in a store; those of None lie in `block`.
        block: the memory of all values. By themselves, small tensors that stay among large ones
            that come and go would leave holes in the heap, many times their size; already the
            header of a tensor does.
    """

    values: dict[int, Handle | None] = field(default_factory=dict)
    gradients: dict[int, Tensor] = field(default_factory=dict)
    block: Tensor | None = None

    def value(self, segment: int) -> Tensor:
        handle = self.values[segment]
        if handle is not None:
            return handle.get()
        assert self.block is not None
        # `data`, as a graph that holds another value must not take a new one for a change of it.
        return self.block.data[segment]

    def keep(self, segment: int, segments: int, value: Tensor, store: Store | None) -> None:
        if store is not None and value.nbytes >= SMALLEST_BYTES and store.moves(value):
            # Of its own, not a view of more.
            self.values[segment] = store.put(value.clone())
            return
        if self.block is None:
            self.block = value.new_empty(segments, *value.shape)
        self.block.data[segment].copy_(value)
        self.values[segment] = None

    def take(self, segment: int, gradient: Tensor) -> None:
        """Add the gradient that a later segment has found; float32 or wider, as many may."""
        if segment in self.gradients:
            self.gradients[segment] += gradient
            return
        # Of its own, not a view of that of all that the segment has seen.
        dtype = torch.promote_types(gradient.dtype, torch.float32)
        own = gradient.new_empty(gradient.shape, dtype=dtype)
        self.gradients[segment] = own.copy_(gradient)


class _Receive(torch.autograd.Function):
    """What a segment has handed on. The graph does not hold it, as a leaf would: layers that
    recompute ask for it again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        end: Tensor,
        handed: Handed,
        source: int,
        complete: Callable[[Tensor], Tensor] | None,
    ) -> Tensor:
        ctx.handed, ctx.source, ctx.complete = handed, source, complete
        return handed.value(source)

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[None, ...]:
        found = grad[0] if ctx.complete is None else ctx.complete(grad[0])
        ctx.handed.take(ctx.source, found)
        return None, None, None, None


def _end_of_graph() -> Tensor:
    """What makes autograd go as far as a segment's `_Receive`."""
    return torch.empty(0, requires_grad=True)


class _HandOn(torch.autograd.Function):
    """`out`, whose backward takes the gradient of `value` from what later segments have found."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, value: Tensor, handed: Handed, segment: int) -> Tensor:
        ctx.handed, ctx.segment, ctx.dtype = handed, segment, value.dtype
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor | None, ...]:
        found = ctx.handed.gradients.pop(ctx.segment, None)
        return grad[0], None if found is None else found.to(ctx.dtype), None, None
