"""Make or reopen a run directory: nothing starts unless everything it needs is there."""

import json
import platform
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from data_pipeline.errors import DataError
from data_pipeline.funnel import FUNNEL, parse_funnel
from data_pipeline.shards import Manifest, load_manifest
from launch.changes import allow_changes, find_changes, note_changes
from launch.sample import with_sample
from pretrain.config import Config, read_run_config
from pretrain.curriculum import PhaseConfig
from pretrain.data import cache_of, open_stream, require_enough, source_names
from pretrain.data_config import ShardSource
from pretrain.errors import UserError
from pretrain.evals.held_out_data import open_held_out
from pretrain.run_dir import RunDirectory, write_atomically

OFFLOAD_DIR = "parallel.offload_dir"


def prepare_run(
    config: Config,
    directory: Path,
    allowed: Sequence[str] = (),
    imported: Mapping[str, str] | None = None,
) -> RunDirectory:
    """Write the resolved configuration, the tokenizer and what is known of the data.

    Args:
        allowed: settings that may differ from those the run has had, although they change its
            data, its model or its training.
        imported: whose weights it is to begin with.

    Raises:
        UserError, DataError: the shards are not there, or the directory is in use, cannot be
            written, or holds a run with other settings; nothing has been changed then.
    """
    run = RunDirectory(directory.resolve())
    config = with_absolute_paths(config, run)
    if config.checkpoint.dir:
        # fsspec takes a while to import, and few need it here.
        from pretrain.checkpoint.target import Target

        Target(config.checkpoint.dir).check()
    stream = open_stream(config)
    require_enough(stream, config)
    open_held_out(config, stream)
    cache = cache_of(config.data)
    sources = config.data.sources()
    manifests = [
        load_manifest(source.path, growing=source.growing, cache=cache) for source in sources
    ]
    data, versions = list(map(_describe, sources, manifests)), _versions()
    try:
        run.root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"the run directory {run.root} cannot be made: {error.strerror}; choose another with "
            "--run-dir"
        ) from None
    try:
        with run.launching(), run.exclusive():
            if run.config.exists():
                before = read_run_config(run), json.loads(run.data.read_text())
                changes = find_changes(before, (config, data))
                allow_changes(run, changes, allowed, before[0].model, config.model)
                note_changes(run, changes)
            else:
                allow_changes(run, (), allowed, config.model, config.model)
                shutil.copyfile(stream.tokenizer, run.tokenizer)
            write_atomically(run.data, json.dumps(data, indent=1) + "\n")
            _keep_funnels(source_names(config.data), manifests, run)
            run.done.unlink(missing_ok=True)
            run.cancelled.unlink(missing_ok=True)
            write_atomically(run.versions, json.dumps(versions, indent=1) + "\n")
            if imported:
                # Before there is a run that could be trained without them.
                write_atomically(run.imported, json.dumps(imported) + "\n")
            write_atomically(run.config, config.to_yaml())
    except OSError as error:
        raise UserError(run.explain(error)) from None
    return run


def with_absolute_paths(config: Config, run: RunDirectory) -> Config:
    """The run can be resumed and reported from any working directory."""
    config = with_sample(config)
    shards: Any
    if isinstance(config.data.shards, str):
        shards = _absolute(config.data.shards)
    else:
        shards = tuple(
            source.model_copy(update={"path": _absolute(source.path)})
            for source in config.data.shards
        )
    cache_dir = _absolute(config.data.cache_dir) if config.data.cache_dir else ""
    data = config.data.model_copy(update={"shards": shards, "cache_dir": cache_dir})
    checkpoint = config.checkpoint
    if checkpoint.dir:
        checkpoint = checkpoint.model_copy(update={"dir": _absolute(checkpoint.dir)})
    parallel = config.parallel
    if parallel.offload_dir:
        folder = _absolute_on_each_machine(parallel.offload_dir)
        parallel = parallel.model_copy(update={"offload_dir": folder})
    evaluated = config.eval
    if isinstance(evaluated.sources, str):
        evaluated = evaluated.model_copy(update={"sources": _absolute(evaluated.sources)})
    elif evaluated.sources is not None:
        sources = tuple(
            source.model_copy(update={"path": _absolute(source.path)})
            for source in evaluated.sources
        )
        evaluated = evaluated.model_copy(update={"sources": sources})
    run_section = config.run.model_copy(update={"dir": str(run.root)})
    return config.model_copy(
        update={
            "data": data,
            "parallel": parallel,
            "phases": tuple(map(_with_absolute_offload, config.phases)),
            "checkpoint": checkpoint,
            "eval": evaluated,
            "run": run_section,
        }
    )


def _with_absolute_offload(phase: PhaseConfig) -> PhaseConfig:
    settings = phase.settings()
    if not (folder := settings.get(OFFLOAD_DIR)):
        return phase
    own = phase.model_dump(include=set(PhaseConfig.model_fields))
    return PhaseConfig(**own, **settings | {OFFLOAD_DIR: _absolute_on_each_machine(folder)})


def _absolute_on_each_machine(folder: str) -> str:
    """Links stay: on another machine they may lead elsewhere."""
    return str(Path(folder).absolute())


def _absolute(path: str) -> str:
    return path if "://" in path else str(Path(path).resolve())


def _describe(source: ShardSource, manifest: Manifest) -> dict[str, Any]:
    return {
        # Which of a growing source's shards were read, checkpoints know.
        "shards": "growing" if source.growing else manifest.sha256,
        "tokenizer": manifest.tokenizer_sha256,
        "weight": source.relative_weight,
        **source.model_dump(mode="json", include={"epochs", "max_epochs", "upsample", "growing"}),
        "unigram_entropy": manifest.unigram_entropy,
        "funnel": manifest.extra.get("funnel", []),
    }


def _keep_funnels(names: Sequence[str], manifests: Sequence[Manifest], run: RunDirectory) -> None:
    """Keep what a report shows of the data, which may be elsewhere or gone by then."""
    funnels = [
        {
            "source": name,
            "path": manifest.store.name,
            "documents": manifest.documents,
            "tokens": manifest.tokens,
            "shards": len(manifest.shards),
            "steps": steps,
        }
        for name, manifest in zip(names, manifests, strict=True)
        if (steps := _steps_of(manifest))
    ]
    run.funnel.unlink(missing_ok=True)
    if funnels:
        write_atomically(run.funnel, json.dumps(funnels) + "\n")


def _steps_of(manifest: Manifest) -> list[dict[str, Any]]:
    # Where files cannot be listed, a store refuses one that is not there. No run fails for it.
    with suppress(DataError):
        content = manifest.store.read(FUNNEL)
        return parse_funnel(content, FUNNEL) if content else []
    return []


def _versions() -> dict[str, str]:
    packages = ("farspan", "torch", "numpy")
    describe = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    revision = ""
    with suppress(OSError):  # there may be no git
        done = subprocess.run(describe, capture_output=True, text=True, check=False)
        revision = done.stdout.strip()
    return {
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
        "git": revision or "not a git checkout",
    }
