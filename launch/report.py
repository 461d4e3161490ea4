"""`farspan report`: the page of one run or of several, as a file or kept up to date by a server."""

import json
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pretrain.config import read_run_config
from pretrain.errors import UserError
from pretrain.run_dir import RunDirectory

HOST = "127.0.0.1"
PORT = 8750


class NamedRun(NamedTuple):
    """A run, and what the page calls it."""

    name: str
    directory: RunDirectory


def report_runs(
    paths: Sequence[Path], out: Path | None, serve: bool, port: int | None, host: str | None
) -> None:
    """Write or serve the report of runs.

    Raises:
        UserError: a path is no run directory, or options that do not go together.
    """
    if not serve:
        if port is not None or host is not None:
            option = "--port" if port is not None else "--host"
            raise UserError(f"{option} belongs to --serve; a report that is written has --out FILE")
        print(write_report_of(paths, out))
        return
    if out is not None:
        raise UserError("--out writes a file and --serve follows the runs: choose one of them")
    from launch.report_server import serve_report

    for path in paths:
        if not path.is_dir():
            print(f"warning: there is no folder {path} yet; its run is shown once it has begun")
    serve_report(named_runs(paths), host or HOST, PORT if port is None else port)


def write_report_of(paths: Sequence[Path], out: Path | None = None) -> Path:
    """Write the report of runs with what is known of their data, and return its path.

    Args:
        out: of one run RUN/report.html if None.

    Raises:
        UserError: there is no run, or nowhere to write.
    """
    from pretrain.metrics.history import read_history
    from pretrain.metrics.report import Run, render_page
    from pretrain.run_dir import write_atomically

    runs = named_runs(paths)
    if out is None and len(runs) > 1:
        raise UserError(
            f"{len(runs)} runs share one page: say where it goes, as in --out runs.html"
        )
    for run in runs:
        if not run.directory.metrics.exists():
            read_run_config(run.directory)
    out = out or runs[0].directory.report
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.parent}; make it, or name another")
    if out.is_dir():
        raise UserError(f"--out {out} is a folder; name a file, as in {out / 'report.html'}")
    if not os.access(out.parent, os.W_OK):
        raise UserError(f"{out.parent} cannot be written to; --out FILE puts the report elsewhere")
    shown = [Run(name, run, read_history(run.metrics), data_manifests(run)) for name, run in runs]
    write_atomically(out, render_page(shown))
    return out


def named_runs(paths: Sequence[Path]) -> list[NamedRun]:
    """Runs by the names of their folders, with as many of those above as tell them apart.

    Raises UserError: a path is that of a file.
    """
    for path in paths:
        if path.is_file():
            raise UserError(f"{path} is a file; name the run directory, as in {path.parent}")
    by_root = {path.resolve(): path for path in paths}
    return [NamedRun(_name_of(root, by_root), RunDirectory(by_root[root])) for root in by_root]


def _name_of(root: Path, roots: Collection[Path]) -> str:
    for length in range(1, len(root.parts)):
        name = root.parts[-length:]
        if [other.parts[-length:] for other in roots].count(name) == 1:
            return "/".join(name)
    return str(root)


def data_manifests(run: RunDirectory) -> list[dict[str, Any]]:
    """What the run knows of its data; nothing before it has begun."""
    try:
        manifests: list[dict[str, Any]] = json.loads(run.data.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return []
    return manifests
