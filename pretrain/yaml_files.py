"""YAML files that are found by a name among shipped ones, or by their path."""

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from pretrain.errors import UserError


def shipped_names(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("*.yaml"))


def path_of(kind: str, name: str, folder: Path) -> Path:
    """The file of a shipped name, or the one of that path.

    Args:
        kind: what messages call it, such as recipe.

    Raises:
        UserError: there is none; the message has the nearest name.
    """
    names = shipped_names(folder)
    if name in names:
        return folder / f"{name}.yaml"
    path = Path(name)
    if path.suffix in {".yaml", ".yml"}:
        if path.is_file():
            return path
        raise UserError(f"{kind} {name}: no such file")
    raise UserError(
        f"{kind} {name!r} is not known{nearest(name, names)}; shipped: {', '.join(names)}; or give "
        "the path of a .yaml file"
    )


def read_mapping(path: Path, example: str) -> dict[str, Any]:
    """Raises UserError: it is not YAML, or something else than a mapping such as `example`."""
    try:
        tree = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path} must hold a mapping such as `{example}`")
    return tree


def nearest(name: str, allowed: Iterable[str]) -> str:
    """Of the names that are allowed the one that may be meant, for the end of a sentence."""
    close = difflib.get_close_matches(name, list(allowed), n=1)
    return f", did you mean {close[0]}?" if close else ""


def nearest_key(dotted: str, keys: Iterable[str]) -> str:
    """Like `nearest`, of dotted names: with the same last part, or else by the whole, or else by
    the last part. The first of several that are as close.
    """
    keys = list(keys)
    leaf = dotted.rpartition(".")[2]
    if same := [key for key in keys if key.rpartition(".")[2] == leaf]:
        close = [max(same, key=lambda key: difflib.SequenceMatcher(None, key, dotted).ratio())]
    else:
        by_leaf = {key.rpartition(".")[2]: key for key in keys}
        close = difflib.get_close_matches(dotted, keys, n=1) or [
            by_leaf[name] for name in difflib.get_close_matches(leaf, by_leaf, n=1)
        ]
    return f", did you mean {close[0]}?" if close else ""
