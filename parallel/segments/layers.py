"""Layers that go on where the segment before has ended.

A gated delta net takes over its state and the tokens that its convolution still sees, a layer with
a window the keys and values that it still sees, and one without a window those of all earlier
tokens of the document. The last stay on the rank of `cp` that has computed them and go round the
ring with the others; the rest is small, and all ranks have it.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from parallel.comm import Communicator
from parallel.context.attention import ContextAttention
from parallel.context.convolution import ContextConvolution
from parallel.context.linear import ContextScan
from parallel.segments.documents import SegmentDocuments
from pretrain.model.kernels.gated_delta import gated_delta_rule


def carry_over_segments(layers: Mapping[str, Any], cp: Communicator) -> None:
    """Let layers compute one segment after the other; their `documents` are `SegmentDocuments`.

    Args:
        layers: `Layer` modules by their number in the model.
        cp: the ranks that share each segment.
    """
    for number, layer in layers.items():
        if layer.attention is not None:
            layer.attention.core = SegmentAttention(number, cp)
        if layer.gated_delta is not None:
            layer.gated_delta.convolve = SegmentConvolution(number, cp)
            layer.gated_delta.scan = SegmentScan(number, cp)


class SegmentAttention:
    """Takes the place of `attention.core`."""

    def __init__(self, layer: str, cp: Communicator) -> None:
        self.layer, self.cp = layer, cp
        self.attend = ContextAttention(cp)

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        documents: SegmentDocuments,
        *,
        scale: float,
        window: int | None,
    ) -> Tensor:
        """q [B, H, t, D], k and v [B, Hkv, t, D], of this rank's tokens -> [B, H, t, D]."""
        if window == 1:
            # It sees nothing earlier; and of 0 tokens, a checkpoint has no tensor to go on with.
            return self.attend(q, k, v, documents, scale=scale, window=window)
        memory, number = documents.memory, documents.number
        earlier: dict[str, list[Tensor]] = {"k": [], "v": []}
        complete = None if window is None else partial(sum_over_ranks, self.cp)
        if documents.go_on:
            sources = range(documents.first_seen if window is None else number - 1, number)
            for name, tensors in earlier.items():
                of_layer = f"{self.layer}.{name}"
                tensors += (memory.receive(of_layer, s, number, complete) for s in sources)
        k_seen, v_seen = (torch.cat([*earlier[n], x], dim=2) for n, x in (("k", k), ("v", v)))
        out = self.attend(q, k_seen, v_seen, documents, scale=scale, window=window)
        if documents.is_last_seen and (window is None or not documents.hands_on):
            return out
        for name, x in (("k", k), ("v", v)):
            kept = x
            if window is not None:
                kept = last_tokens(x.transpose(1, 2), window - 1, documents, self.cp)
                kept = kept.transpose(1, 2)
            out = memory.hand_on(f"{self.layer}.{name}", number, out, kept)
        return out


class SegmentScan:
    """Takes the place of `gated_delta.scan`."""

    def __init__(self, layer: str, cp: Communicator) -> None:
        self.name = f"{layer}.state"
        self.scan: Any = ContextScan(cp) if cp.size > 1 else gated_delta_rule

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor,
        *,
        documents: SegmentDocuments,
    ) -> tuple[Tensor, Tensor]:
        """See `gated_delta_rule`; the tokens are this rank's."""
        memory, number, state = documents.memory, documents.number, None
        if documents.go_on:
            state = memory.receive(self.name, number - 1, number)
            in_the_middle = documents.rows_in_the_middle(state.device)
            state = state * in_the_middle.to(state.dtype)[:, None, None, None]
        out, final = self.scan(q, k, v, g, beta, documents=documents, initial_state=state)
        if documents.hands_on:
            out = memory.hand_on(self.name, number, out, final)
        return out, final


class SegmentConvolution:
    """Takes the place of `gated_delta.convolve`."""

    def __init__(self, layer: str, cp: Communicator) -> None:
        self.name, self.cp = f"{layer}.convolution", cp
        self.convolve = ContextConvolution(cp)

    def __call__(self, x: Tensor, weight: Tensor, documents: SegmentDocuments) -> Tensor:
        """x [B, t, C], of this rank's tokens, and weight [C, W] -> [B, t, C]."""
        if weight.shape[1] == 1:
            # As attention with a window of 1.
            return self.convolve(x, weight, documents)
        memory, number, before = documents.memory, documents.number, None
        if documents.go_on:
            complete = partial(sum_over_ranks, self.cp)
            before = memory.receive(self.name, number - 1, number, complete)
        y = self.convolve(x, weight, documents, before)
        if not documents.hands_on:
            return y
        kept = last_tokens(x, weight.shape[1] - 1, documents, self.cp)
        return memory.hand_on(self.name, number, y, kept)


def last_tokens(x: Tensor, n: int, documents: SegmentDocuments, cp: Communicator) -> Tensor:
    """The last n tokens of each row [B, n, ...], on all ranks, of x [B, t, ...] that they share.

    The gradient of the result is the whole one, on all ranks.
    """
    if cp.size == 1:
        return x[:, x.shape[1] - n :]
    places = documents.plan(LastTokens, n)
    result: Tensor = _LastTokens.apply(x, places, cp)
    return result


class LastTokens:
    """Where a rank holds the last n tokens of rows.

    Attributes:
        n: how many.
        places: rows, places among the rank's tokens, and places among the last n.
    """

    def __init__(self, documents: SegmentDocuments, n: int) -> None:
        self.n = n
        self.places: list[tuple[slice, slice, slice]] = []
        for rows, layout in documents.groups():
            length = sum(layout.lengths)
            last = range(length - n, length)
            for tokens, rank, place in layout.holders(last):
                if rank == documents.rank:
                    into = tokens.start - last.start
                    here = slice(place, place + len(tokens))
                    self.places.append((rows, here, slice(into, into + len(tokens))))


class _LastTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: LastTokens, cp: Communicator) -> Tensor:
        ctx.plan, ctx.shape = plan, x.shape
        last = x.new_zeros(len(x), plan.n, *x.shape[2:])
        for rows, here, into in plan.places:
            last[rows, into] = x[rows, here]
        return cp.all_reduce(last)

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor, None, None]:
        dx = grad[0].new_zeros(ctx.shape)
        for rows, here, into in ctx.plan.places:
            dx[rows, here] = grad[0][rows, into]
        return dx, None, None


def sum_over_ranks(cp: Communicator, gradient: Tensor) -> Tensor:
    """Of what all ranks have received."""
    if cp.size == 1:
        return gradient
    return cp.all_reduce(gradient.clone(memory_format=torch.contiguous_format))
