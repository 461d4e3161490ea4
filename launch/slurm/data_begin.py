"""What a job of a data run begins with: `python -m launch.slurm.data_begin OUT STAGE WORDS_DIR`.

It leaves three files for the batch script in WORDS_DIR, of words that end with a zero byte:
`modules` to load, `options` of srun, and the `command` of its task.

Exit codes: 0, or 2 for a mistake.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from launch.slurm.begin import write_words
from launch.slurm.container import in_container, options_of_srun
from launch.slurm.data_job import DataJob, JobFolder, Stage
from pretrain.errors import UserError


def begin(out: Path, stage: Stage, words: Path) -> None:
    """Write the words of a job. Raises UserError where it has no parameters."""
    job = JobFolder(out).required()
    profile, container = job.profile, job.profile.container
    is_contained = container.runtime != "none"
    python = container.python if is_contained else os.environ.get("FARSPAN_PYTHON", "python")
    command = [
        *("env", *(f"{name}={setting.value}" for name, setting in profile.environment.items())),
        *(python, "-P", "-m", "launch.slurm.data_task", str(out), stage.value),
    ]
    folders = folders_of(job, out)
    write_words(words / "modules", profile.modules)
    write_words(words / "options", options_of_srun(container, folders))
    write_words(words / "command", in_container(profile, folders, command))


def folders_of(job: DataJob, out: Path) -> list[str]:
    """What a job reads and writes, besides what an image has."""
    run, folder = job.run, Path(job.folder)
    named = [*run.inputs, run.recipe, run.crawl_url, run.tokenizer, run.classifier]
    paths = [folder / name for name in named if name is not None and "://" not in name]
    return list(dict.fromkeys(str(_folder(path)) for path in (out, folder, *paths)))


def _folder(path: Path) -> Path:
    """The folder that a path is, or what of a pattern is one."""
    path = path.resolve()
    return path if path.is_dir() else next(parent for parent in path.parents if parent.is_dir())


def main(arguments: Sequence[str]) -> int:
    out, stage, words = arguments
    try:
        begin(Path(out).resolve(), Stage(stage), Path(words))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
