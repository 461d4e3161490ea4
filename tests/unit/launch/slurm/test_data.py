"""What of a data run is submitted to Slurm, in which words; tests/slurm does it on a cluster."""

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from data_pipeline.errors import DataError
from data_pipeline.parts import State
from launch.cli import app
from launch.data_run import DataRun
from launch.slurm.client import SlurmError
from launch.slurm.data import (
    SCRIPT,
    Request,
    Step,
    array_of,
    steps_left,
    submit_data_run,
    unfinished_parts,
)
from launch.slurm.data_begin import begin, folders_of
from launch.slurm.data_job import DataJob, JobFolder, Stage
from launch.slurm.data_task import STARTS_WITHOUT_PROGRESS, count_start
from launch.slurm.profile import Profile, parse_profile
from pretrain.errors import UserError
from tests.files import contents

# \udcff: a byte of a file's name that is no UTF-8.
HOSTILE = 'it\'s "a" $(touch hurt) `b`; %j %a\n& ü\udcff'
RUN = DataRun(
    inputs=("crawl",),
    recipe="demo",
    mode=None,
    languages=None,
    classifier=None,
    tokenizer=None,
    vocab_size=600,
    id_header="WARC-Record-ID",
    crawl_url="https://data.commoncrawl.org",
    memory=None,
)
REQUEST = Request(
    tasks=3, workers=8, profile="site.yaml", time=None, is_dry=False, is_by_hand=False
)
PROFILE = """
partition: main
account: a'c $(touch hurt)
qos: "q\\"o s"
constraint: "c&d"
reservation: "r;e"
time: "90"
options: ["--mem-per-cpu=4G", "--wckey=$(touch hurt) \\"w\\""]
shared_paths: [/]
"""
SBATCH = """
printf '%s\\0' "$FARSPAN_PYTHON" "$@" >CALLS/sbatch-$(printf %03d $(ls CALLS | wc -l))
number=$((40 + $(ls CALLS | wc -l)))
if [[ $number == "$(cat REFUSED)" ]]; then echo "sbatch: error: Invalid account" >&2; exit 1; fi
echo $number
"""
SCONTROL = """
case "$2" in
  partition) echo "PartitionName=main Default=YES"; echo "   State=UP MaxTime=UNLIMITED" ;;
  node) echo "NodeName=node1 CPUTot=64"; echo "   State=IDLE"; echo "   Partitions=main " ;;
  config) echo "MaxArraySize            = 1001" ;;
  job) cat "JOBS/$3" 2>/dev/null || { echo "Invalid job id specified" >&2; exit 1; } ;;
esac
"""


class Commands:
    """Commands that stand in for Slurm's."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls, self.jobs, self.refused = (
            folder / name for name in ("calls", "jobs", "refused")
        )
        self.calls.mkdir()
        self.jobs.mkdir()
        self.refused.write_text("none")
        scancel = 'echo "$@" >CALLS/scancel-$1'
        squeue = 'printf "%s\\n" JOBS/* | grep -o "[0-9]*$" || true'
        scripts = {"sbatch": SBATCH, "scontrol": SCONTROL, "scancel": scancel, "squeue": squeue}
        (folder / "bin").mkdir()
        for name, text in scripts.items():
            for word in ("calls", "jobs", "refused"):
                text = text.replace(word.upper(), str(folder / word))
            path = folder / "bin" / name
            path.write_text(f"#!/bin/bash\n{text}\n")
            path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder / 'bin'}:/usr/bin:/bin")

    def submitted(self) -> list[list[str]]:
        """The words of each call of sbatch; the first one is FARSPAN_PYTHON."""
        texts = [path.read_bytes() for path in sorted(self.calls.glob("sbatch-*"))]
        return [
            [word.decode(errors="surrogateescape") for word in text.split(b"\0")[:-1]]
            for text in texts
        ]

    def cancelled(self) -> list[str]:
        return sorted(path.read_text().strip() for path in self.calls.glob("scancel-*"))

    def add(self, number: str, name: str, state: str, reason: str) -> None:
        (self.jobs / number).write_text(
            f"JobId={number} JobName={name}\n   JobState={state} Reason={reason} "
            "Dependency=(null)\n   Restarts=0 ExitCode=9:0\n"
        )


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Commands:
    (tmp_path / "site.yaml").write_text(PROFILE)
    (tmp_path / "crawl").mkdir()
    for number in range(6):
        (tmp_path / "crawl" / f"{number}.warc").touch()
    (tmp_path / "slurm").mkdir()
    monkeypatch.chdir(tmp_path)
    return Commands(tmp_path / "slurm", monkeypatch)


def _submit(out: Path, request: Request = REQUEST, run: DataRun = RUN) -> str:
    console = Console(width=10_000)
    with console.capture() as capture:
        submit_data_run(run, out, request, console)
    return capture.get()


def _state(cleaned: str, written: str | None, is_finished: bool = False) -> State:
    def are(text: str) -> tuple[bool, ...]:
        return tuple(letter == "x" for letter in text)

    return State(are(cleaned), None if written is None else are(written), is_finished)


@pytest.mark.parametrize(
    ("state", "steps"),
    [
        (_state(".......", None), ["clean 1-3", "dedup", "shards 1-3", "finish"]),
        (_state("x.xx.x.", None), ["clean 1-2", "dedup", "shards 1-3", "finish"]),
        (_state("xxxxx.x", None), ["clean 3", "dedup", "shards 1-3", "finish"]),
        (_state("xxxxxxx", None), ["dedup", "shards 1-3", "finish"]),
        (_state("xxxxxxx", ".."), ["shards 1-2", "finish"]),
        (_state("xxxxxxx", "x.xxxx.x"), ["shards 1-2", "finish"]),
        (_state("xxxxxxx", "xx"), ["finish"]),
        (_state("xxxxxxx", ""), ["finish"]),
        # Its cleaned form was damaged: shards that are written tell nothing.
        (_state("xxxxxx.", "xx"), ["clean 1", "dedup", "shards 1-3", "finish"]),
        (_state("xxxxxxx", "", True), []),
    ],
)
def test_what_is_finished_is_not_submitted_again(state: State, steps: list[str]) -> None:
    assert [_words(step) for step in steps_left(state, 3)] == steps


def _words(step: Step) -> str:
    return step.stage if step.parts is None else f"{step.stage} {array_of(step.parts)}"


def test_arrays_name_the_parts_that_are_left() -> None:
    assert array_of([9, 1, 2, 3, 7, 10]) == "1-3,7,9-10"
    done = [number % 5 != 3 for number in range(20)]
    assert unfinished_parts(done, 5) == (4,)
    assert unfinished_parts(done, 20) == (4, 9, 14, 19)
    assert unfinished_parts([], 2) == ()


def test_jobs_get_their_words_unchanged_whatever_is_in_them(commands: Commands) -> None:
    out = Path(f"data {HOSTILE}")
    printed = _submit(out)
    assert re.findall(r"submitted job (\d+): (\w+)", printed) == [
        ("41", "clean"),
        ("42", "dedup"),
        ("43", "shards"),
        ("44", "finish"),
    ]
    folder = str(out.resolve())
    job = JobFolder(out.resolve()).required()
    assert [one.parts for one in job.submissions] == [(1, 2, 3), None, (1, 2, 3), None]
    for words, stage, waits in zip(
        commands.submitted(), Stage, (None, "41", "42", "43"), strict=True
    ):
        assert words[0] == job.python
        assert words[-3:] == [str(SCRIPT), folder, stage]
        name = next(word for word in words if word.startswith("--job-name="))
        assert re.fullmatch(rf"--job-name={stage}-data-it-s-[\w.+-]+-[0-9a-f]{{8}}", name)
        log = f"{stage}-%a" if stage.is_parted else stage.value
        expected = [
            f"--output={folder.replace('%', '%%')}/slurm/{log}.log",
            "--partition=main",
            "--account=a'c $(touch hurt)",
            '--qos=q"o s',
            "--constraint=c&d",
            "--reservation=r;e",
            "--time=90",
            "--cpus-per-task=8",
            "--signal=TERM@300",
            "--requeue",
            "--mem-per-cpu=4G",
            '--wckey=$(touch hurt) "w"',
        ]
        expected += ["--array=1-3"] if stage.is_parted else []
        expected += [f"--dependency=afterok:{waits}", "--kill-on-invalid-dep=yes"] if waits else []
        given = [word for word in words[1:-3] if not word.startswith(("--job-name", "--comment"))]
        assert sorted(given) == sorted([*expected, "--parsable", "--export=ALL"])


def test_each_job_asks_for_the_memory_of_its_site_and_shares_no_node_where_it_must_not(
    commands: Commands,
) -> None:
    Path("site.yaml").write_text("memory: 500G\nexclusive: true\nshared_paths: [/]\n")
    _submit(Path("data"))
    submitted = commands.submitted()
    assert len(submitted) == len(Stage)
    for words in submitted:
        assert {"--mem=500G", "--exclusive"} < set(words)


def test_a_dry_run_says_what_would_be_submitted_and_submits_nothing(commands: Commands) -> None:
    printed = _submit(Path("data"), replace(REQUEST, is_dry=True))
    assert "0 of 6 archives are cleaned" in printed
    assert "ok       partition main: 1 nodes, 1 usable now; 8 CPUs a job" in printed
    clean, dedup, shards, finish = re.findall(r"(?m)^(?:clean|dedup|shards|finish)=.*$", printed)
    assert " --array=1-3 " in clean
    for line, before in ((dedup, "clean"), (shards, "dedup"), (finish, "shards")):
        assert f" --dependency=afterok:${before} --kill-on-invalid-dep=yes " in line
    assert SCRIPT.read_text() in printed
    assert [words[1:2] for words in commands.submitted()] == [["--test-only"]]
    assert not Path("data").exists()


def test_a_job_that_slurm_refuses_takes_those_before_it_along(commands: Commands) -> None:
    commands.refused.write_text("43")
    with pytest.raises(SlurmError, match="Invalid account"):
        _submit(Path("data"))
    assert commands.cancelled() == ["41", "42"]


def test_jobs_that_have_not_ended_are_named_and_nothing_is_submitted(commands: Commands) -> None:
    folder = JobFolder(Path("data").resolve())
    commands.add("7", folder.job_name(Stage.dedup), "PENDING", "Dependency")
    # The number of a job that was once ours.
    commands.add("8", "dedup-other-01234567", "RUNNING", "None")
    told = (
        r"data: jobs of this folder have not ended: 7 \(dedup-data-\w+: PENDING\). .*: scancel 7$"
    )
    with pytest.raises(UserError, match=told):
        _submit(Path("data"))
    assert "refused  data: jobs of this folder have not" in _submit_dry(Path("data"))
    assert not commands.submitted()
    assert not Path("data").exists()


def _submit_dry(out: Path) -> str:
    console = Console(width=10_000)
    with console.capture() as capture, pytest.raises(UserError):
        submit_data_run(RUN, out, replace(REQUEST, is_dry=True), console)
    return capture.get()


def test_what_has_failed_the_last_time_is_told(commands: Commands) -> None:
    out = Path("data")
    _submit(out)
    name = JobFolder(out.resolve()).job_name
    job = (
        "JobId={} ArrayJobId=41 ArrayTaskId={} JobName={}\n   JobState={} Reason=None Dependency=\n"
    )
    job += "   Restarts=0 ExitCode=9:0\n"
    tasks = (("45", 1, "COMPLETED"), ("41", 3, "OUT_OF_MEMORY"))
    texts = [job.format(number, part, name(Stage.clean), state) for number, part, state in tasks]
    (commands.jobs / "41").write_text("\n".join(texts))
    commands.add("42", name(Stage.dedup), "CANCELLED", "DependencyNeverSatisfied")
    printed = _submit(out)
    assert re.findall(r"(?m)^(?:clean|dedup).*$", printed) == [
        f"clean part 3 of 3 (job 41_3): OUT_OF_MEMORY, exit code 9; see {out.resolve()}"
        "/slurm/clean-3.log",
        "dedup (job 42): cancelled, because a job before it has failed",
    ]


def test_more_parts_than_an_array_of_this_cluster_has_are_refused(commands: Commands) -> None:
    for number in range(1100):
        Path(f"crawl/more-{number}.warc").touch()
    with pytest.raises(UserError, match=r"--tasks 1100: this cluster takes arrays of 1000 at most"):
        _submit(Path("data"), replace(REQUEST, tasks=1100))
    assert "--tasks 1000" not in _submit(Path("data"), replace(REQUEST, tasks=1000))
    with pytest.raises(UserError, match="--engine slurm needs --tasks N"):
        _submit(Path("data"), replace(REQUEST, tasks=None))


def test_a_folder_of_other_options_is_refused_and_left_alone(commands: Commands) -> None:
    out = Path("data")
    out.mkdir()
    (out / "plan.json").write_text(json.dumps({"inputs": {}}))
    before = contents(out)
    with pytest.raises(DataError, match="holds a run of other inputs or options"):
        _submit(out)
    (out / "plan.json").rename(out / "manifest.json")
    with pytest.raises(DataError, match=r"holds manifest\.json but no plan\.json"):
        _submit(out)
    assert not commands.submitted()
    assert list(contents(out).values()) == list(before.values())


def test_parameters_come_back_as_they_were(tmp_path: Path) -> None:
    folder = JobFolder(tmp_path / HOSTILE)
    run = DataRun(
        (HOSTILE, "b"), HOSTILE, "fast", HOSTILE, HOSTILE, HOSTILE, 7, HOSTILE, HOSTILE, HOSTILE
    )
    # New profiles may not have the option any more.
    profile = Profile(account="$(touch hurt)", modules=("a'b",), options=("--qos=high",))
    job = DataJob(run, HOSTILE, 5, HOSTILE, profile, HOSTILE)
    job = job.submitted(Stage.clean, "12", (1, 4)).submitted(Stage.dedup, "13", None)
    folder.write(job)
    assert folder.read() == job
    folder.job.write_text("{}")
    with pytest.raises(UserError, match=r"job\.json cannot be read \('submissions'\): remove it"):
        folder.read()
    folder.job.unlink()
    with pytest.raises(UserError, match=r"job\.json is missing, which says what is to be done"):
        folder.required()


@pytest.mark.parametrize("runtime", ["none", "pyxis", "apptainer"])
def test_a_job_begins_with_the_words_of_its_site(tmp_path: Path, runtime: str) -> None:
    site = {
        "modules": ["cuda/12", "$(touch hurt)"],
        "container": {"runtime": runtime, "image": "i'm $(touch hurt)", "python": "py"},
        "environment": {"HTTPS_PROXY": {"value": "p $(touch hurt)", "why": "no way out"}},
        "gpus": "none",
    }
    out = tmp_path / f"data {HOSTILE}"
    run = replace(RUN, inputs=(str(tmp_path / "crawl" / "*.warc"), "CC-MAIN-2024-10"))
    job = DataJob(run, str(tmp_path), 3, "site", parse_profile(site, "site"), "/venv/bin/python")
    JobFolder(out).write(job)
    (tmp_path / "crawl").mkdir()
    words = tmp_path / "words"
    words.mkdir()
    begin(out, Stage.clean, words)
    modules, options, command = (_read_words(words / name) for name in WORDS)
    assert modules == ["cuda/12", "$(touch hurt)"]
    folders = [str(out), str(tmp_path), str(tmp_path / "crawl")]
    assert folders_of(job, out) == folders
    task = ["env", "HTTPS_PROXY=p $(touch hurt)"]
    task += ["python" if runtime == "none" else "py"]
    task += ["-P", "-m", "launch.slurm.data_task", str(out), "clean"]
    mounts = [f"{folder}:{folder}" for folder in folders]
    pyxis = ["--container-image=i'm $(touch hurt)", f"--container-mounts={','.join(mounts)}"]
    assert options == (pyxis if runtime == "pyxis" else [])
    apptainer = ["apptainer", "exec", *(f"--bind={mount}" for mount in mounts)]
    apptainer += ["i'm $(touch hurt)"]
    assert command == [*(apptainer if runtime == "apptainer" else []), *task]


WORDS = ("modules", "options", "command")


def _read_words(path: Path) -> Sequence[str]:
    return [word.decode(errors="surrogateescape") for word in path.read_bytes().split(b"\0")[:-1]]


def test_a_job_that_finishes_nothing_is_given_up(tmp_path: Path) -> None:
    path = tmp_path / "starts"
    for finished in (0, 0, 1, 1, 1):
        count_start(path, finished)
    with pytest.raises(UserError, match=rf"given up: {STARTS_WITHOUT_PROGRESS} starts .* --time"):
        count_start(path, 1)


def test_without_slurm_it_is_said_what_works_here(
    commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match=r"no Slurm .* `farspan data run` without --engine"):
        _submit(Path("data"))


def test_options_of_slurm_belong_to_it() -> None:
    done = CliRunner().invoke(app, ["data", "run", "crawl", "--out", "data", "--engine", "slrum"])
    assert str(done.exception) == "--engine slrum: must be native, ray, ray=ADDRESS or slurm"
    for options in (["--tasks", "3"], ["--profile", "generic"], ["--time", "90"], ["--dry-run"]):
        done = CliRunner().invoke(app, ["data", "run", "crawl", "--out", "data", *options])
        assert isinstance(done.exception, UserError)
        assert "belong to --engine slurm" in str(done.exception)
