"""The section `data` of a configuration: what is trained on, in which mixture and order."""

from typing import Annotated

from pydantic import Field

from pretrain.settings import NonNegative, Positive, Section, Tokens

SAMPLE_SHARDS = "sample"


class ShardSource(Section):
    path: str
    name: str = Field("", description="What the curriculum calls it [the last part of path].")
    weight: Annotated[float, Field(ge=0)] | None = Field(
        None, description="Share of the tokens, relative to the other sources' [1]."
    )
    epochs: Annotated[float, Field(gt=0)] | None = Field(
        None, description="Instead of weights: how often to pass over each source, as in 3.4."
    )
    max_epochs: Annotated[float, Field(gt=0)] | None = Field(
        None, description="With weights: passes after which the others take over."
    )
    upsample: dict[Positive, Annotated[float, Field(gt=0)]] = Field(
        default={}, description="Visits of an epoch to documents of at least so many tokens."
    )
    growing: bool = Field(False, description="Its shards are still being written.")

    @property
    def relative_weight(self) -> float | None:
        """None where epochs say how much of it is used."""
        return 1.0 if self.weight is self.epochs is None else self.weight


class CurriculumPhase(Section):
    tokens: Tokens = Field(description="From so many tokens of the run on,")
    weights: dict[str, Annotated[float, Field(ge=0)]] = Field(
        min_length=1, description="these weights hold; sources without one keep theirs."
    )


class DataConfig(Section):
    shards: str | Annotated[tuple[ShardSource, ...], Field(min_length=1)] = Field(
        SAMPLE_SHARDS,
        description="A folder made by `farspan data run`, a list of sources, or `sample`: "
        "a small crawl made on this machine on first use.",
    )
    curriculum: tuple[CurriculumPhase, ...] = Field(
        (), description="Weights of the sources that change at a token of the run."
    )
    seq_len: Positive = Field(4096, description="Tokens per sequence.")
    seed: NonNegative = Field(0, description="Decides the order of the documents.")
    shuffle_shards: Positive = Field(
        64, description="Shards of a source that are shuffled together, and at hand at a time."
    )
    cache_dir: str = Field(
        "",
        description="Where shards from https:// and s3:// are kept, for all processes of a node "
        "[$FARSPAN_CACHE/shards, and that in ~/.cache/farspan].",
    )
    cache_gb: Annotated[float, Field(gt=0)] = Field(
        64.0, description="What may lie there, in 10^9 bytes; shards used longest ago make room."
    )

    def sources(self) -> tuple[ShardSource, ...]:
        return (ShardSource(path=self.shards),) if isinstance(self.shards, str) else self.shards
