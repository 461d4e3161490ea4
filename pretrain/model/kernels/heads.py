"""Key heads that serve several query heads each (Ainslie et al. 2023, arXiv:2305.13245)."""

from torch import Tensor


def per_query_head(x: Tensor, n_heads: int) -> Tensor:
    """[B, Hkv, ...] -> [B, H, ...], each head repeated for the query heads that it serves."""
    return x.repeat_interleave(n_heads // x.shape[1], dim=1)


def sum_over_group(x: Tensor, n_kv_heads: int) -> Tensor:
    """The gradient of `per_query_head`: [B, H, ...] -> [B, Hkv, ...]."""
    return x.unflatten(1, (n_kv_heads, -1)).sum(2)
