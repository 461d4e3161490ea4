"""Which backend attends on which machine, and what is called with which layout."""

import math
import sys
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pretrain.model.kernels import backends
from pretrain.model.kernels.backends import (
    Setting,
    choose_backend,
    choose_rule,
    kernels_in_use,
    usable_backends,
)
from pretrain.model.kernels.block_attention import (
    BACKENDS,
    block_attention,
    block_attention_backward,
)

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
VOLTA, AMPERE, HOPPER, BLACKWELL = (7, 0), (8, 0), (9, 0), (10, 0)
BOTH = frozenset({"flash_attn_2", "flash_attn_3"})
NONE: frozenset[str] = frozenset()
FLA = frozenset({"fla"})
ONLY_2 = frozenset({"flash_attn_2"})
CUDNN = frozenset({"torch_cudnn"})


def on_gpu(
    capability: tuple[int, int],
    dtype: torch.dtype = BF16,
    head_dim: int = 128,
    installed: frozenset[str] = BOTH,
    deterministic: bool = False,
) -> Setting:
    return Setting("cuda", capability, dtype, head_dim, installed, deterministic)


def label(case: Setting | str) -> str:
    """The same in every process, as the text of a set is not."""
    if isinstance(case, str):
        return case
    return str(case._replace(installed=sorted(case.installed)))


@pytest.mark.parametrize(
    ("setting", "backend"),
    [
        (on_gpu(HOPPER), "flash_attn_3"),
        (on_gpu(HOPPER, head_dim=256), "flash_attn_3"),
        (on_gpu(HOPPER, head_dim=192, deterministic=True), "flash_attn_3"),
        (on_gpu(HOPPER, head_dim=256, deterministic=True), "flash_attn_2"),
        (on_gpu(HOPPER, installed=ONLY_2), "flash_attn_2"),
        (on_gpu(HOPPER, installed=NONE), "torch_flash"),
        (on_gpu(BLACKWELL), "flash_attn_2"),
        (on_gpu(AMPERE), "flash_attn_2"),
        (on_gpu(AMPERE, FP16), "flash_attn_2"),
        (on_gpu(AMPERE, installed=NONE), "torch_flash"),
        (on_gpu(AMPERE, head_dim=264), "torch_efficient"),
        (on_gpu(AMPERE, head_dim=100), "reference"),
        (on_gpu(HOPPER, FP32), "torch_efficient"),
        (on_gpu(HOPPER, FP32, head_dim=100), "torch_efficient"),
        (on_gpu(HOPPER, FP32, head_dim=98), "reference"),
        (on_gpu(HOPPER, FP64), "reference"),
        (on_gpu(VOLTA, FP16), "torch_efficient"),
        (on_gpu(VOLTA, BF16), "reference"),
        (Setting("cpu", (0, 0), BF16, 100, BOTH, False), "cpu_flash"),
        (Setting("cpu", (0, 0), FP64, 16, NONE, True), "cpu_flash"),
        (Setting("mps", (0, 0), BF16, 128, BOTH, False), "reference"),
    ],
    ids=label,
)
def test_choice(setting: Setting, backend: str) -> None:
    assert choose_backend(setting) == backend


@pytest.mark.parametrize(
    ("setting", "rule"),
    [
        (on_gpu(HOPPER, installed=FLA), "fla"),
        (on_gpu(AMPERE, FP16, installed=FLA), "fla"),
        (on_gpu(HOPPER, head_dim=264, installed=FLA), "torch"),
        (on_gpu(HOPPER, FP32, installed=FLA), "torch"),
        (on_gpu(VOLTA, FP16, installed=FLA), "torch"),
        (on_gpu(HOPPER), "torch"),
        (Setting("cpu", (0, 0), BF16, 128, FLA, False), "torch"),
    ],
    ids=label,
)
def test_choice_of_the_gated_delta_rule(setting: Setting, rule: str) -> None:
    assert choose_rule(setting) == rule


def test_cudnn_computes_what_recurs_where_it_is_the_fastest() -> None:
    usable = usable_backends(on_gpu(HOPPER, installed=NONE))
    assert usable == ("torch_flash", "torch_cudnn", "torch_efficient", "reference")
    recurring = [
        (on_gpu(HOPPER, installed=CUDNN), "torch_cudnn"),
        (on_gpu(HOPPER, installed=CUDNN, head_dim=256), "torch_cudnn"),
        (on_gpu(HOPPER, installed=CUDNN | ONLY_2), "torch_cudnn"),
        (on_gpu(HOPPER, installed=CUDNN | BOTH), "flash_attn_3"),
        (on_gpu(HOPPER, installed=CUDNN, deterministic=True), "torch_flash"),
        (on_gpu(HOPPER, installed=NONE), "torch_flash"),
        (on_gpu(AMPERE, installed=CUDNN), "torch_flash"),
    ]
    for setting, backend in recurring:
        assert choose_backend(setting, recurs=True) == backend
        assert choose_backend(setting) == usable_backends(setting)[0]
    assert set(usable_backends(on_gpu(HOPPER))) == set(BACKENDS) - {"cpu_flash"}


def test_a_package_that_does_not_load_is_named_and_not_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    (tmp_path / "flash_attn_2_cuda.py").write_text("raise ImportError('undefined symbol: _ZN3')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.warns(
        UserWarning, match=r"flash_attn_2_cuda is installed but .*: undefined symbol"
    ):
        assert not backends._loads("flash_attn_2_cuda", AMPERE)
    for module in [name for name in sys.modules if name.startswith("fla.") or name == "fla"]:
        monkeypatch.delitem(sys.modules, module)
    assert not backends._loads("flash_attn_3_that_is_not_there._C", HOPPER)


@pytest.mark.parametrize(
    ("fla", "triton", "capability", "problem"),
    [
        ("0.4.1", "3.7.1", HOPPER, "older than 0.5"),
        ("0.6.0", "3.6.0+git1", HOPPER, "Triton 3.6.0.* take Triton 3.7.1"),
        ("0.6.0", "3.6.0", AMPERE, None),
        ("0.6.0", "3.3.1", HOPPER, None),
        ("0.6.0", "3.7.1", HOPPER, None),
    ],
)
def test_linear_attention_is_not_left_to_versions_that_compute_it_wrong(
    fla: str,
    triton: str,
    capability: tuple[int, int],
    problem: str | None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Any,
) -> None:
    rule = tmp_path / "fla" / "ops" / "gated_delta_rule"
    rule.mkdir(parents=True)
    for package in (tmp_path / "fla", tmp_path / "fla" / "ops", rule):
        (package / "__init__.py").write_text(f"__version__ = {fla!r}")
    monkeypatch.syspath_prepend(tmp_path)
    for module in [name for name in sys.modules if name.startswith("fla.") or name == "fla"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(backends, "version", {"triton": triton}.__getitem__)
    try:
        if problem is None:
            assert backends._loads("fla.ops.gated_delta_rule", capability)
        else:
            with pytest.warns(UserWarning, match=problem):
                assert not backends._loads("fla.ops.gated_delta_rule", capability)
    finally:
        for module in [name for name in sys.modules if name.startswith("fla.") or name == "fla"]:
            del sys.modules[module]


def test_what_a_run_prints() -> None:
    printed = kernels_in_use(torch.device("cpu"), BF16, 64, 64)
    assert printed == "attention cpu_flash, gated delta rule torch"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_package_is_imported_where_there_is_no_gpu() -> None:
    assert not {name for name in sys.modules if name.startswith(("flash_attn", "fla."))}


@pytest.mark.parametrize("backend", ["torch_flash", "torch_cudnn", "torch_efficient"])
def test_kernels_of_torch_get_what_they_read(backend: str) -> None:
    """They take strides of queries from the tensor, and those of lse and out for granted.

    On meta tensors, as slices of larger ones that zigzag layouts hand over.
    """
    B, H, Hkv, Tq, Tk, D = 2, 4, 2, 40, 70, 64
    merged_out = torch.empty(B, H, 2 * Tq, D, device="meta", dtype=BF16)
    merged_lse = torch.empty(B, H, 2 * Tq, device="meta")
    out, lse = merged_out[:, :, Tq:], merged_lse[:, :, Tq:]
    q = torch.empty_like(out)
    k, v = torch.empty(2, B, Hkv, Tk, D, device="meta", dtype=BF16)
    options: dict[str, Any] = {"causal": False, "scale": 0.1, "backend": backend}

    block_out, block_lse = block_attention(q, k, v, **options)
    assert (block_out.shape, block_lse.shape) == (q.shape, lse.shape)
    with _Arguments() as seen:
        gradients = block_attention_backward(q, q, k, v, out, lse, **options)
    assert [x.shape for x in gradients] == [q.shape, k.shape, v.shape]

    read = seen.arguments
    assert read["logsumexp"].is_contiguous()
    expected = {
        "torch_flash": (B, H, Tq),
        "torch_cudnn": (B, H, Tq, 1),
        "torch_efficient": (B, H, math.ceil(Tq / 32) * 32),
    }
    assert read["logsumexp"].shape == expected[backend]
    if backend == "torch_efficient":
        assert read["out"].transpose(1, 2).is_contiguous()
        assert read["key"].shape[1] == read["value"].shape[1] == H


class _Arguments(TorchDispatchMode):
    """Remembers what attention's backward operation was called with."""

    def __init__(self) -> None:
        super().__init__()
        self.arguments: dict[str, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "attention_backward" in func.name():
            names = (argument.name for argument in func._schema.arguments)
            self.arguments = dict(zip(names, args, strict=False)) | (kwargs or {})
        return func(*args, **(kwargs or {}))
