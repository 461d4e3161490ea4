"""The settings of rows that are computed in segments, and which of them fit together."""

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from pretrain.errors import UserError
from pretrain.settings import Positive, Section

if TYPE_CHECKING:
    from pretrain.config import Config

# Tokens of a chunk of the gated delta rule.
CHUNK = 64


class ContextConfig(Section):
    segments: Positive = Field(
        1,
        description="Parts that a row is cut into. They are computed one after the other, and each "
        "goes on where the one before it has ended, so that memory is that of a part.",
    )
    gradient: Literal["exact", "detach"] | Positive = Field(
        "exact",
        description="exact: that of the whole row; detach: no segment's goes back into an earlier "
        "one; a number: it is cut between groups of so many segments.",
    )
    carry: bool = Field(
        True, description="false: each segment begins anew, to tell what carrying over is worth."
    )
    lane_rows: Positive = Field(
        1,
        description="Rows of consecutive steps that go on where the one before has ended, with the "
        "memory of linear and sliding layers; no gradient goes back to an earlier step.",
    )

    @property
    def in_segments(self) -> bool:
        """Whether rows take something over, from segments or from rows before."""
        return self.segments > 1 or self.lane_rows > 1

    @property
    def reach(self) -> int:
        """How many segments a gradient flows among."""
        if self.gradient == "exact":
            return self.segments
        return 1 if self.gradient == "detach" else self.gradient


def check_context(config: "Config") -> None:
    """Raise UserError where rows cannot be cut so, with what would work."""
    context, seq_len = config.context, config.data.seq_len
    if not context.in_segments:
        return
    if context.lane_rows > 1:
        _check_lanes(config)
    segments = context.segments
    asked = f"context.segments = {segments}"
    if segments == 1:
        asked = f"context.lane_rows = {context.lane_rows}"
    size, rest = divmod(seq_len, segments)
    if rest or size % CHUNK:
        works = [n for n in range(1, seq_len // CHUNK + 1) if seq_len % (n * CHUNK) == 0]
        wish = f"make data.seq_len a multiple of {CHUNK}"
        if works:
            wish = f"the nearest that works is {min(works, key=lambda n: abs(n - segments))}"
        raise UserError(
            f"{asked}: segments of data.seq_len / context.segments = "
            f"{seq_len / segments:g} tokens; they must be whole chunks of {CHUNK}; {wish}"
        )
    model = config.model
    if "sliding" in model.layer_kinds() and model.attention.window > size:
        fit = [n for n in range(1, segments) if _is_cut_well(seq_len, n, model.attention.window)]
        wish = f"take {max(fit)} segments, or a smaller window" if fit else "take a smaller window"
        raise UserError(
            f"model.attention.window = {model.attention.window} is larger than a segment of "
            f"data.seq_len / context.segments = {size} tokens: {wish}"
        )
    if config.parallel.pp > 1:
        raise UserError(
            f"{asked} with parallel.pp = {config.parallel.pp}: the backward "
            "pass begins with the last segment, and a pipeline would stand still between two; "
            "take parallel.pp=1 and more ranks of cp, ep or dp_shard"
        )
    if config.parallel.ulysses > 1:
        raise UserError(
            f"{asked} with parallel.ulysses = {config.parallel.ulysses}: "
            "keys are carried over by the ranks of a ring; take parallel.ulysses=1"
        )
    if segments == 1:
        return
    if config.optim.in_backward:
        raise UserError(
            f"context.segments = {segments} with optim.in_backward = true: a weight's gradient is "
            "complete after the backward pass of the first segment only; take false"
        )
    if model.moe.n_experts and model.moe.balance == "sequence":
        raise UserError(
            f"context.segments = {segments} with model.moe.balance = sequence: the experts' "
            "shares of a whole row are not known before its last segment; take batch or bias"
        )
    if model.moe.n_experts and model.moe.capacity_factor is not None:
        raise UserError(
            f"context.segments = {segments} with model.moe.capacity_factor = "
            f"{model.moe.capacity_factor}: which slots of a row are dropped is decided over the "
            "whole row; take null, which drops none"
        )


def _is_cut_well(seq_len: int, segments: int, window: int) -> bool:
    """Whether segments have whole chunks, and a window at most."""
    size, rest = divmod(seq_len, segments)
    return not rest and not size % CHUNK and size >= window


def _check_lanes(config: "Config") -> None:
    asked = f"context.lane_rows = {config.context.lane_rows}"
    if not config.context.carry:
        raise UserError(
            f"{asked} with context.carry = false: rows would go on where the ones before have "
            "ended, and their segments begin anew; take context.lane_rows=1 or context.carry=true"
        )
    if not {"linear", "sliding"} & set(config.model.layer_kinds()):
        raise UserError(
            f"{asked}: no layer of the model hands anything on to the next row; have linear or "
            "sliding layers in model.layer_pattern, or take context.lane_rows=1"
        )
