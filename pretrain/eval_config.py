"""The section `eval` of a configuration: held-out text, whose loss is taken while training."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from pretrain.curriculum import Phase
from pretrain.errors import UserError
from pretrain.settings import NonNegative, Positive, Section, Tokens

if TYPE_CHECKING:
    from pretrain.config import Config


class HeldOutSource(Section):
    path: str
    name: str = Field("", description="What metrics call it [the last part of path].")


class EvalConfig(Section):
    every: NonNegative = Field(
        0,
        description="Steps between two evaluations on held-out text; the last step is always "
        "evaluated. 0: never.",
    )
    sources: str | Annotated[tuple[HeldOutSource, ...], Field(min_length=1)] | None = Field(
        None,
        description="A folder of shards that are not trained on, or a list of such sources [for "
        "each source of data.shards what `farspan data hold-out` has put beside it].",
    )
    seq_len: Positive | None = Field(
        None, description="Tokens of a row [the least data.seq_len of the run]."
    )
    tokens: Tokens | None = Field(
        None, description="Of each source at most, in whole rows from its beginning [all]."
    )


def evaluated_length(config: "Config", phases: Sequence[Phase]) -> int:
    """Tokens of a row of held-out text, the same in all phases: losses can be compared."""
    return config.eval.seq_len or min(phase.config.data.seq_len for phase in phases)


def check_eval(config: "Config", phases: Sequence[Phase]) -> None:
    """Raises UserError: a phase cannot run rows of that length."""
    if not config.eval.every:
        return
    length = evaluated_length(config, phases)
    for phase in phases:
        if problem := _problem(phase.config, length):
            where = f"{phase}: " if len(phases) > 1 else ""
            raise UserError(
                f"{where}eval.seq_len = {length}: {problem}. Set eval.seq_len to such a length, or "
                "eval.every=0 to evaluate nothing"
            )


def _problem(config: "Config", length: int) -> str | None:
    cp, tp = config.parallel.cp, config.parallel.tp
    if length % (cp * tp):
        return f"must be a multiple of parallel.cp x parallel.tp = {cp} x {tp}"
    segment = config.data.seq_len // config.context.segments
    if config.context.segments > 1 and length > segment and length % segment:
        return f"must be a multiple of the segments of {segment} tokens, or shorter than one"
    limit = longest_position(config)
    if limit is not None and length > limit:
        return (
            f"must be at most {limit} (data.seq_len, or model.attention.yarn), what softmax layers "
            "with rotary positions are trained for"
        )
    return None


def longest_position(config: "Config") -> int | None:
    """Tokens that the positions of whole softmax layers were trained for; None without such."""
    layers = zip(config.model.layer_kinds(), config.model.rotates(), strict=True)
    if not any(kind == "softmax" and rotates for kind, rotates in layers):
        return None
    yarn = config.model.attention.yarn
    extended = int(yarn.factor * yarn.original_length) if yarn.factor > 1 else 0
    return max(config.data.seq_len, extended)
