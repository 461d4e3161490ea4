"""The files of a folder, to compare it with another one."""

from pathlib import Path


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of all files below it, by their paths there, but for metrics, which have times."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "metrics.jsonl"
    }
