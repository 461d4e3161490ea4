"""GPT-3's choice of documents by a classifier's score (Brown et al. 2020, appendix A)."""

import hashlib
from pathlib import Path

from pydantic import Field, PrivateAttr, computed_field, model_validator

from data_pipeline.errors import DataError
from data_pipeline.quality.linear import TRAIN, load_model, sha256_of
from data_pipeline.quality.text import Text
from data_pipeline.quality.verdict import Thresholds, Verdict

PARETO_ALPHA = 9.0


def keep_probability(score: float, alpha: float) -> float:
    """How probable it is that numpy.random.pareto(alpha) > 1 - score."""
    return float((2 - score) ** -alpha)


class GPT3(Thresholds):
    """Keep a text if pareto(alpha) > 1 - score, or where alpha is null, if score >= threshold.

    The random number is a function of `seed` and the text, whatever else is in the crawl.

    Attributes:
        model: a file of `farspan data train-classifier`. Not where it lies but its hash is in the
            plan of a run, so that another model is another run.
    """

    model: Path | None = Field(exclude=True)
    pareto_alpha: float | None
    threshold: float | None
    seed: int
    _sha256: str | None = PrivateAttr(None)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def sha256(self) -> str | None:
        """The hash of the model, once `with_model` has read it."""
        return self._sha256

    @model_validator(mode="after")
    def _has_one_rule(self) -> "GPT3":
        if (self.pareto_alpha is None) == (self.threshold is None):
            raise ValueError("give either pareto_alpha or threshold, and null for the other")
        if self.pareto_alpha is not None and self.pareto_alpha <= 0:
            raise ValueError(f"pareto_alpha = {self.pareto_alpha} is impossible; allowed: above 0")
        return self

    def with_model(self, path: Path) -> "GPT3":
        """These settings with the classifier of a file.

        Raises:
            DataError: the file cannot be read, or is no classifier.
        """
        sha256 = sha256_of(path)
        load_model(path, sha256)
        settings = self.model_copy(update={"model": path})
        settings._sha256 = sha256
        return settings

    def require_model(self) -> tuple[Path, str]:
        """The classifier's file and hash, or a DataError that says how to come by one."""
        if self.model is None or self.sha256 is None:
            raise DataError(
                "the recipe asks for a quality classifier: give one by --classifier MODEL, or as "
                f"gpt3.model in a recipe of your own; train one: {TRAIN}"
            )
        return self.model, self.sha256

    def judge(self, document: Text, language: str) -> Verdict:
        score = load_model(*self.require_model()).score(document.text)
        return Verdict(document, self._broken_rule(document.text, score), score)

    def _broken_rule(self, text: str, score: float) -> str | None:
        if self.pareto_alpha is not None:
            is_kept = self._draw(text) < keep_probability(score, self.pareto_alpha)
            return None if is_kept else "gpt3.pareto"
        assert self.threshold is not None
        return None if score >= self.threshold else "gpt3.threshold"

    def _draw(self, text: str) -> float:
        """A number below 1, uniform over texts."""
        data = f"{self.seed} {text}".encode(errors="surrogatepass")
        return int.from_bytes(hashlib.blake2b(data, digest_size=7).digest(), "big") / 2**56
