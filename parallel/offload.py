"""Tensors that wait in host memory or in a file until they are used again.

What a backward pass asks for first was saved last: whoever gets a saved tensor finds the one that
was saved before it on its way (as in ALST, Bekman et al. 2025, arXiv:2506.13996, section 3.3).
"""

import errno
import os
import tempfile
import weakref
from abc import ABC, abstractmethod
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from parallel.host_memory import available_memory

Where = Literal["host", "disk"]

# What is smaller is not worth the way.
SMALLEST_BYTES = 1 << 12
# Tensors whose writing has not ended: each of them still takes memory.
WRITTEN_AT_A_TIME = 2
# Left to the machine: pinned memory cannot be swapped out.
RESERVED_BYTES = 1 << 30

# torch 2.13 has a public name, 2.11 only the other.
empty_host_cache: Callable[[], None] = (
    getattr(torch.accelerator, "empty_host_cache", None) or torch._C._host_emptyCache
)


class OffloadError(RuntimeError):
    """There is no room for a tensor, or it cannot be read back. The step is not taken."""

    exit_code = 1


@dataclass(frozen=True)
class Offload:
    """Where tensors of a rank wait.

    Attributes:
        folder: on a disk of this machine.
        limit: most bytes of a rank at a time; None is what there is.
    """

    where: Where
    folder: Path | None = None
    limit: int | None = None

    def open(self) -> "Store":
        """Raises OffloadError if the folder cannot be written to."""
        if self.where == "host":
            return HostStore(self.limit)
        assert self.folder is not None
        return FileStore(self.folder, self.limit)


class Handle(ABC):
    """A tensor that has been put away, for as long as somebody holds this.

    Attributes:
        next: what is likely to be wanted after it, as long as somebody holds that.
    """

    next: "Callable[[], Handle | None]"

    def __init__(self) -> None:
        self.next = _nothing

    def get(self, device: torch.device | None = None) -> Tensor:
        """The tensor, on its own device or another; as often as it is wanted.

        What is wanted next is prefetched. Raises OffloadError.
        """
        self.prefetch()
        after = self.next()
        if after is not None:
            after.prefetch()
        tensor = self._arrived()
        return tensor if device is None else tensor.to(device)

    @abstractmethod
    def prefetch(self) -> None:
        """Begin to bring it back, if that has not begun."""

    @abstractmethod
    def _arrived(self) -> Tensor:
        """What `prefetch` brings, on the tensor's own device, once it is there; then forget it."""


class Store(ABC):
    """Where tensors are put.

    Attributes:
        used: bytes now.
        most: the most they were.
    """

    def __init__(self, limit: int | None) -> None:
        self.limit = limit
        self.used = self.most = 0
        self._saved: Callable[[], Handle | None] = _nothing

    def moves(self, tensor: Tensor) -> bool:
        """Whether putting it away frees its memory."""
        return True

    def put(self, tensor: Tensor) -> Handle:
        """Put a tensor away, whose values must not change until nobody holds the handle.

        Its memory is free once nobody else holds the tensor and it has arrived, which is not
        waited for. Raises OffloadError.
        """
        return self._put(tensor.detach())

    @contextmanager
    def keeping_saved_tensors(self) -> Iterator[None]:
        """Put away what autograd saves here, unless that is small."""

        def pack(tensor: Tensor) -> Tensor | Handle:
            if tensor.nbytes < SMALLEST_BYTES:
                return tensor
            handle = self.put(tensor)
            handle.next, self._saved = self._saved, weakref.ref(handle)
            return handle

        def unpack(packed: Tensor | Handle) -> Tensor:
            return packed if isinstance(packed, Tensor) else packed.get()

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield

    @abstractmethod
    def _put(self, tensor: Tensor) -> Handle: ...

    def _take(self, nbytes: int) -> None:
        """Count bytes. Raises OffloadError if they are too many."""
        if self.limit is not None and self.used + nbytes > self.limit:
            raise OffloadError(
                f"no room to offload {_size(nbytes)}: {_size(self.used)} of at most "
                f"{_size(self.limit)} are in use (parallel.offload_gib); raise it, or offload less"
            )
        self.used += nbytes
        self.most = max(self.most, self.used)

    def _give_back(self, nbytes: int) -> None:
        self.used -= nbytes


class HostStore(Store):
    """Pinned memory of this machine. What a GPU puts and gets is copied while it computes, on a
    stream of its own; what is in the memory of this machine already stays where it is.
    """

    def __init__(self, limit: int | None = None) -> None:
        super().__init__(limit)
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        # By their size, kept for other tensors: to pin memory takes long.
        self._free: dict[int, list[Tensor]] = defaultdict(list)

    def moves(self, tensor: Tensor) -> bool:
        return tensor.is_cuda

    def _put(self, tensor: Tensor) -> Handle:
        if not tensor.is_cuda:
            return _Kept(tensor)
        stream = self.stream(tensor.device)
        pinned = self._pinned(tensor.nbytes)
        stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(stream):
            of_shape = pinned[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            of_shape.copy_(tensor, non_blocking=True)
        # Its memory is not given to others before it has been copied.
        tensor.record_stream(stream)
        handle = _Pinned(of_shape, tensor.device, stream)
        weakref.finalize(handle, self._release, pinned)
        return handle

    def stream(self, device: torch.device) -> torch.cuda.Stream:
        """All copies of a device follow one another: a buffer is read before it is written."""
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]

    def _pinned(self, nbytes: int) -> Tensor:
        """Memory for so many bytes."""
        # torch pins powers of two, whatever it is asked for.
        size = 1 << (nbytes - 1).bit_length()
        self._take(size)
        if self._free[size]:
            return self._free[size].pop()
        available = available_memory()
        try:
            if available < size + RESERVED_BYTES:
                self._unpin()
                available = available_memory()
            if available < size + RESERVED_BYTES:
                raise RuntimeError("what is left is for the machine itself")
            return torch.empty(size, dtype=torch.uint8, pin_memory=True)
        except RuntimeError as error:
            self._give_back(size)
            raise OffloadError(
                f"no host memory to offload {_size(size)}: {_size(self.used)} are in use by this "
                f"rank, {_size(available)} available ({error}); offload fewer layers "
                "(parallel.recompute), or to a disk (parallel.offload=disk)"
            ) from None

    def _unpin(self) -> None:
        """Give back what nobody uses: torch keeps what was pinned, also by stores that are gone."""
        self._free.clear()
        empty_host_cache()

    def _release(self, pinned: Tensor) -> None:
        self._free[pinned.nbytes].append(pinned)
        self._give_back(pinned.nbytes)


class _Kept(Handle):
    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self.tensor = tensor

    def prefetch(self) -> None:
        """It is there."""

    def _arrived(self) -> Tensor:
        return self.tensor


class _Pinned(Handle):
    def __init__(self, pinned: Tensor, device: torch.device, stream: torch.cuda.Stream) -> None:
        super().__init__()
        self.pinned, self.device, self.stream = pinned, device, stream
        self._coming: tuple[Tensor, torch.cuda.Event] | None = None

    def prefetch(self) -> None:
        if self._coming is None:
            with torch.cuda.stream(self.stream):
                tensor = self.pinned.to(self.device, non_blocking=True)
                self._coming = tensor, self.stream.record_event()

    def _arrived(self) -> Tensor:
        assert self._coming is not None
        (tensor, event), self._coming = self._coming, None
        current = torch.cuda.current_stream(self.device)
        current.wait_event(event)
        tensor.record_stream(current)
        return tensor


class FileStore(Store):
    """A file without a name, which is gone when the process is, however that ends. One thread
    writes and reads it.
    """

    def __init__(self, folder: Path, limit: int | None = None) -> None:
        super().__init__(limit)
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        except OSError as error:
            raise OffloadError(f"parallel.offload_dir = {folder}: {error}") from None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="offload")
        self._free: dict[int, list[int]] = defaultdict(list)
        self._end = 0
        self._writes: deque[Future[None]] = deque()

    def _put(self, tensor: Tensor) -> Handle:
        while len(self._writes) >= WRITTEN_AT_A_TIME:
            self._writes.popleft().result()
        start = self._place(tensor.nbytes)
        # The copy, if there is one, is a kernel that the event has to come after.
        tensor = tensor.contiguous()
        ready = torch.cuda.current_stream(tensor.device).record_event() if tensor.is_cuda else None
        written = self._thread.submit(self._write, tensor, start, ready)
        self._writes.append(written)
        handle = _InFile(self, start, tensor, written)
        weakref.finalize(handle, self._release, start, tensor.nbytes)
        return handle

    def _place(self, nbytes: int) -> int:
        """Where in the file there is room; the disk has promised it. Raises OffloadError."""
        self._take(nbytes)
        if self._free[nbytes]:
            return self._free[nbytes].pop()
        try:
            if nbytes:
                os.posix_fallocate(self._file.fileno(), self._end, nbytes)
        except OSError as error:
            self._give_back(nbytes)
            raise OffloadError(
                f"parallel.offload_dir = {self.folder} has no room for {_size(nbytes)} more after "
                f"{_size(self._end)}: {error.strerror}; make room, name another folder, or bound "
                "it by parallel.offload_gib"
            ) from None
        start, self._end = self._end, self._end + nbytes
        return start

    def _release(self, start: int, nbytes: int) -> None:
        # What is written there next waits its turn behind what is being read.
        self._free[nbytes].append(start)
        self._give_back(nbytes)

    def _write(self, tensor: Tensor, start: int, ready: torch.cuda.Event | None) -> None:
        if ready is not None:
            # The thread's own device is the first, where it would open a context on its way back.
            with torch.cuda.device(tensor.device):
                stream = torch.cuda.Stream()
                stream.wait_event(ready)
                with torch.cuda.stream(stream):
                    tensor = tensor.cpu()
        view = _bytes(tensor)
        with self._explaining("written"):
            while view:
                done = os.pwrite(self._file.fileno(), view, start)
                view, start = view[done:], start + done

    def read(self, start: int, nbytes: int, is_pinned: bool) -> "Future[Tensor]":
        """Begin to read bytes."""
        return self._thread.submit(self._read, start, nbytes, is_pinned)

    def _read(self, start: int, nbytes: int, is_pinned: bool) -> Tensor:
        content = torch.empty(nbytes, dtype=torch.uint8, pin_memory=is_pinned)
        view = _bytes(content)
        with self._explaining("read"):
            while view:
                done = os.preadv(self._file.fileno(), [view], start)
                if not done:
                    raise OSError(errno.EIO, "the file ends too early")
                view, start = view[done:], start + done
        return content

    @contextmanager
    def _explaining(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OffloadError(
                f"an offloaded tensor cannot be {what} in {self.folder}: {error}"
            ) from None


class _InFile(Handle):
    def __init__(
        self, store: FileStore, start: int, tensor: Tensor, written: "Future[None]"
    ) -> None:
        super().__init__()
        self.store, self.start, self.nbytes = store, start, tensor.nbytes
        self.written = written
        self.shape, self.dtype, self.device = tensor.shape, tensor.dtype, tensor.device
        self._coming: Future[Tensor] | None = None

    def prefetch(self) -> None:
        if self._coming is None:
            is_pinned = self.device.type == "cuda"
            self._coming = self.store.read(self.start, self.nbytes, is_pinned)

    def _arrived(self) -> Tensor:
        assert self._coming is not None
        self.written.result()
        content, self._coming = self._coming.result(), None
        return content.view(self.dtype).view(self.shape).to(self.device, non_blocking=True)


def _bytes(tensor: Tensor) -> memoryview:
    content: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(content)


def _size(nbytes: int) -> str:
    return f"{nbytes / 2**30:.3g} GiB"


def _nothing() -> None:
    return None
