"""audit.html: a sample of what each rule kept and dropped, for a person to judge the rules by."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from jinja2 import Environment, PackageLoader

from data_pipeline import ledger
from data_pipeline.audit import Audit, Look, Row
from data_pipeline.errors import file_errors

PER_REASON = 8
CHARACTERS = 1_600
STAGES = {
    "crawl": "records that are no page, or not a whole one",
    "blocklist": "pages of sites that are on a list",
    "extract": "pages without a main text",
    "language": "texts in other languages, or in none for certain",
    "quality": "texts that break a rule, or that the classifier refuses",
    "decontamination": "texts that have a part of an evaluation in them",
    "dedup": "texts that repeat another one",
    "shards": "texts to train on",
}
TEMPLATES = Environment(
    loader=PackageLoader("data_pipeline", ""), autoescape=True, trim_blocks=True, lstrip_blocks=True
)
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Sample:
    """A document of the page.

    Attributes:
        facts: what else the audit knows of it, by name.
        excerpt: the beginning of its text.
        is_cut: whether the text goes on.
        twin: the same of the document that was kept instead.
    """

    row: Row
    facts: dict[str, str]
    excerpt: str
    is_cut: bool
    problem: str | None
    twin: "Sample | None" = None


@dataclass(frozen=True)
class Group:
    """The documents of one stage and reason."""

    stage: str
    reason: str
    documents: int
    share: float
    samples: list[Sample]

    @property
    def is_kept(self) -> bool:
        return self.reason == ledger.KEPT


def write_page(
    audit: Audit,
    path: Path,
    *,
    per_reason: int = PER_REASON,
    progress: Progress = lambda stage, done, total: None,
) -> None:
    """Write the page of a run; its texts are read from the archives again.

    Raises:
        DataError: the page cannot be written.
    """
    groups = list(_groups(audit, per_reason, progress))
    page = TEMPLATES.get_template("audit.html.jinja").render(
        name=audit.folder.resolve().name,
        groups=groups,
        stages={s: about for s, about in STAGES.items() if any(g.stage == s for g in groups)},
        documents=sum(group.documents for group in groups),
        kept=sum(group.documents for group in groups if group.is_kept),
        characters=CHARACTERS,
        made=datetime.now(UTC),
    )
    with file_errors():
        path.write_text(page, encoding="utf-8")


def _groups(audit: Audit, per_reason: int, progress: Progress) -> Iterator[Group]:
    funnel = audit.funnel()
    total = sum(row["documents"] for row in funnel)
    for done, row in enumerate(funnel):
        progress("reasons", done, len(funnel))
        stage, reason = row["stage"], row["reason"]
        samples = [_sample(audit, drawn) for drawn in audit.sample(stage, reason, per_reason)]
        yield Group(stage, reason, row["documents"], row["documents"] / total, samples)
    progress("reasons", len(funnel), len(funnel))


def _sample(audit: Audit, row: Row, *, with_twin: bool = True) -> Sample:
    look = audit.look(row)
    twins = audit.document(row["twin"]) if with_twin and row["twin"] else []
    twin = _sample(audit, twins[0], with_twin=False) if twins else None
    return Sample(row, facts(row), *_excerpt(look), look.problem, twin)


def _excerpt(look: Look) -> tuple[str, bool]:
    text = look.text.strip()
    return text[:CHARACTERS], len(text) > CHARACTERS


def facts(row: Row) -> dict[str, str]:
    """What a row says besides where the document is and what became of it."""
    shown = {"id", "url", "file", "offset", "stage", "decision", "reason"}
    return {
        name.replace("_", " "): f"{value:.3f}" if isinstance(value, float) else str(value)
        for name, value in row.items()
        if name not in shown and value is not None
    }
