"""Make or reopen a run directory: nothing starts unless everything it needs is there."""

import json
import platform
import shutil
import subprocess
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from data_pipeline.shards import Manifest, load_manifest
from launch.sample import sample_shards
from pretrain.config import SAMPLE_SHARDS, Config, ShardSource, read_run_config
from pretrain.data import open_stream
from pretrain.errors import UserError
from pretrain.run_dir import RunDirectory, write_atomically

# What may differ between two attempts of a run without changing its data or its model.
MAY_CHANGE = (
    "train.steps",
    "train.microbatch",
    "train.log_every",
    "train.loss_chunk",
    "train.collective_timeout_s",
    "train.hang_timeout_s",
    "parallel.",
    "checkpoint.",
    "wandb.",
    "run.",
)


def prepare_run(config: Config, directory: Path) -> RunDirectory:
    """Write the resolved configuration, the tokenizer and what is known of the data.

    Raises:
        UserError, DataError: the shards are not there, or the directory is in use or holds a run
            of another model or other data; nothing has been changed then.
    """
    run = RunDirectory(directory.resolve())
    config = _with_absolute_paths(config, run)
    stream = open_stream(config)
    data = [_describe(source, load_manifest(source.path)) for source in config.data.sources()]
    run.root.mkdir(parents=True, exist_ok=True)
    with run.exclusive():
        if not run.config.exists():
            shutil.copyfile(stream.tokenizer, run.tokenizer)
            write_atomically(run.data, json.dumps(data, indent=1) + "\n")
        else:
            _refuse_another_run(run, config, data)
        run.done.unlink(missing_ok=True)
        write_atomically(run.root / "versions.json", json.dumps(_versions(), indent=1) + "\n")
        write_atomically(run.config, config.to_yaml())
    return run


def _with_absolute_paths(config: Config, run: RunDirectory) -> Config:
    """The run can be resumed and reported from any working directory."""
    if config.data.shards == SAMPLE_SHARDS:
        shards: Any = str(sample_shards())
    elif isinstance(config.data.shards, str):
        shards = str(Path(config.data.shards).resolve())
    else:
        shards = tuple(
            source.model_copy(update={"path": str(Path(source.path).resolve())})
            for source in config.data.shards
        )
    data = config.data.model_copy(update={"shards": shards})
    return config.model_copy(
        update={"data": data, "run": config.run.model_copy(update={"dir": str(run.root)})}
    )


def _describe(source: ShardSource, manifest: Manifest) -> dict[str, Any]:
    return {
        "shards": manifest.sha256,
        "tokenizer": manifest.tokenizer_sha256,
        "weight": source.weight,
        "unigram_entropy": manifest.unigram_entropy,
        "funnel": manifest.extra.get("funnel", []),
    }


def _refuse_another_run(run: RunDirectory, config: Config, data: list[dict[str, Any]]) -> None:
    def settings(config: Config, data: list[dict[str, Any]]) -> dict[str, Any]:
        tree = config.model_dump(mode="json")
        tree["data"]["shards"] = {
            str(number): {key: source[key] for key in ("shards", "tokenizer", "weight")}
            for number, source in enumerate(data)
        }
        return dict(_leaves(tree, ""))

    before = settings(read_run_config(run), json.loads(run.data.read_text()))
    now = settings(config, data)
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
