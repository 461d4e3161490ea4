import inspect
import sys
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from parallel.expert.deepep import DeepEPDispatch, why_unavailable
from parallel.expert.dispatch import AllToAllDispatch


@pytest.fixture
def deep_ep(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A package of that name, with nothing in it."""
    package = module_from_spec(ModuleSpec("deep_ep", None))
    monkeypatch.setitem(sys.modules, "deep_ep", package)
    return package


class OneRank:
    """What DeepEP's ElasticBuffer of one rank does, in the same order."""

    def __init__(self, group: Any, num_max_tokens_per_rank: int, **others: Any) -> None:
        self.num_max_tokens_per_rank = num_max_tokens_per_rank

    def get_theoretical_num_sms(self, num_experts: int, num_topk: int) -> int:
        assert num_experts % 1 == 0
        return 4

    def dispatch(
        self,
        x: Tensor,
        topk_idx: Any = None,
        topk_weights: Any = None,
        num_experts: Any = None,
        num_sms: int = 0,
        async_with_compute_stream: bool = False,
        handle: Any = None,
    ) -> tuple[Any, ...]:
        num_topk = (handle.topk_idx if topk_idx is None else topk_idx).shape[1]
        num_sms = num_sms or self.get_theoretical_num_sms(num_experts, num_topk)
        if handle is None:
            received = topk_idx.flatten().bincount(minlength=num_experts).tolist()
            handle = SimpleNamespace(
                topk_idx=topk_idx, num_sms=num_sms, num_recv_tokens_per_expert_list=received
            )
        assert num_sms == handle.num_sms
        return x.clone(), topk_idx, topk_weights, handle, Event()

    def combine(
        self,
        x: Tensor,
        handle: Any,
        topk_weights: Any = None,
        async_with_compute_stream: bool = False,
    ) -> tuple[Any, ...]:
        return x.clone(), topk_weights, Event()


class Event:
    def current_stream_wait(self) -> None: ...


@pytest.mark.parametrize(
    ("device", "dtype", "reason"),
    [
        ("cpu", torch.bfloat16, "needs CUDA, and this is cpu"),
        ("cuda", torch.float32, "bfloat16 only, and train.dtype is torch.float32"),
        ("cuda", torch.bfloat16, "github.com/deepseek-ai/DeepEP"),
    ],
)
def test_a_machine_that_cannot_run_deepep_is_told_why_and_what_works(
    device: str, dtype: torch.dtype, reason: str
) -> None:
    refusal = why_unavailable(torch.device(device), dtype)
    assert refusal is not None
    assert refusal.startswith("parallel.dispatcher = deepep ")
    assert reason in refusal
    assert refusal.endswith("parallel.dispatcher=all_to_all runs anywhere")


def test_deepep_1_is_told_from_2(deep_ep: ModuleType) -> None:
    refusal = why_unavailable(torch.device("cuda"), torch.bfloat16)
    assert refusal is not None
    assert "needs the package deep_ep 2.x" in refusal
    assert "cannot import name 'ElasticBuffer'" in refusal
    deep_ep.ElasticBuffer = OneRank  # type: ignore[attr-defined]
    assert why_unavailable(torch.device("cuda"), torch.bfloat16) is None


def test_gradients_go_back_through_both_ways(deep_ep: ModuleType) -> None:
    deep_ep.ElasticBuffer = OneRank  # type: ignore[attr-defined]
    dispatch = DeepEPDispatch(SimpleNamespace(group=None, size=1), n_experts=4)  # type: ignore[arg-type]
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    expert_weights = torch.rand(5, 2, dtype=torch.float64, requires_grad=True)
    expert_indices = torch.tensor([[0, 1], [2, 3], [1, 3], [0, 2], [3, 0]])

    def experts(x: Tensor, expert_weights: Tensor, slots: Any) -> Tensor:
        return x.tanh() * expert_weights.prod(1, keepdim=True)

    def mix(x: Tensor, expert_weights: Tensor) -> Tensor:
        return dispatch(x, expert_indices, expert_weights, experts)()

    assert torch.autograd.gradcheck(mix, (x, expert_weights))


def test_both_dispatchers_fit_the_same_seam() -> None:
    signatures = [
        [inspect.signature(method) for method in (dispatcher.__init__, dispatcher.__call__)]
        for dispatcher in (AllToAllDispatch, DeepEPDispatch)
    ]
    assert signatures[0] == signatures[1]
