"""The batch script, on commands that stand for those of Slurm: what a rank gets of each field."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from launch.slurm.container import in_container, options_of_srun
from launch.slurm.doctor import begin as doctor
from launch.slurm.doctor.node import Folder, Request
from launch.slurm.job import Job, write_job
from launch.slurm.profile import Container, Profile, Setting
from pretrain.config import load_config
from pretrain.run_dir import RunDirectory
from tests.ranks import ROOT, TIMEOUT_S
from tests.unit.launch.slurm.starts import Nodes, submitted

HOSTILE = "a b\"c'd $(touch pwned) `touch pwned` %j *; \\ € ü"
# srun says what it was told and runs the command once, as the tasks of a job would.
PROGRAMS = {
    "srun": 'printf "%s\\0" "$@" >"$TOLD/srun"; while [[ $1 == --* ]]; do shift; done; '
    'SLURM_PROCID=0 SLURM_LOCALID=0 exec "$@"',
    "sbatch": "exit 1",
    "scontrol": "if [[ $2 == hostnames ]]; then echo n1; else echo JobId=7 JobName=x; fi",
    "module": 'printf "%s\\0" "$@" >"$TOLD/module"',
    # It starts no container to which a folder is bound that is not there.
    "apptainer": 'printf "%s\\0" "$@" >"$TOLD/apptainer"; shift; '
    "while [[ $1 == --* ]]; do bind=${1#--bind=}; shift; "
    'stat -- "${bind%%:*}" >/dev/null || exit 255; done; shift; exec "$@"',
    "python-of-image": 'printf "%s\\0" "$@" "$RANK" "$LOCAL_RANK" "$FIELD" >"$TOLD/rank"; '
    'touch "$RUN/done.json"',
}


def told(folder: Path, program: str) -> list[str]:
    return (folder / "told" / program).read_bytes().decode().split("\0")[:-1]


def run_script(run: RunDirectory, folder: Path) -> str:
    """Run the batch script in `folder` as Slurm would, and return what it prints."""
    (folder / "told").mkdir()
    for name, script in PROGRAMS.items():
        (folder / name).write_text(f"#!/bin/bash\n{script}\n")
        (folder / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1", "SLURM_TASKS_PER_NODE": "1"}
    environment = os.environ | job | {"SLURM_JOB_NUM_NODES": "1", "SLURMD_NODENAME": "n1"}
    environment |= {"PATH": f"{folder}:{os.environ['PATH']}", "TOLD": str(folder / "told")}
    done = subprocess.run(
        ["bash", str(ROOT / "slurm" / "train.sbatch"), str(run.root)],
        cwd=folder,
        env=environment | {"FARSPAN_PYTHON": sys.executable, "RUN": str(run.root)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_no_field_is_evaluated(tmp_path: Path) -> None:
    programs = tmp_path / "programs"
    programs.mkdir()
    run = RunDirectory(tmp_path / f"{HOSTILE}\n")
    run.root.mkdir()
    shards, held_out, mounted, *written = (
        f"{tmp_path}/{name} {HOSTILE}"
        for name in ("shards", "held out", "mounted", "saved", "scratch", "cache", "offloaded")
    )
    for path in (shards, held_out, mounted):
        Path(path).mkdir()
    saved, scratch, cache, offloaded = (f"{path}/new" for path in written)
    names = {"data.shards": shards, "eval.sources": held_out, "checkpoint.dir": saved}
    names |= {"data.cache_dir": cache, "parallel.offload_dir": offloaded}
    settings = [f'{name}="{_escaped(path)}"' for name, path in names.items()]
    settings += ["eval.every=5", "parallel.offload=disk", "parallel.recompute=full"]
    run.config.write_text(load_config("tiny", settings).to_yaml())
    profile = Profile(
        ranks_per_node=1,
        cpus_per_rank=1,
        gpus="none",
        scratch=scratch,
        modules=(HOSTILE,),
        environment={"FIELD": Setting(value=f"{HOSTILE}\n", why=HOSTILE)},
        container=Container(
            runtime="apptainer",
            image=HOSTILE,
            mounts=(mounted,),
            python=str(programs / "python-of-image"),
        ),
    )
    job = Job(
        recipe=HOSTILE,
        overrides=(HOSTILE,),
        name=HOSTILE,
        nodes=1,
        ranks_per_node=1,
        profile_name=HOSTILE,
        profile=profile,
        python=sys.executable,
    )
    write_job(run, job)
    printed = run_script(run, programs)
    assert "done" in printed.splitlines()
    # The command of a rank, as the program got it, and what it found in its environment.
    rank = ["-P", "-m", "launch.rank", str(run.root), "0", "0", f"{HOSTILE}\n"]
    assert told(programs, "rank") == rank
    assert told(programs, "module") == ["load", HOSTILE]
    # What the ranks write to is there before the container.
    folders = [str(run.root), shards, held_out, saved, scratch, cache, offloaded, mounted]
    binds = [f"--bind={folder}:{folder}" for folder in folders]
    assert told(programs, "apptainer")[: len(binds) + 2] == ["exec", *binds, HOSTILE]
    assert not list(tmp_path.rglob("pwned"))


def test_a_folder_that_a_node_cannot_make_is_told_with_the_node(tmp_path: Path) -> None:
    programs = tmp_path / "programs"
    programs.mkdir()
    run = RunDirectory(tmp_path / "run")
    run.root.mkdir()
    (tmp_path / "disk").touch()
    run.config.write_text(load_config("tiny", [f"data.cache_dir={tmp_path}/disk/cache"]).to_yaml())
    container = Container(runtime="apptainer", image="i.sif")
    submitted(run, Profile(container=container, gpus="none"))
    printed = run_script(run, programs)
    assert f"attempt 1 has failed: on n1: mkdir: cannot create directory '{tmp_path}" in (
        printed.replace("\u2018", "'")
    )
    assert not (programs / "told" / "apptainer").exists()


def test_the_container_of_pyxis_is_srun_s() -> None:
    container = Container(runtime="pyxis", image="repo#image:1", mounts=("/a", "/b:/c:ro"))
    assert options_of_srun(container, ["/run"]) == [
        "--container-image=repo#image:1",
        "--container-mounts=/run:/run,/a:/a,/b:/c:ro",
    ]
    profile = Profile(container=container, gpus="gres")
    assert in_container(profile, ["/run"], ["rank"]) == ["rank"]


@pytest.mark.usefixtures("on_n1_and_n2")
def test_the_container_of_the_doctor_shows_the_scratch_that_it_measures(tmp_path: Path) -> None:
    container = Container(runtime="pyxis", image="repo#image:1")
    profile = Profile(container=container, gpus="none", scratch="/local/{job}")
    request = Request(addresses={"n1": "10.0.0.1", "n2": "10.0.0.2"}, profile=profile)
    Folder(tmp_path).request.write_text(request.model_dump_json())
    doctor.begin(Folder(tmp_path), tmp_path, Nodes([]))
    words = {name: (tmp_path / name).read_text().split("\0") for name in ("options", "prepare")}
    assert f"--container-mounts={tmp_path}:{tmp_path},/local/7:/local/7" in words["options"]
    assert "/local/7" in words["prepare"]


def test_apptainer_shows_the_ranks_their_gpus() -> None:
    profile = Profile(gpus="gres", container=Container(runtime="apptainer", image="i.sif"))
    command = in_container(profile, ["/run"], ["rank"])
    assert command == ["apptainer", "exec", "--nv", "--bind=/run:/run", "i.sif", "rank"]
    assert options_of_srun(profile.container, ["/run"]) == []


@pytest.mark.parametrize(
    ("code", "srun", "note"),
    [(0, 0, ""), (2, 252, "2"), (65, 251, "65"), (75, 0, "75"), (70, 70, "70"), (137, 137, "137")],
)
def test_srun_s_highest_code_forbids_another_start(
    tmp_path: Path, code: int, srun: int, note: str
) -> None:
    program = tmp_path / "python"
    program.write_text(f"#!/bin/bash\necho said; exit {code}\n")
    program.chmod(0o755)
    done = _run_rank(tmp_path, [str(program), "run", str(tmp_path)])
    assert done == srun
    assert (tmp_path / "rank-3.log").read_text() == "said\n"
    exit_file = tmp_path / "rank-3.exit"
    assert (exit_file.read_text().strip() if exit_file.exists() else "") == note


def _run_rank(folder: Path, arguments: Sequence[str]) -> int:
    script = (ROOT / "slurm" / "rank.sh").read_text()
    variables = os.environ | {"SLURM_PROCID": "3", "SLURM_LOCALID": "1"}
    command = ["bash", "-c", script, "rank", *arguments]
    return subprocess.run(
        command, cwd=folder, env=variables, timeout=TIMEOUT_S, check=False
    ).returncode


def _escaped(text: str) -> str:
    """Within double quotes of YAML."""
    return text.replace("\\", "\\\\").replace('"', '\\"')
