"""What the doctor's batch script does first: `python -m launch.slurm.doctor.begin FOLDER WORDS`.

It writes down which nodes the job has got, and leaves files of words for the script, as
launch.slurm.begin does: `modules`, `prepare`, `options` of srun, and the commands `node` and
`bandwidth` of each rank.
"""

import os
import sys
import tempfile
from pathlib import Path

from launch.environment import describe
from launch.slurm.begin import environment_of_start, scratch_of, write_words
from launch.slurm.client import Slurm, SlurmError
from launch.slurm.container import before_container, in_container, options_of_srun
from launch.slurm.doctor import disk
from launch.slurm.doctor.node import Folder, Meeting, Request
from launch.slurm.profile import Profile
from launch.slurm.start import Start
from pretrain.errors import UserError
from pretrain.run_dir import write_atomically

MIB = 1 << 20
# What a job needs before its first checkpoint, which `farspan train --dry-run` counts.
ROOM = 1024 * MIB


def begin(folder: Folder, words: Path, slurm: Slurm) -> None:
    """
    Raises:
        UserError: this is no job, or rank 0 would not be found.
        SlurmError: Slurm does not answer.
    """
    request = Request.model_validate_json(folder.request.read_text())
    profile, start = request.profile, Start.of_this_job(slurm)
    meeting = Meeting(
        addresses={node: request.addresses[node] for node in start.nodes},
        tasks=start.tasks,
        interface=profile.network.interface,
        folders=_folders(profile, start, folder.root),
    )
    variables = environment_of_start(start, profile, slurm, attempt=None)
    write_atomically(folder.meeting, meeting.model_dump_json() + "\n")
    print(f"{start.ranks} ranks on {', '.join(start.nodes)}\n{describe(variables)}", flush=True)
    python = os.environ.get("FARSPAN_PYTHON", "python")
    if profile.container.runtime != "none":
        python = profile.container.python
    settings = [f"{one.name}={one.value}" for one in variables]
    scratch = scratch_of(profile, start)
    made = [Path(scratch)] if scratch else []
    mounts = [str(path) for path in (folder.root, *made)]
    write_words(words / "modules", profile.modules)
    write_words(words / "prepare", before_container(profile.container, made))
    write_words(words / "options", options_of_srun(profile.container, mounts))
    for step in ("node", "bandwidth"):
        module = f"launch.slurm.doctor.{step}"
        command = ["env", *settings, python, "-P", "-m", module, str(folder.root)]
        write_words(words / step, in_container(profile, mounts, command))


def _folders(profile: Profile, start: Start, shared: Path) -> tuple[disk.Folder, ...]:
    """Where ranks write, and how much room they want there."""
    found = [
        disk.Folder(path=str(shared), why="runs", wants=ROOM),
        disk.Folder(path=tempfile.gettempdir(), why="temporary files", wants=ROOM // 4),
    ]
    if scratch := scratch_of(profile, start):
        why = "compiled kernels, scratch in the profile"
        found.append(disk.Folder(path=scratch, why=why, wants=ROOM, made=True))
    if profile.gpus != "none":
        why = "memory that ranks share: NCCL, data loaders"
        found.append(disk.Folder(path="/dev/shm", why=why, wants=ROOM))
    return tuple(found)


def main() -> int:
    root, words = map(Path, sys.argv[1:])
    try:
        begin(Folder(root), words, Slurm())
    except (UserError, SlurmError) as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
