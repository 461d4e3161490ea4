from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.model.kernels.experts_grouped import grouped_mixture
from pretrain.model.kernels.experts_loop import looped_mixture
from pretrain.model.kernels.slots import queue_positions, sort_by_expert

Mixture = Callable[..., Tensor]
N_EXPERTS = 5

ROUTINGS = {
    "every choice": [[0, 2], [2, 0], [4, 2], [0, 4], [2, 1]],
    "dropped and idle": [[0, -1], [-1, -1], [4, 0], [-1, 2], [2, 4]],
    "one expert": [[3, -1], [3, -1], [3, -1], [3, -1], [3, -1]],
    "none": [[-1, -1]] * 5,
    "no tokens": [],
}


def definition(
    x: Tensor, weights: Tensor, indices: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    out = [token * 0 for token in x]
    for n, choices in enumerate(indices.tolist()):
        for k, e in enumerate(choices):
            if e >= 0:
                gate, up = (gate_up[e] @ x[n]).chunk(2)
                out[n] = out[n] + weights[n, k] * (down[e] @ (F.silu(gate) * up))
    return torch.stack(out) if out else x * 0


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize(
    ("mixture", "dtype", "tolerance"),
    [
        (looped_mixture, torch.float64, 1e-12),
        (looped_mixture, torch.float32, 1e-5),
        (looped_mixture, torch.bfloat16, 2e-2),
        (grouped_mixture, torch.float32, 1e-5),
        (grouped_mixture, torch.bfloat16, 2e-2),
    ],
)
def test_a_mixture_matches_its_definition(
    mixture: Mixture, dtype: torch.dtype, tolerance: float, routing: str
) -> None:
    torch.manual_seed(0)
    indices = torch.tensor(ROUTINGS[routing], dtype=torch.int64).view(-1, 2)
    shapes = [(len(indices), 16), indices.shape, (N_EXPERTS, 16, 16), (N_EXPERTS, 16, 8)]
    exact = [torch.randn(shape).to(dtype).double().requires_grad_() for shape in shapes]
    ours = [tensor.detach().to(dtype).requires_grad_() for tensor in exact]
    slots = sort_by_expert(indices, N_EXPERTS, int((indices >= 0).sum()))

    x, weights, gate_up, down = exact
    expected = definition(x, weights, indices, gate_up, down)
    out = mixture(ours[0], ours[1], slots, ours[2], ours[3])
    d_out = torch.randn(len(indices), 16).to(dtype)
    out.backward(d_out)
    wanted = torch.autograd.grad(expected, exact, d_out.double(), materialize_grads=True)

    assert out.dtype == dtype
    for a, b in zip([out, *(t.grad for t in ours)], [expected, *wanted], strict=True):
        assert a is not None
        assert (a.double() - b).norm() <= tolerance * b.norm()


def test_places_in_the_queue_of_an_expert_are_counted_by_row() -> None:
    indices = torch.tensor([[[0, 1], [1, 2], [0, 2]], [[1, 0], [1, 2], [1, 2]]])
    assert queue_positions(indices, 3).tolist() == [
        [[0, 0], [1, 0], [1, 1]],
        [[0, 0], [1, 0], [2, 1]],
    ]
