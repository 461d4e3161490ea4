"""The manifest that makes a folder a checkpoint: each file's size and sha256, written last."""

import hashlib
import json
from pathlib import Path

from pretrain.run_dir import write_atomically

MANIFEST = "manifest.json"


def write_manifest(folder: Path) -> None:
    """Hash every file of `folder` into its manifest."""
    files = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    write_atomically(folder / MANIFEST, json.dumps({"files": files}, indent=1) + "\n")


def find_damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, naming the file; None if it is whole."""
    manifest = folder / MANIFEST
    try:
        files = json.loads(manifest.read_text())["files"]
    except FileNotFoundError:
        return f"{manifest} is missing"
    except (ValueError, KeyError):
        return f"{manifest} is damaged"
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != expected["bytes"]:
            return f"{path} has {path.stat().st_size} bytes, expected {expected['bytes']}"
        if sha256(path) != expected["sha256"]:
            return f"{path} has another sha256 than {MANIFEST} says"
    return None


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
