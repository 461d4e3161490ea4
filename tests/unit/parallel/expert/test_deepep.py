import inspect

import pytest
import torch

from parallel.expert.deepep import DeepEPDispatch, why_unavailable
from parallel.expert.dispatch import AllToAllDispatch


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


def test_both_dispatchers_fit_the_same_seam() -> None:
    signatures = [
        [inspect.signature(method) for method in (dispatcher.__init__, dispatcher.__call__)]
        for dispatcher in (AllToAllDispatch, DeepEPDispatch)
    ]
    assert signatures[0] == signatures[1]
