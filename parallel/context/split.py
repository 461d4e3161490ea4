"""Share the rows of a model's batches over the `cp` axis."""

from collections.abc import Iterable
from typing import Any

from parallel.comm import Communicator
from parallel.context.attention import ContextAttention
from parallel.context.convolution import ContextConvolution
from parallel.context.linear import ContextScan
from parallel.mesh import Mesh


def split_sequence(layers: Iterable[Any], mesh: Mesh) -> dict[str, Communicator]:
    """Let layers compute on this rank's part of each row, [B, T / cp, d].

    Their `documents` are then `SplitDocuments`; all else that a layer does, it does to each token.

    Args:
        layers: `Layer` modules.

    Returns:
        The communicators that they share, by axis.
    """
    traffic = {"cp": Communicator(mesh.cp.get_group(), "cp")}
    attention = ContextAttention(traffic["cp"])
    if mesh.sequence is not None:
        for axis in ("ring", "ulysses"):
            traffic[axis] = Communicator(mesh.sequence.get_group(axis), axis)
        attention = ContextAttention(traffic["ring"], traffic["ulysses"])
    convolve, scan = ContextConvolution(traffic["cp"]), ContextScan(traffic["cp"])
    for layer in layers:
        if layer.attention is not None:
            layer.attention.core = attention
        if layer.gated_delta is not None:
            layer.gated_delta.convolve = convolve
            layer.gated_delta.scan = scan
    return traffic
