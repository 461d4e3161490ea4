"""Softmax attention of a block of queries over a block of keys: the one interface that whole,
packed and context-parallel attention is written on. One file per backend implements it.

Blocks over disjoint keys are merged by their log-sum-exp; their gradients simply add up when each
block's backward gets the merged out and lse (FlashAttention-2, arXiv:2307.08691, section 3.1).
"""

from types import ModuleType

from torch import Tensor

from pretrain.model.kernels import (
    cpu_flash,
    flash_attn_2,
    flash_attn_3,
    reference,
    torch_cudnn,
    torch_efficient,
    torch_flash,
)
from pretrain.model.kernels.backends import Setting, choose_backend

BACKENDS: dict[str, ModuleType] = {
    "cpu_flash": cpu_flash,
    "flash_attn_2": flash_attn_2,
    "flash_attn_3": flash_attn_3,
    "reference": reference,
    "torch_cudnn": torch_cudnn,
    "torch_efficient": torch_efficient,
    "torch_flash": torch_flash,
}


def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    scale: float,
    recurs: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax(scale * q k^T) v and the log-sum-exp of its rows.

    Args:
        q: [B, H, Tq, D].
        k, v: [B, Hkv, Tk, D]; each key head serves H / Hkv consecutive query heads.
        causal: query i sees the keys 0..i; needs Tq == Tk.
        recurs: blocks of these lengths come again and again.
        backend: a name in `BACKENDS`; by default the one that `choose_backend` prefers.

    Returns:
        out [B, H, Tq, D] in q's dtype, lse [B, H, Tq] in float32 (float64 for float64 inputs).
    """
    _check_shapes(q, k, v, causal)
    return _backend(q, backend, recurs).forward(q, k, v, causal, scale)


def block_attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    causal: bool,
    scale: float,
    recurs: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """This block's part of the gradients of q, k and v.

    out and lse are those of all the keys that the queries see, here and in other blocks.
    """
    _check_shapes(q, k, v, causal)
    return _backend(q, backend, recurs).backward(dout, q, k, v, out, lse, causal, scale)


def _backend(q: Tensor, name: str | None, recurs: bool) -> ModuleType:
    if name is None:
        name = choose_backend(Setting.here(q.device, q.dtype, q.shape[-1]), recurs)
    if name not in BACKENDS:
        raise ValueError(f"attention backend {name!r} is unknown; there are {', '.join(BACKENDS)}")
    return BACKENDS[name]


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> None:
    B, H, Tq, D = q.shape
    _, Hkv, Tk, _ = k.shape
    if k.shape != (B, Hkv, Tk, D) or v.shape != k.shape or H % Hkv:
        raise ValueError(
            f"block_attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}; they "
            "must be [B, H, Tq, D], [B, Hkv, Tk, D] and [B, Hkv, Tk, D] with H a multiple of Hkv"
        )
    if causal and Tq != Tk:
        raise ValueError(
            f"block_attention: causal needs as many queries as keys, not {Tq} and {Tk}; cut the "
            "keys into a causal block and a full one before it"
        )
