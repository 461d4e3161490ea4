"""The manifest that makes a folder a checkpoint: each file's size and sha256, written last."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pretrain.run_dir import write_atomically

MANIFEST = "manifest.json"
Entries = dict[str, dict[str, Any]]


def list_files(folder: Path) -> list[str]:
    """The names of all files below `folder`."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def describe_files(folder: Path, names: Sequence[str]) -> Entries:
    """Size and sha256 of some files of `folder`."""
    return {
        name: {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)}
        for name in names
    }


def write_manifest(folder: Path, files: Entries) -> None:
    write_atomically(folder / MANIFEST, json.dumps({"files": files}, indent=1) + "\n")


def find_damage(folder: Path, part: int = 0, parts: int = 1) -> str | None:
    """What is wrong with a checkpoint, naming the file; None if it is whole.

    Args:
        part: of `parts` that share the files between them, the one to look at.
    """
    manifest = folder / MANIFEST
    try:
        files = json.loads(manifest.read_text())["files"]
        entries = [(name, entry["bytes"], entry["sha256"]) for name, entry in files.items()]
    except FileNotFoundError:
        return f"{manifest} is missing"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{manifest} is damaged"
    for name, size, digest in entries[part::parts]:
        path = folder / name
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != size:
            return f"{path} has {path.stat().st_size} bytes, expected {size}"
        if sha256(path) != digest:
            return f"{path} has another sha256 than {MANIFEST} says"
    return None


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
