"""A cleaning recipe: which stages run, with which thresholds."""

import difflib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from data_pipeline.dedup.minhash import candidate_probability, choose_bands
from data_pipeline.dedup.settings import (
    LOWEST_RECALL,
    Exact,
    Keep,
    Settings,
    checked_settings,
)
from data_pipeline.errors import DataError, file_errors
from data_pipeline.extract import MAX_SECONDS, Mode
from data_pipeline.hygiene import Decontamination, Privacy, UrlBlocklist, WordBlocklist
from data_pipeline.language import LANGUAGES
from data_pipeline.quality import (
    C4,
    GPT3,
    FineWeb,
    GopherQuality,
    GopherRepetition,
    Text,
    Verdict,
)
from data_pipeline.quality.verdict import Thresholds

Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
# Thresholds of the heuristics that are no shares of a text.
UNBOUNDED = (
    "min_mean_word_length",
    "max_mean_word_length",
    "max_symbol_to_word_ratio",
    "pareto_alpha",
)

SHIPPED = Path(__file__).parent / "recipes"


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Extraction(_Section):
    """How main text is found; a document may take `max_seconds` of CPU, its rules included."""

    mode: Mode
    max_seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)] = MAX_SECONDS


class Language(_Section):
    """Languages to keep (ISO 639-1; none given: all), and the probability that is enough."""

    allowed: tuple[str, ...]
    threshold: Share

    @field_validator("allowed")
    @classmethod
    def _known(cls, allowed: tuple[str, ...]) -> tuple[str, ...]:
        codes = tuple(code.strip() for code in allowed)
        for code in codes:
            if code not in LANGUAGES:
                hint = _nearest(code, sorted(LANGUAGES))
                raise ValueError(f"unknown language {code!r}{hint}; codes are as in en or de")
        return codes


class Dedup(_Section):
    """Equal texts, and by MinHash-LSH those of Jaccard similarity `threshold` on; null: none.

    Shingles are word `ngram`s, signatures `bands` x `rows` hashes. `exact` and `keep` are explained
    at `dedup.deduplicate`.
    """

    threshold: Annotated[float, Field(gt=0, le=1)] | None
    bands: Count
    rows: Count
    ngram: Count
    exact: Exact = "document"
    keep: Keep = "longest"

    @property
    def settings(self) -> Settings:
        """What documents are signed with."""
        return checked_settings(self.threshold, self.bands, self.rows, self.ngram, self.keep)

    @model_validator(mode="after")
    def _finds_its_pairs(self) -> "Dedup":
        if self.threshold is None:
            return self
        found = candidate_probability(self.threshold, self.bands, self.rows)
        if found < LOWEST_RECALL:
            bands, rows = choose_bands(self.threshold)
            raise ValueError(
                f"bands {self.bands} and rows {self.rows} miss {1 - found:.0%} of the pairs at "
                f"threshold {self.threshold}; {bands} and {rows} would do"
            )
        return self


class Recipe(_Section):
    """One YAML file; a section that may be null does not run where it is."""

    description: str
    url_blocklist: UrlBlocklist | None
    extract: Extraction
    language: Language
    word_blocklist: WordBlocklist | None
    gopher_repetition: GopherRepetition | None
    gopher_quality: GopherQuality | None
    c4: C4 | None
    fineweb: FineWeb | None
    gpt3: GPT3 | None
    decontamination: Decontamination | None
    privacy: Privacy | None
    dedup: Dedup

    @field_validator("gopher_repetition", "gopher_quality", "c4", "fineweb", "gpt3")
    @classmethod
    def _possible(cls, heuristic: Thresholds | None) -> Thresholds | None:
        settings = {} if heuristic is None else heuristic.model_dump()
        for name, value in _numbers(settings):
            limit = math.inf if isinstance(value, int) or name in UNBOUNDED else 1.0
            if not (0 <= value <= limit and math.isfinite(value)):
                allowed = "0 or more" if limit == math.inf else "0 to 1"
                raise ValueError(f"{name} = {value} is impossible; allowed: {allowed}")
        return heuristic

    def override(
        self,
        mode: Mode | None = None,
        languages: tuple[str, ...] | None = None,
        classifier: Path | None = None,
    ) -> "Recipe":
        """This recipe with the extraction mode, languages or classifier that the caller asks for.

        Raises:
            DataError: a language that no text is ever found to be in, a classifier that cannot be
                read or is not asked for, or none where one is.
        """
        extract = self.extract if mode is None else self.extract.model_copy(update={"mode": mode})
        language = self.language
        if languages is not None:
            try:
                language = Language(allowed=languages, threshold=language.threshold)
            except ValidationError as error:
                raise DataError(
                    "; ".join(_explain(problem) for problem in error.errors())
                ) from error
        gpt3 = self.gpt3
        if classifier is not None:
            if gpt3 is None:
                raise DataError("--classifier: the recipe asks for none; the recipe gpt3 does")
            gpt3 = gpt3.with_model(classifier)
        if gpt3 is not None:
            gpt3.require_model()
        return self.model_copy(update={"extract": extract, "language": language, "gpt3": gpt3})

    def judge_quality(self, document: Text, language: str) -> Verdict:
        """Ask each heuristic in turn, on the text as the one before it left it."""
        verdict = Verdict(document)
        for heuristic in (
            self.gopher_repetition,
            self.gopher_quality,
            self.c4,
            self.fineweb,
            self.gpt3,
        ):
            if heuristic is not None and verdict.keep:
                verdict = heuristic.judge(verdict.document, language)
        return verdict


def shipped_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def load_recipe(name: str) -> Recipe:
    """Load a shipped recipe by name, or any recipe by the path of its YAML file.

    Raises:
        DataError: no such recipe, a file with an unknown, missing or impossible setting, or a
            file that it names, found from the folder of the recipe, that cannot be read.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else SHIPPED / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(shipped_recipes())
        hint = _nearest(name, shipped_recipes())
        raise DataError(f"no recipe {name!r}{hint}; shipped: {known}; or give the path of a .yaml")
    try:
        with file_errors():
            settings = yaml.safe_load(path.read_bytes())
    except yaml.YAMLError as error:
        raise DataError(f"{path}: not YAML: {error}") from error
    if not isinstance(settings, dict):
        raise DataError(f"{path}: a recipe is a mapping of sections, this is {settings!r:.80}")
    try:
        recipe = Recipe.model_validate(settings)
    except ValidationError as error:
        problems = [_explain(problem) for problem in error.errors()]
        raise DataError(f"{path}: " + "; ".join(problems)) from error
    return _with_files(recipe, path.parent)


def _with_files(recipe: Recipe, folder: Path) -> Recipe:
    read: dict[str, Thresholds] = {}
    for name in ("url_blocklist", "word_blocklist", "decontamination"):
        section = getattr(recipe, name)
        if section is not None:
            try:
                read[name] = section.with_files(folder)
            except DataError as error:
                raise DataError(f"{name}: {error}") from error
    if recipe.gpt3 is not None and recipe.gpt3.model is not None:
        read["gpt3"] = recipe.gpt3.with_model(folder / recipe.gpt3.model)
    return recipe.model_copy(update=read)


def _numbers(tree: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, int | float]]:
    """The numbers of a section by their dotted names."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _numbers(value, f"{prefix}{key}.")
        elif isinstance(value, int | float):
            yield f"{prefix}{key}", value


def _explain(problem: Any) -> str:
    location = [str(part) for part in problem["loc"]]
    name = ".".join(location)
    if problem["type"] == "extra_forbidden":
        allowed = _fields_of(location[:-1])
        hint = _nearest(location[-1], allowed)
        return f"unknown setting {name!r}{hint}; allowed here: {', '.join(allowed)}"
    if problem["type"] == "missing":
        return f"setting {name!r} is missing"
    if problem["type"] == "value_error":
        return f"{name}: {problem['ctx']['error']}"
    return f"{name} = {problem['input']!r}: {problem['msg']}"


def _fields_of(location: list[str]) -> list[str]:
    """Names of the settings of the section at `location`."""
    sections: dict[str, type[BaseModel]] = {
        "url_blocklist": UrlBlocklist,
        "extract": Extraction,
        "language": Language,
        "word_blocklist": WordBlocklist,
        "gopher_repetition": GopherRepetition,
        "gopher_quality": GopherQuality,
        "c4": C4,
        "fineweb": FineWeb,
        "gpt3": GPT3,
        "decontamination": Decontamination,
        "privacy": Privacy,
        "dedup": Dedup,
    }
    section = sections[location[0]] if location else Recipe
    return list(section.model_fields)


def _nearest(name: str, known: list[str]) -> str:
    match = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {match[0]!r}?)" if match else ""
