"""Training on rows that are longer than what is computed at a time.

Backpropagation through time with the activations of one segment (Chen et al. 2016,
arXiv:1604.06174, applied to time): a pass without gradients leaves what segments hand on, and then
each segment is computed again and goes backward, the last one first. With `reach` as many as there
are segments the gradient is exactly that of the whole row; with fewer it is cut between groups of
so many (Williams & Peng 1990, doi:10.1162/neco.1990.2.4.490).
"""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from parallel.offload import Store
from parallel.segments.documents import SegmentDocuments
from parallel.segments.memory import SegmentMemory

# Of <malloc.h>, and from how many bytes on a tensor has pages of its own.
M_MMAP_THRESHOLD, PAGED_BYTES = -3, 1 << 20


class SegmentedStage:
    """The whole model on each rank: microbatches one after the other, in segments.

    Args:
        store: where what segments hand on waits; None leaves it on the device.

    Attributes:
        trained: numbers of the segments that the newest step has gone through with labels, in that
            order, of one microbatch after the other.
    """

    def __init__(self, stage: Any, microbatch: int, store: Store | None = None) -> None:
        self.stage = stage
        self.microbatch = microbatch
        self.store = store
        self.trained: list[int] = []
        _page_tensors()

    def forward_backward(self, tokens: Tensor, labels: Tensor) -> None:
        """Add the gradient of a step to the weights'. Collective.

        The stage's `documents` are the segments of each microbatch.

        Args:
            tokens, labels: [rows, T / cp], this rank's tokens, segment by segment.
        """
        columns = (x.split(self.microbatch) for x in (tokens, labels))
        microbatches = list(zip(*columns, self.stage.documents, strict=True))
        self.trained = []
        while microbatches:
            of_tokens, of_labels, segments = microbatches.pop(0)
            memory: SegmentMemory = segments[0].memory
            memory.store = self.store
            halves = (x.chunk(len(segments), dim=1) for x in (of_tokens, of_labels))
            parts = list(zip(*halves, segments, strict=True))
            for first in range(0, len(parts), memory.reach):
                group = parts[first : first + memory.reach]
                self._train(group)
            memory.end()

    def as_rows(self, seen: Sequence[Tensor]) -> Tensor:
        """What the stage has made of each segment with labels of the newest step, [b, T_segment] in
        the order in which it did so, as the rows [rows, T] that it was given.
        """
        segments = 1 + max(self.trained)
        microbatches = (range(i, i + segments) for i in range(0, len(seen), segments))
        rows = (
            torch.cat([seen[i] for i in sorted(microbatch, key=lambda i: self.trained[i])], dim=1)
            for microbatch in microbatches
        )
        return torch.cat(list(rows))

    def _train(self, group: Sequence[tuple[Tensor, Tensor, SegmentDocuments]]) -> None:
        with torch.no_grad():
            for tokens, _, segment in group[:-1]:
                self.stage(tokens, None, segment)
                segment.forget_plans()
        for tokens, labels, segment in reversed(group):
            # FSDP reduces the gradient after each segment: kept until the last, it would be whole.
            self.stage(tokens, labels, segment).backward()
            self.trained.append(segment.number)
            segment.forget_plans()


def _page_tensors() -> None:
    """Let the C library give what tensors leave back to the system at once.

    Those of segments differ in size, as experts get other numbers of tokens: glibc's heap would
    grow with each segment by what does not fit into the holes of the segments before.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(M_MMAP_THRESHOLD, PAGED_BYTES)
