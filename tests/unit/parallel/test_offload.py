"""What is put away comes back bitwise, leaves nothing behind, and says when there is no room."""

import errno
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from parallel import offload
from parallel.feed_forward import tile_feed_forwards
from parallel.offload import FileStore, HostStore, Offload, OffloadError, Store
from parallel.recompute import Recompute, recompute_layers
from pretrain.model.init import initialize
from pretrain.model.kernels.documents import Documents
from pretrain.model.transformer import Transformer
from tests.ranks import ROOT
from tests.unit.parallel.test_recompute import CONFIG, Operations

TENSORS = [
    torch.randn(100, 50),
    torch.randn(30, 40).bfloat16().mT,
    torch.randn(7, 3, 2, dtype=torch.float64),
    torch.arange(9),
    torch.tensor(3.0),
    torch.empty(0, 4),
]
KIB = 1 << 10


@pytest.fixture(params=["host", "disk"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return Offload(request.param, tmp_path / "offloaded").open()


def test_tensors_come_back_bitwise_in_any_order_and_as_often_as_wanted(store: Store) -> None:
    handles = [store.put(tensor) for tensor in TENSORS]
    for number in (5, 0, 3, 0, 4, 2, 1, 0):
        tensor, back = TENSORS[number], handles[number].get(torch.device("cpu"))
        assert (back.dtype, back.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(back, tensor)


def test_the_file_has_no_name_and_is_used_again(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    handles = [store.put(torch.full((64 * KIB,), float(n))) for n in range(4)]
    assert list(tmp_path.iterdir()) == []
    assert store.used == store.most == 4 * 256 * KIB
    size = os.fstat(store._file.fileno()).st_size
    for handle in handles[1:3]:
        handle.prefetch()
    del handle, handles[1:3]
    assert store.used == 2 * 256 * KIB
    handles += [store.put(torch.full((64 * KIB,), float(n))) for n in (5, 6)]
    assert [float(handle.get()[-1]) for handle in handles] == [0, 3, 5, 6]
    assert os.fstat(store._file.fileno()).st_size == size


def test_a_killed_process_leaves_nothing_on_the_disk(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys, torch\n"
        "from pathlib import Path\n"
        "from parallel.offload import FileStore\n"
        "handle = FileStore(Path(sys.argv[1])).put(torch.ones(1000))\n"
        "assert handle.get().sum() == 1000\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert list(tmp_path.iterdir()) == []


def test_a_backward_pass_has_what_it_wants_next_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = FileStore(tmp_path)
    reads: list[int] = []
    read = store.read
    monkeypatch.setattr(
        store, "read", lambda start, *more: (reads.append(start // 4096), read(start, *more))[1]
    )
    results = [torch.ones(KIB, requires_grad=True)]
    with store.keeping_saved_tensors():
        for _ in range(4):
            results.append(results[-1].sin())
    fetched: list[int] = []
    for result in results[:-1]:
        result.register_hook(lambda _: fetched.append(len(reads)))
    results[-1].sum().backward()
    assert reads == [3, 2, 1, 0]
    assert fetched == [2, 3, 4, 4]


def test_what_is_put_away_by_itself_comes_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = FileStore(tmp_path)
    first, second = (store.put(torch.full((8,), float(n))) for n in range(2))
    read, reads = store.read, []
    monkeypatch.setattr(store, "read", lambda *where: (reads.append(where), read(*where))[1])
    assert float(second.get()[0]) == 1
    assert len(reads) == 1
    assert float(first.get()[0]) == 0


def test_a_gpu_has_copied_a_tensor_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[object] = []

    class OnGPU(Tensor):
        is_cuda = True

    class Launches(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            started.append(func)
            return func(*args, **(kwargs or {}))

    def stream_of(_: torch.device) -> Any:
        return SimpleNamespace(record_event=lambda: started.append("ready"))

    monkeypatch.setattr(torch.cuda, "current_stream", stream_of)
    monkeypatch.setattr(FileStore, "_write", lambda *_: None)
    tensor = torch.randn(30, 40).as_subclass(OnGPU).mT
    with Launches():
        FileStore(tmp_path).put(tensor)
    # A kernel makes it contiguous; the writing thread waits for what came before the event.
    assert started[-2:] == [torch.ops.aten.clone.default, "ready"]


def test_a_bound_is_kept_and_what_is_in_use_is_told(tmp_path: Path) -> None:
    store = Offload("disk", tmp_path, limit=512 * KIB).open()
    first = store.put(torch.zeros(100 * KIB))
    with pytest.raises(OffloadError, match=r"no room .* are in use \(parallel.offload_gib\)"):
        store.put(torch.zeros(100 * KIB))
    del first
    store.put(torch.zeros(100 * KIB))


def test_a_full_disk_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = FileStore(tmp_path)
    kept = store.put(TENSORS[0])

    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(OffloadError, match=r"has no room for .*No space left on device; make"):
            store.put(torch.zeros(8))
    assert torch.equal(kept.get(), TENSORS[0])
    assert torch.equal(store.put(TENSORS[3]).get(), TENSORS[3])


@pytest.mark.parametrize(("function", "what"), [("pwrite", "written"), ("preadv", "read")])
def test_a_broken_disk_is_told_and_not_computed_with(
    function: str, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, function, broken)
    store = FileStore(tmp_path)
    handle = store.put(TENSORS[0])
    with pytest.raises(OffloadError, match=f"cannot be {what} in .*Input/output error"):
        handle.get()


def test_a_folder_that_cannot_be_written_to_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OffloadError, match=r"parallel\.offload_dir = "):
        FileStore(tmp_path / "file" / "folder")


def test_pinned_memory_leaves_the_machine_some(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "available_memory", lambda: offload.RESERVED_BYTES + 100)
    store = HostStore()
    with pytest.raises(OffloadError, match=r"no host memory to offload .*parallel.offload=disk"):
        store._pinned(101)
    assert store.used == 0


def test_a_bound_counts_what_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "available_memory", lambda: 4 * offload.RESERVED_BYTES)
    store = HostStore(limit=127)
    with pytest.raises(OffloadError, match=r"no room .*parallel.offload_gib"):
        store._pinned(65)
    assert store.used == 0


def train(
    store: Store | None, mode: Recompute, tile: int | None
) -> tuple[dict[str, Tensor], int, Counter[object]]:
    """A step's gradients, the activations kept after forward, and the backward's operations."""
    model = Transformer(CONFIG)
    initialize(model, CONFIG, seed=0)
    if tile is not None:
        tile_feed_forwards(model.layers.values(), tile)
    recompute_layers(dict(model.layers.items()), [mode], store)
    tokens = torch.randint(50, (2, 320), generator=torch.Generator().manual_seed(0))
    documents = Documents.whole_rows(*tokens.shape)
    with Operations() as forward:
        out = model(tokens, documents, lambda hidden, _: hidden)
    if isinstance(store, FileStore):
        while store._writes:
            store._writes.popleft().result()
    known = [*model.parameters(), tokens, documents.position, out.value]
    kept = forward.live_bytes(except_for=known)
    with Operations() as backward:
        (out.value.square().mean() + out.balance.sum() + out.z.sum()).backward()
    gradients = {name: w.grad for name, w in model.named_parameters() if w.grad is not None}
    return gradients, kept, backward.calls


@pytest.mark.parametrize(("mode", "tile"), [("full", None), ("full", 100), ("selective", 100)])
def test_layers_keep_their_inputs_elsewhere(
    mode: Recompute, tile: int | None, store: Store, tmp_path: Path
) -> None:
    gradients, kept, operations = train(store, mode, tile)
    expected, all_kept, all_operations = train(None, mode, tile)
    assert gradients.keys() == expected.keys()
    assert all(torch.equal(gradients[name], expected[name]) for name in expected)
    assert operations[torch.ops.aten.mm.default] == all_operations[torch.ops.aten.mm.default]
    assert store.used == 0, "nothing is held once it was used"
    inputs = CONFIG.n_layers * 2 * 320 * CONFIG.d_model * 4
    if isinstance(store, FileStore):
        assert store.most == inputs == all_kept - kept
