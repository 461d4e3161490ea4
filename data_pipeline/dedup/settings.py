"""Which documents are duplicates, and which of them stays."""

from dataclasses import dataclass
from typing import Literal, get_args

from data_pipeline.dedup.minhash import candidate_probability, choose_bands
from data_pipeline.errors import DataError

LOWEST_RECALL = 0.5

Exact = Literal["document", "paragraph", "line"]
Keep = Literal["longest", "newest", "first"]


@dataclass(frozen=True)
class Settings:
    """What the signatures of documents depend on, and what is made of them; see `deduplicate`."""

    threshold: float | None
    bands: int
    rows: int
    ngram: int
    keep: Keep


def checked_settings(
    threshold: float | None, bands: int | None, rows: int | None, ngram: int, keep: Keep
) -> Settings:
    """The settings, as `deduplicate` takes them.

    Raises:
        DataError: one of them is wrong.
    """
    check_settings(threshold, ngram=ngram)
    check_choice("keep", keep, Keep)
    bands, rows = _checked_bands(threshold, bands, rows)
    return Settings(threshold, bands, rows, ngram, keep)


def check_settings(threshold: float | None, **counts: int) -> None:
    if threshold is not None and not 0 < threshold <= 1:
        raise DataError(f"threshold={threshold} is not allowed: it is above 0 and at most 1")
    for name, count in counts.items():
        if count < 1:
            raise DataError(f"{name}={count} is not allowed: it is at least 1")


def check_choice(name: str, value: str, choices: object) -> None:
    if value not in get_args(choices):
        allowed = ", ".join(get_args(choices))
        raise DataError(f"{name}={value} is not allowed; it is one of {allowed}")


def _checked_bands(threshold: float | None, bands: int | None, rows: int | None) -> tuple[int, int]:
    if threshold is None:
        return 0, 0
    if bands is None and rows is None:
        return choose_bands(threshold)
    if bands is None or rows is None:
        raise DataError(f"bands={bands} with rows={rows} is not allowed: give both or neither")
    check_settings(threshold, bands=bands, rows=rows)
    found = candidate_probability(threshold, bands, rows)
    if found < LOWEST_RECALL:
        better = "bands={}, rows={}".format(*choose_bands(threshold))
        raise DataError(
            f"bands={bands}, rows={rows} would miss {1 - found:.0%} of the pairs at "
            f"threshold={threshold}; {better} would do"
        )
    return bands, rows
