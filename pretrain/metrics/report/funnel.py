"""What became of the documents of the crawl, from which the runs' tokens come."""

from collections import Counter
from typing import NamedTuple

from pretrain.metrics.report.run import Run


class Outcome(NamedTuple):
    """What became of some documents."""

    reason: str
    stage: str
    documents: int
    share: float


def funnel(run: Run) -> list[Outcome]:
    """Documents kept and dropped for each reason, over all sources, in the order of the stages."""
    documents: Counter[tuple[str, str]] = Counter()
    for manifest in run.data_manifests:
        for row in manifest.get("funnel", ()):
            documents[row["stage"], row["reason"]] += row["documents"]
    total = max(1, documents.total())
    return [
        Outcome(reason, stage, count, count / total) for (stage, reason), count in documents.items()
    ]
