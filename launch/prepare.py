"""Make or reopen a run directory: nothing starts unless everything it needs is there."""

import json
import platform
import shutil
import subprocess
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from launch.sample import sample_shards
from pretrain.config import SAMPLE_SHARDS, Config, read_run_config
from pretrain.errors import UserError
from pretrain.run_dir import RunDirectory, write_atomically

# What may differ between two attempts of a run without changing its data or its model.
MAY_CHANGE = (
    "train.steps",
    "train.microbatch",
    "train.log_every",
    "train.loss_chunk",
    "parallel.",
    "checkpoint.",
    "wandb.",
    "run.",
)


def prepare_run(config: Config, directory: Path) -> RunDirectory:
    """Write the resolved configuration and the tokenizer into the run directory.

    Raises:
        UserError, DataError: the shards are not there, or the directory holds a run of another
            model or other data.
    """
    from pretrain.data import open_stream

    run = RunDirectory(directory.resolve())
    if config.data.shards == SAMPLE_SHARDS:
        config = _replace(config, "data", "shards", str(sample_shards()))
    config = _replace(config, "run", "dir", str(run.root))
    stream = open_stream(config)
    if run.config.exists():
        _refuse_another_run(run, config)
    run.root.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(stream.tokenizer, run.tokenizer)
    run.done.unlink(missing_ok=True)
    write_atomically(run.config, config.to_yaml())
    write_atomically(run.root / "versions.json", json.dumps(_versions(), indent=1) + "\n")
    return run


def _replace(config: Config, section: str, field: str, value: Any) -> Config:
    changed = getattr(config, section).model_copy(update={field: value})
    return config.model_copy(update={section: changed})


def _refuse_another_run(run: RunDirectory, config: Config) -> None:
    before = dict(_leaves(read_run_config(run).model_dump(mode="json"), ""))
    now = dict(_leaves(config.model_dump(mode="json"), ""))
    changed = [
        f"{key}: {before.get(key)!r} -> {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not key.startswith(MAY_CHANGE)
    ]
    if changed:
        raise UserError(
            f"{run.root} holds a run with other settings; resuming would change its data or its "
            "model:\n  " + "\n  ".join(changed) + "\nUse the same settings, or another --run-dir"
        )


def _leaves(tree: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _leaves(value, f"{prefix}.{key}" if prefix else key)
    else:
        yield prefix, tree


def _versions() -> dict[str, str]:
    packages = ("farspan", "torch", "numpy")
    revision = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
        "git": revision.stdout.strip() or "not a git checkout",
    }
