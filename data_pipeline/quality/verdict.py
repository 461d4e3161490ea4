"""What a heuristic says about a text."""

from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict

from data_pipeline.quality.text import Text


@dataclass(frozen=True)
class Verdict:
    """The document as the heuristic leaves it, and the rule that drops it, if one does.

    `score` is a classifier's, where one was asked.
    """

    document: Text
    reason: str | None = None
    score: float | None = None

    @property
    def keep(self) -> bool:
        return self.reason is None


class Thresholds(BaseModel):
    """The numbers of one heuristic, all of them given by a recipe."""

    model_config = ConfigDict(extra="forbid", frozen=True)
