"""How flash-linear-attention is called; its kernels run on GPUs only.

Without a GPU a function stands in for them that does what their documentation says, document by
document. With one, and with the package, they are compared themselves.
"""

import sys
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pretrain.model.kernels import backends
from pretrain.model.kernels.documents import Documents
from pretrain.model.kernels.gated_delta import gated_delta_recurrent, gated_delta_rule

ROWS = [[[130], [130]], [[30, 100], [64, 66]], [[1, 1, 128], [130]]]


def documented(
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float,
    initial_state: Tensor | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
    cu_seqlens_cpu: Tensor | None,
) -> tuple[Tensor, Tensor]:
    assert output_final_state
    assert q.dtype == k.dtype == v.dtype
    heads_first = [x.transpose(1, 2) for x in (q, k, v, g, beta)]
    if cu_seqlens is None:
        rule = gated_delta_recurrent
        out, state = rule(*heads_first, initial_state=initial_state, scale=scale)
        return out.transpose(1, 2), state
    assert cu_seqlens_cpu is not None
    assert len(q) == 1
    results = []
    for n, (start, stop) in enumerate(pairwise(cu_seqlens.tolist())):
        state = None if initial_state is None else initial_state[n : n + 1]
        document = [x[:, :, start:stop] for x in heads_first]
        results.append(gated_delta_recurrent(*document, initial_state=state, scale=scale))
    outs, states = zip(*results, strict=True)
    return torch.cat(outs, 2).transpose(1, 2), torch.cat(states)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> str:
    if torch.cuda.is_available() and "fla" in backends._installed(
        torch.cuda.get_device_capability()
    ):
        return "cuda"
    names = ("fla", "fla.ops", "fla.ops.gated_delta_rule")
    for name in names:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules[names[-1]].chunk_gated_delta_rule = documented  # type: ignore[attr-defined]
    return "cpu"


@pytest.mark.parametrize("has_state", [True, False])
@pytest.mark.parametrize("rows", ROWS, ids=str)
def test_equals_the_recurrence(device: str, rows: list[list[int]], has_state: bool) -> None:
    dtype = torch.bfloat16 if device == "cuda" else torch.float64
    tolerance = 2e-2 if device == "cuda" else 1e-12
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(2, *shape, generator=generator, dtype=torch.float64)

    q, k = (F.normalize(normal(2, 130, 64), dim=-1) for _ in range(2))
    g, beta = -0.1 * F.softplus(normal(4, 130)), normal(4, 130).sigmoid()
    inputs = [x.to(dtype) for x in (q, k, normal(4, 130, 64), g, beta, normal(4, 64, 64))]
    documents = Documents.from_lengths(rows)

    def results(rule: Any, inputs: list[Tensor], documents: Documents) -> list[Tensor]:
        *inputs, state = (x.requires_grad_() for x in inputs)
        options = {"initial_state": state} if has_state else {}
        out, last = rule(*inputs, documents=documents, scale=0.3, **options)
        leaves = [*inputs, *options.values()]
        return [out, last, *torch.autograd.grad(out.sum() + 2 * last.sum(), leaves)]

    expected = results(gated_delta_recurrent, [x.double() for x in inputs], documents)
    there = documents.to(torch.device(device))
    ours = results(
        lambda *x, **options: gated_delta_rule(*x, **options, backend="fla"),
        [x.to(device) for x in inputs],
        there,
    )
    assert ours[0].dtype == dtype
    for x, y in zip(ours, expected, strict=True):
        assert (x.double().cpu() - y).norm() <= tolerance * y.norm()
