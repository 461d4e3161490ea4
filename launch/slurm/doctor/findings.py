"""What the doctor says: of each check what it has seen, and what a person should mend."""

from collections.abc import Iterable
from dataclasses import dataclass

NAMES_AT_MOST = 4


@dataclass(frozen=True)
class Finding:
    """Something that would make a job fail, wait or crawl.

    Attributes:
        where: the node or nodes, the partition, the setting.
        what: is wrong there.
        fix: what to do about it; empty where `what` says so.
    """

    where: str
    what: str
    fix: str = ""


@dataclass(frozen=True)
class Check:
    """A line of the table.

    Attributes:
        saw: the values that were looked at, in a few words.
    """

    name: str
    saw: str
    findings: tuple[Finding, ...] = ()


def listed(names: Iterable[str]) -> str:
    """Names in their order, of many only some: "node1, node2, node3, node4 and 12 more"."""
    names = sorted(set(names), key=_by_number)
    more = len(names) - NAMES_AT_MOST
    if more <= 1:
        return ", ".join(names)
    return f"{', '.join(names[:NAMES_AT_MOST])} and {more} more"


def _by_number(name: str) -> tuple[str, int, str]:
    """node10 comes after node9."""
    stem = name.rstrip("0123456789")
    number = name[len(stem) :]
    return stem, int(number or 0), name
