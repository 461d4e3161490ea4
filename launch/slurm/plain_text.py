"""What Slurm's commands print, read: records of fields, lists, limits and times."""

import re
from datetime import datetime

# Fields of free text, which have the rest of their line to themselves.
FREE_TEXT = (
    *("JobName", "Command", "WorkDir", "StdErr", "StdIn", "StdOut", "Reason", "OS", "Extra"),
    *("Comment", "AdminComment", "SystemComment", "MailUser"),
)


def records(text: str, first: str) -> list[dict[str, str]]:
    """The records that scontrol prints, each of which begins with the field `first`.

    Printed over several lines, as it is by default: a field of free text, such as a job's name,
    ends its line, so that nothing in it is taken for another field.
    """
    found: list[dict[str, str]] = []
    for line in text.splitlines():
        if line.startswith(f"{first}="):
            found.append({})
        if found and line.startswith((f"{first}=", " ")):
            found[-1] = _fields(line) | found[-1]
    return found


def _fields(line: str) -> dict[str, str]:
    fields: dict[str, str] = {}
    line = line.strip()
    while match := re.match(r"([A-Za-z][\w:/]*)=", line):
        name, rest = match[1], line[match.end() :]
        # The Reason of a job is a word, the Reason of a node a sentence, alone on its line.
        if name in FREE_TEXT and not (name == "Reason" and " Dependency=" in rest):
            return fields | {name: rest}
        value, _, line = rest.partition(" ")
        fields[name] = value
        line = line.lstrip()
    return fields


def limit_s(text: str | None) -> int | None:
    """Seconds of days-hours:minutes:seconds, as Slurm prints them; None: no limit."""
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text or "")
    if not match:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def names_of(text: str | None) -> tuple[str, ...]:
    """The names of a list; none where that is no restriction."""
    listed = given(text)
    return () if listed in ("", "ALL") else tuple(listed.split(","))


def given(text: str | None) -> str:
    """A value; "" in place of the words for none."""
    return "" if text in (None, "(null)", "None", "N/A") else str(text)


def moment(text: str | None) -> datetime | None:
    """A time of this machine's zone; None where there is none."""
    try:
        return datetime.fromisoformat(text or "").astimezone()
    except ValueError:
        return None
