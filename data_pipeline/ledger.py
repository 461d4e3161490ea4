"""The audit: for every document of the input one row that says what became of it, and why."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

STAGES = (
    "crawl",
    "blocklist",
    "extract",
    "language",
    "quality",
    "decontamination",
    "dedup",
    "shards",
)
KEPT = "kept"
DROPPED = "dropped"
DAMAGE = ("content-length", "damaged", "truncated")

SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "url": pa.string(),
        "file": pa.string(),
        "offset": pa.int64(),
        "stage": pa.string(),
        "decision": pa.string(),
        "reason": pa.string(),
        "detail": pa.string(),
        "language": pa.string(),
        "language_probability": pa.float64(),
        "words": pa.int64(),
        "page_bytes": pa.int64(),
        "extracted_bytes": pa.int64(),
        "text_bytes": pa.int64(),
        "quality_score": pa.float64(),
        "masked_email": pa.int64(),
        "masked_ip_address": pa.int64(),
        "masked_phone": pa.int64(),
        "masked_card": pa.int64(),
        "cluster": pa.int64(),
        "twin": pa.string(),
        "jaccard": pa.float64(),
    }
)
"""`stage` is where the decision fell. Documents that repeat one another share a `cluster`; `twin`
is the id of the one kept in their place, `jaccard` the similarity to it. `quality_score` is null
where no classifier was asked. Bytes are those of the body, of its text as it was found, and of
what the rules have left of that; of a document that came so far."""
SIZES = ("page_bytes", "extracted_bytes", "text_bytes")


def settle(audit: pa.Table, clusters: pa.Table) -> pa.Table:
    """Write the outcome of deduplication into the rows that are still undecided.

    Args:
        audit: rows of `SCHEMA`; those without a stage have passed every stage so far.
        clusters: one row for each undecided row, in the same order: cluster, kept, twin,
            jaccard, exact.
    """
    undecided = pc.is_null(audit["stage"]).combine_chunks()
    # A document of whose lines or paragraphs none was new has no twin.
    exact = pc.if_else(pc.is_null(clusters["twin"]), "nothing new", "exact duplicate")
    duplicate = pc.if_else(clusters["exact"], exact, "near duplicate")
    kept = clusters["kept"]
    outcome = {
        "stage": pc.if_else(kept, "shards", "dedup"),
        "decision": pc.if_else(kept, KEPT, DROPPED),
        "reason": pc.if_else(kept, KEPT, duplicate),
        "cluster": clusters["cluster"],
        "twin": clusters["twin"],
        "jaccard": clusters["jaccard"],
    }
    for name, values in outcome.items():
        column = audit.schema.get_field_index(name)
        settled = pc.replace_with_mask(
            audit[name].combine_chunks(), undecided, values.combine_chunks()
        )
        audit = audit.set_column(column, SCHEMA.field(name), settled)
    return audit


Tally = dict[tuple[str, str], Counter[str]]
"""By stage and reason: how many `documents`, and the sums of their `SIZES`."""


def tally(folder: Path, sizes: Sequence[str] = SIZES) -> Tally:
    """Count the rows of all audit files of a folder, and add up these sizes of theirs.

    The order is that of the stages; of a stage the most frequent reason comes first.
    """
    counts: Tally = {}
    for path in sorted(folder.glob("*.parquet")):
        rows = pq.read_table(path, columns=["stage", "reason", *sizes])
        sums = [(size, "sum") for size in sizes]
        grouped = rows.group_by(["stage", "reason"]).aggregate([([], "count_all"), *sums])
        for row in grouped.to_pylist():
            count = counts.setdefault((row["stage"], row["reason"]), Counter())
            count["documents"] += row["count_all"]
            count.update({size: row[f"{size}_sum"] or 0 for size in sizes})
    return dict(
        sorted(
            counts.items(),
            key=lambda item: (STAGES.index(item[0][0]), -item[1]["documents"], item[0]),
        )
    )


def funnel(counts: Tally) -> list[dict[str, Any]]:
    """Documents by stage and reason."""
    return [
        {"stage": stage, "reason": reason, "documents": count["documents"]}
        for (stage, reason), count in counts.items()
    ]


def damage(folder: Path) -> list[str]:
    """What was unreadable and where, a line for each record of the crawl stage that was."""
    wanted = pc.field("reason").isin(DAMAGE) & (pc.field("stage") == "crawl")
    return [
        line
        for path in sorted(folder.glob("*.parquet"))
        for line in pq.read_table(path, columns=["detail"], filters=wanted)["detail"].to_pylist()
    ]
