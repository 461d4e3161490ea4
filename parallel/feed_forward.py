"""Feed-forwards by tiles of tokens: the hidden activations of one tile exist at a time.

Bekman et al. 2025, ALST, arXiv:2506.13996, section 3.1 (TiledMLP); here for experts as well.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from parallel.comm import unrecorded
from parallel.recompute import is_second_pass, recomputed


def tile_feed_forwards(layers: Iterable[Any], tokens: int) -> None:
    """Send at most `tokens` tokens of a rank at a time through the feed-forward of each layer.

    Forward keeps what goes in, backward runs a tile again before it differentiates it: what comes
    out, and every gradient, are those of all tokens at once. Routers see all tokens. Ranks that
    exchange tokens have equally many, hence equally many tiles.

    Args:
        layers: `Layer` modules, whose feed-forward comes last.
    """
    for layer in layers:
        if layer.mlp is not None:
            layer.mlp.forward = _by_sequence(_tiled(layer.mlp.forward, tokens))
        if layer.moe is not None:
            layer.moe.mix = _tiled(layer.moe.mix, tokens)


def _by_sequence(forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """[N, d] -> [N, d] as [B, T, d] -> [B, T, d]."""
    return lambda x_btd: forward(x_btd.flatten(0, 1)).view_as(x_btd)


def _tiled(forward: Callable[..., Tensor], tokens: int) -> Callable[..., Tensor]:
    def tile(*of_tokens: Tensor) -> Tensor:
        if is_second_pass():
            # A layer that recomputes what it has kept needs nothing of what it returns.
            return of_tokens[0]
        with unrecorded():
            return forward(*of_tokens)

    def tiled(*of_tokens: Tensor) -> Tensor:
        """[N, ..] each -> [N, d]."""
        tiles = zip(*(x.split(tokens) for x in of_tokens), strict=True)
        return torch.cat([recomputed(tile, *of_tile) for of_tile in tiles])

    return tiled
