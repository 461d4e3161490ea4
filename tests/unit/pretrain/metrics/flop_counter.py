"""torch's count of operations, with formulas for those that it does not know.

Shapes of arguments take the place of tensors, as torch gives them.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

# It registers the operations.
from pretrain.model.kernels import experts_loop, gated_delta_scan  # noqa: F401

Shape = Sequence[int]


def counted(compute: Callable[[], Any]) -> float:
    """Of all that `compute` runs, backward passes included."""
    counter = FlopCounterMode(display=False, custom_mapping=FORMULAS)
    with counter:
        compute()
    return float(counter.get_total_flops())


def in_place_product(_: Shape, a: Shape, b: Shape, *__: Any, **___: Any) -> int:
    """baddbmm_, of which torch knows the other form."""
    return 2 * a[0] * a[1] * a[2] * b[2]


def triangular_inverse(A: Shape, B: Shape, **_: Any) -> int:  # noqa: N803
    """solve_triangular: half of the product of its factors."""
    return A[0] * A[1] * A[2] * B[2]


def grouped_product(a: Shape, b: Shape, *_: Any, **__: Any) -> int:
    """Each row of a [N, k] by one of b [E, k, m]; or columns of a [m, N] by rows of b [N, k]."""
    return 2 * a[0] * a[1] * b[-1]


def attention(
    q: Shape, k: Shape, v: Shape, dropout: float = 0.0, is_causal: bool = False, **_: Any
) -> int:
    return 2 * 2 * q[-1] * pairs(q, k, is_causal)


def attention_backward(
    _: Shape, q: Shape, k: Shape, v: Shape, __: Any, ___: Any, ____: Any, is_causal: bool, **_5: Any
) -> int:
    """Four products of gradients, and q k^T once more."""
    return 5 * 2 * q[-1] * pairs(q, k, is_causal)


def pairs(q: Shape, k: Shape, is_causal: bool) -> int:
    B, H, T, _ = q
    return B * H * (T * (T + 1) // 2 if is_causal else T * k[2])


def mixture(x: Shape, weights: Shape, *others: Any, **_: Any) -> int:
    """Three products of [slots, d] and [d, I]."""
    down = others[3]
    return 3 * 2 * weights[0] * down[1] * down[2]


def mixture_backward(d_out: Shape, x: Shape, weights: Shape, *others: Any, **_: Any) -> int:
    down, of_inputs, of_experts = others[4:7]
    product = 2 * weights[0] * down[1] * down[2]
    return product + 2 * product * of_inputs + 3 * product * of_experts


def scan(q: Shape, k: Shape, v: Shape, *others: Any, **_: Any) -> int:
    """All blocks know the state that comes in."""
    n, C, D, E = chunks_of(q, v, others[-1])
    of_pairs, of_state = C * C, C * D * E
    return 2 * n * (of_pairs * (3 * D + 2 * E) + 3 * of_state) + n * C**3


def scan_backward(_: Any, __: Any, q: Shape, k: Shape, v: Shape, *others: Any, **___: Any) -> int:
    """All of `scan` but the outputs, and the gradients."""
    n, C, D, E = chunks_of(q, v, others[-1])
    of_pairs, of_state = C * C, C * D * E
    again = 2 * n * (of_pairs * (3 * D + E) + 2 * of_state) + n * C**3
    return again + 2 * n * (4 * of_pairs * (D + E) + 6 * of_state)


def chunks_of(q: Shape, v: Shape, chunk: int) -> tuple[int, int, int, int]:
    B, H, T, E = v
    return B * H * -(-T // chunk), chunk, q[-1], E


aten, farspan = torch.ops.aten, torch.ops.farspan
FORMULAS: dict[Any, Any] = {
    aten.baddbmm_: in_place_product,
    aten.linalg_solve_triangular: triangular_inverse,
    aten._grouped_mm: grouped_product,
    aten._scaled_dot_product_flash_attention_for_cpu: attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
    farspan.looped_mixture: mixture,
    farspan.looped_mixture_backward: mixture_backward,
    farspan.gated_delta_scan: scan,
    farspan.gated_delta_scan_backward: scan_backward,
}
