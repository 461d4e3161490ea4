"""What became of the documents of the crawl, from which the runs' tokens come."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from pretrain.metrics.report.run import Run

UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


class Outcome(NamedTuple):
    """What became of some documents, where it is only counted."""

    reason: str
    stage: str
    documents: int
    share: float


class Example(NamedTuple):
    """A document; `facts` say of it what its text does not."""

    address: str
    facts: str
    excerpt: str | None


class Reason(NamedTuple):
    """Why documents were dropped; `share` is that of the documents of the crawl."""

    reason: str
    documents: int
    share: float
    examples: Sequence[Example]


class Step(NamedTuple):
    """A step of the funnel; shares are those of the documents of the crawl."""

    name: str
    documents_in: int
    documents_out: int
    kept_share: float
    dropped_share: float
    size_out: str
    reasons: Sequence[Reason]
    kept_examples: Sequence[Example]

    @property
    def dropped(self) -> int:
        return self.documents_in - self.documents_out


class Source(NamedTuple):
    """The funnel of a source of the mixture."""

    name: str
    documents_in: int
    documents: int
    tokens: int
    archive_size: str
    steps: Sequence[Step]


def funnel_of(runs: Sequence[Run]) -> dict[str, Any]:
    """Of each source its steps with reasons and examples, or else counts alone.

    What several runs train on is told once; counts alone only if it is the same for all of them.
    """
    sources: list[Source] = []
    for found in (_source(source) for run in runs for source in run.funnels if source["steps"]):
        if found not in sources:
            sources.append(found)
    if sources:
        return {"sources": sources}
    first, *others = [_outcomes(run.data_manifests) for run in runs]
    return {"outcomes": first if all(other == first for other in others) else []}


def _outcomes(manifests: Sequence[Mapping[str, Any]]) -> list[Outcome]:
    """Documents kept and dropped for each reason, over all sources, in the order of the stages."""
    documents: Counter[tuple[str, str]] = Counter()
    for manifest in manifests:
        for row in manifest.get("funnel", ()):
            documents[row["stage"], row["reason"]] += row["documents"]
    total = max(1, documents.total())
    return [
        Outcome(reason, stage, count, count / total) for (stage, reason), count in documents.items()
    ]


def _source(source: Mapping[str, Any]) -> Source:
    first = source["steps"][0]
    crawled = max(1, first["documents_in"])
    return Source(
        source["source"],
        first["documents_in"],
        source["documents"],
        source["tokens"],
        _size(first["bytes_in"]),
        [_step(step, crawled) for step in source["steps"]],
    )


def _step(step: Mapping[str, Any], crawled: int) -> Step:
    reasons = [
        Reason(
            dropped["reason"],
            dropped["documents"],
            dropped["documents"] / crawled,
            [*_examples(dropped)],
        )
        for dropped in step["dropped"]
    ]
    documents_in, documents_out = step["documents_in"], step["documents_out"]
    return Step(
        step["step"],
        documents_in,
        documents_out,
        documents_out / crawled,
        (documents_in - documents_out) / crawled,
        _size(step["bytes_out"]),
        reasons,
        [*_examples(step.get("kept", {}))],
    )


def _examples(holder: Mapping[str, Any]) -> Iterator[Example]:
    for example in holder.get("examples", ()):
        facts = [example.get("detail")]
        if example.get("score") is not None:
            facts.append(f"score {example['score']:.2f}")
        if example.get("twin"):
            facts.append(f"kept instead: {example['twin']}")
        if example.get("jaccard") is not None:
            facts.append(f"Jaccard {example['jaccard']:.2f}")
        address = example.get("url") or example["id"]
        yield Example(address, "; ".join(filter(None, facts)), example.get("excerpt"))


def _size(count: float | None) -> str:
    """Three significant digits: 1.23 MB."""
    if count is None:
        return ""
    for size, unit in UNITS:
        if count >= size:
            digits = count / size
            return f"{digits:.{2 if digits < 10 else 1 if digits < 100 else 0}f} {unit}"
    return f"{count} B"
