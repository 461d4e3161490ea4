"""Data runs in `farspan launch status`: a list of what is known of one, or a row for each."""

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from launch.data_state import DataState
from launch.durations import duration_text

FAILURES_SHOWN = 5


def render_data_runs(names: Sequence[str], states: Sequence[DataState]) -> RenderableType:
    """
    Args:
        names: of the runs, as a table calls them.
    """
    if len(states) == 1:
        return _details(states[0])
    table = Table(box=None, pad_edge=False)
    for name in ("data run", "state", "stage", "parts", "archives", "shards", "speed", "ETA", ""):
        table.add_column(name, overflow="fold")
    for name, state in zip(names, states, strict=True):
        facts = facts_of(state)
        shown = ("state", "stage", "parts", "archives", "shards", "speed", "ETA")
        notes = "; ".join(filter(None, (facts["why"], facts["where"])))
        table.add_row(Text(name), *(Text(facts[fact]) for fact in shown), Text(notes))
    return table


def facts_of(state: DataState) -> dict[str, str]:
    """What a person wants to know of a run, by name; "" for what is not known."""
    shards = "" if state.shards is None else f"{state.written:,} of {state.shards:,} written"
    speed = "" if state.documents_per_s is None else f"{state.documents_per_s:,.0f} documents/s"
    if state.mb_per_s is not None:
        speed += f", {state.mb_per_s:,.1f} MB/s"
    return {
        "state": state.state,
        "stage": state.stage,
        "parts": ", ".join(f"{count} {name}" for name, count in state.parts.items()),
        "archives": f"{state.cleaned:,} of {state.archives:,} cleaned" if state.archives else "",
        "documents": f"{state.documents:,} in these" if state.cleaned else "",
        "shards": shards,
        "speed": speed,
        "ETA": "" if state.eta_s is None else f"{state.stage} in {duration_text(state.eta_s)}",
        "why": state.detail,
        "where": state.where,
    }


def line_of(name: str, state: DataState) -> str:
    """Without what changes all the time."""
    facts = facts_of(state)
    words = [name, *(facts[fact] for fact in ("state", "stage", "parts", "archives", "shards"))]
    return "  ".join(filter(None, [*words, facts["where"]]))


def _details(state: DataState) -> RenderableType:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("data run", Text(str(state.out)))
    for name, fact in facts_of(state).items():
        if fact:
            table.add_row(name, Text(fact))
    failures = [Text(failure) for failure in state.failures[:FAILURES_SHOWN]]
    if len(state.failures) > FAILURES_SHOWN:
        failures.append(Text(f"... and {len(state.failures) - FAILURES_SHOWN} more"))
    return Group(table, Text(), *failures) if failures else table
