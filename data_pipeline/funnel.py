"""The funnel of a run, DIR/funnel.json: what each step gets, passes on and drops, with examples.

Equal inputs and options give equal bytes, as of the manifest, which it lies beside.
"""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.errors import DataError
from data_pipeline.ledger import KEPT, Tally

if TYPE_CHECKING:  # who trains reads a funnel, and does not need what cleans archives
    from data_pipeline.examples import Examples

FUNNEL = "funnel.json"
FORMAT_VERSION = 1
ARCHIVES, PAGES, EXTRACTED, TEXTS = "archive_bytes", "page_bytes", "extracted_bytes", "text_bytes"
# In order, with the bytes that each of them gets.
STEPS = {
    "crawl": ARCHIVES,
    "blocklist": PAGES,
    "extract": PAGES,
    "language": EXTRACTED,
    "quality": EXTRACTED,
    "classifier": TEXTS,
    "decontamination": TEXTS,
    "exact duplicates": TEXTS,
    "near duplicates": TEXTS,
    "shards": TEXTS,
}
# Left out where they drop nothing, which is what they do if a recipe does not have them.
OPTIONAL = ("blocklist", "classifier", "decontamination")
CLASSIFIER = "gpt3."

Step = dict[str, Any]


def step_of(stage: str, reason: str) -> str:
    """The step of an outcome of the audit, whose stages are wider."""
    if stage == "quality" and reason.startswith(CLASSIFIER):
        return "classifier"
    if stage == "dedup":
        return "near duplicates" if reason == "near duplicate" else "exact duplicates"
    return stage


def steps_of(counts: Tally, archive_bytes: int, examples: "Examples") -> list[Step]:
    """The steps of a funnel.

    Each has documents and bytes as they come in and as they go on, and what is dropped by reason.
    Bytes are those of compressed archives, page bodies, and texts in UTF-8, see `STEPS`. The sizes
    of what is no page are not known.
    """
    totals: dict[str, Counter[str]] = {step: Counter() for step in STEPS}
    for (stage, reason), count in counts.items():
        totals[step_of(stage, reason)].update(count)
    left = sum(totals.values(), Counter({ARCHIVES: archive_bytes}))
    names = [name for name in STEPS if totals[name]["documents"] or name not in OPTIONAL]
    steps: list[Step] = []
    for name in names:
        came = _flow(left, name)
        if steps:
            steps[-1] |= {"documents_out": came["documents"], "bytes_out": came["bytes"]}
        steps.append(
            {
                "step": name,
                "documents_in": came["documents"],
                "bytes_in": came["bytes"],
                "documents_out": came["documents"],
                "bytes_out": None,
                "dropped": list(_dropped(name, counts, examples)),
            }
        )
        left.subtract(totals[name])
    kept = counts.get(("shards", KEPT), Counter())
    steps[-1]["kept"] = {
        "documents": kept["documents"],
        "examples": examples.of("shards", KEPT),
    }
    return steps


def _flow(left: Counter[str], step: str) -> dict[str, int]:
    return {"documents": left["documents"], "bytes": left[STEPS[step]]}


def _dropped(step: str, counts: Tally, examples: "Examples") -> Iterator[dict[str, Any]]:
    for (stage, reason), count in counts.items():
        if step_of(stage, reason) == step and reason != KEPT:
            size = STEPS[step]
            yield {
                "reason": reason,
                "documents": count["documents"],
                "bytes": None if size == ARCHIVES else count[size],
                "examples": examples.of(stage, reason),
            }


def save_funnel(steps: list[Step], folder: Path) -> None:
    """Put it in place of the one before, whole."""
    path = folder / FUNNEL
    aside = path.with_name(f".{path.name}")
    aside.write_text(json.dumps({"format_version": FORMAT_VERSION, "steps": steps}) + "\n")
    aside.rename(path)


def read_funnel(folder: Path) -> list[Step]:
    """The steps of a finished run. Raises DataError where there are none."""
    path = folder / FUNNEL
    try:
        return parse_funnel(path.read_bytes(), str(path))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; make the data again to have it") from None


def parse_funnel(content: bytes, name: str) -> list[Step]:
    """The steps that a file has.

    Raises:
        DataError: the file, of that name, is not what `save_funnel` writes.
    """
    try:
        tree = json.loads(content)
        version, steps = tree["format_version"], list(tree["steps"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{name}: not the funnel of a data run ({error!r}); remove it") from error
    if version != FORMAT_VERSION:
        raise DataError(
            f"{name}: format version {version}, this farspan reads {FORMAT_VERSION}; remove it"
        )
    return steps
