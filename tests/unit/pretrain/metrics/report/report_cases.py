"""Runs whose report is looked at."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pretrain.config import load_config
from pretrain.metrics.history import read_history
from pretrain.metrics.report import Run
from pretrain.metrics.sinks import JsonlSink
from pretrain.run_dir import RunDirectory


def make_run(
    root: Path,
    rows: Sequence[Mapping[str, Any]],
    overrides: Sequence[str] = (),
    manifests: Sequence[Mapping[str, Any]] = (),
) -> Run:
    """A run that has logged these rows; it is named as its folder."""
    directory = RunDirectory(root)
    root.mkdir()
    directory.config.write_text(load_config("tiny-hybrid-moe", list(overrides)).to_yaml())
    sink = JsonlSink(directory.metrics)
    for row in rows:
        sink.write(dict(row))
    sink.close()
    return Run(root.name, directory, read_history(directory.metrics), manifests)


def write_json(path: Path, tree: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(tree))
