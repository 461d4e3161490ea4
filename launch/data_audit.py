"""`farspan data audit`: what became of each document of a crawl, and why."""

import json
from collections.abc import Iterable
from itertools import groupby, islice
from pathlib import Path
from textwrap import indent, shorten
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from launch.data_rates import rates_table
from launch.progress import show_progress
from pretrain.errors import UserError

if TYPE_CHECKING:
    from data_pipeline.audit import Audit

console = Console()
CHARACTERS = 2_000
EXCERPT = 200


def audit(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The --out of a finished run.")],
    doc: Annotated[str | None, typer.Option(help="Show this document, by its id.")] = None,
    reason: Annotated[
        str | None, typer.Option(help="List the documents with this reason, as in the summary.")
    ] = None,
    summary: Annotated[
        bool, typer.Option("--summary", help="Count by stage and reason; so it is by default.")
    ] = False,
    examples: Annotated[
        bool,
        typer.Option(
            "--examples", help="Show the beginnings of some texts of each reason, or of --reason."
        ),
    ] = False,
    html: Annotated[
        Path | None, typer.Option(help="Write a page with a sample of texts for each reason.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Of the documents listed.")] = 20,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print rows as JSON, one on a line.")
    ] = False,
) -> None:
    """Say what became of the documents of a run, and why."""
    from data_pipeline.audit import Audit

    asked = [
        name
        for name, given in (
            ("--doc", doc),
            ("--examples", examples),
            ("--reason", reason and not examples),
            ("--summary", summary),
        )
        if given
    ]
    if len(asked) > 1:
        raise UserError(f"{' and '.join(asked)} are different questions: ask one of them")
    opened = Audit(folder)
    if doc is not None:
        _show_document(opened, doc, as_json)
    elif examples:
        _show_examples(opened.examples(reason), as_json)
    elif reason is not None:
        _list(opened.with_reason(reason), limit, as_json)
    elif summary or html is None:
        _summarise(opened, as_json)
    if html is not None:
        _write_page(opened, html)


def _write_page(opened: "Audit", html: Path) -> None:
    from data_pipeline.audit_page import write_page

    with show_progress(console) as progress:
        write_page(opened, html, progress=progress)
    _say(f"wrote {html}")


def _summarise(opened: "Audit", as_json: bool) -> None:
    funnel = opened.funnel()
    if as_json:
        _print_json(funnel)
        return
    total = sum(row["documents"] for row in funnel)
    table = Table("stage", "reason")
    table.add_column("documents", justify="right")
    table.add_column("share", justify="right")
    for row in funnel:
        count = row["documents"]
        table.add_row(row["stage"], row["reason"], f"{count:,}", f"{count / total:.1%}")
    console.print(table)
    if rates := opened.rates():
        console.print(rates_table(rates))
    _say(f"{total:,} documents. --reason REASON lists those of one reason, --examples shows texts")


def _show_examples(rows: Iterable[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        _print_json(rows)
        return
    for (step, reason), group in groupby(rows, lambda row: (row["step"], row["reason"])):
        _say(f"{step}: {reason}")
        for row in group:
            _say("  " + "  ".join(filter(None, (row["url"] or row["id"], row["detail"]))))
            if row["excerpt"]:
                _say(indent(shorten(row["excerpt"], EXCERPT, placeholder=" [...]"), "    "))


def _list(rows: Iterable[dict[str, Any]], limit: int, as_json: bool) -> None:
    shown = list(islice(rows, limit + 1))
    if as_json:
        _print_json(shown[:limit])
        return
    for row in shown[:limit]:
        _say("  ".join(filter(None, (row["id"], row["url"], row["detail"]))))
    if len(shown) > limit:
        _say(f"... and more; --limit shows more than {limit}")


def _show_document(opened: "Audit", id: str, as_json: bool) -> None:
    rows = opened.document(id)
    if not rows:
        raise UserError(f"no document of {opened.folder} has the id {id!r}")
    if as_json:
        _print_json(rows)
        return
    for row in rows:
        _show(opened, row)


def _show(opened: "Audit", row: dict[str, Any]) -> None:
    facts = {name: str(value) for name, value in row.items() if value is not None}
    if row["twin"]:
        for twin in opened.document(row["twin"]):
            facts["kept instead"] = f"{twin['id']}  {twin['url']}"
    elif repeats := opened.duplicates(row["id"]):
        facts["repeated by"] = ", ".join(repeat["id"] for repeat in repeats)
    width = max(map(len, facts))
    for name, fact in facts.items():
        _say(f"{name:>{width}}  {fact}")
    look = opened.look(row)
    if look.problem:
        _say(f"the text cannot be shown: {look.problem}")
    elif look.text:
        more = " [...]" if len(look.text) > CHARACTERS else ""
        _say(f"\n{look.text[:CHARACTERS]}{more}\n")


def _print_json(rows: Iterable[dict[str, Any]]) -> None:
    for row in rows:
        print(json.dumps(row, ensure_ascii=False))


def _say(line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)
