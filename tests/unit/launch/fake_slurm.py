"""Commands of Slurm that answer from files, for what needs no cluster to be seen."""

from pathlib import Path

# JOBS holds a file for each job with what scontrol prints of it; CALLS what has been asked for.
SCONTROL = """
case "$1 $2" in
  "show job")
    if [[ -e JOBS/$3 ]]; then exec cat "JOBS/$3"; fi
    echo "slurm_load_jobs error: Invalid job id specified" >&2
    exit 1
    ;;
  "show hostnames") echo node1; echo node2 ;;
  "update JobId="*) sed -i "s/ExcNodeList=.*/$3/" "JOBS/${2#*=}" ;;
  *) exit 1 ;;
esac
"""
# A job that gets a signal it can answer saves and ends; one without is killed.
SCANCEL = """
echo "$*" >> CALLS
for job; do
  if [[ -e JOBS/$job ]]; then sed -i "s/JobState=[A-Z]*/JobState=CANCELLED/" "JOBS/$job"; fi
done
"""
SQUEUE = "cat FOLDERS 2>/dev/null || true"
JOB = """\
JobId={number} JobName=farspan
   UserId=me(1000) GroupId=me(1000) MCS_label=N/A
   JobState={state} Reason={reason} Dependency=(null)
   Requeue=1 Restarts=0 BatchFlag=1 Reboot=0 ExitCode=0:0
   RunTime=00:00:00 TimeLimit=01:00:00 TimeMin=N/A
   SubmitTime=2026-11-27T10:00:00 EligibleTime=2026-11-27T10:00:00
   StartTime={start} EndTime=Unknown Deadline=N/A
   Partition=main AllocNode:Sid=login:1
   ReqNodeList=(null) ExcNodeList={excluded}
   NodeList={nodes}
   NumNodes=2 NumCPUs=2 NumTasks=2 CPUs/Task=1 ReqB:S:C:T=0:0:*:*
"""


class FakeSlurm:
    """A folder of commands that stand in for Slurm's."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "bin"
        self._jobs, self._calls = folder / "jobs", folder / "calls"
        self._folders = folder / "folders"
        for made in (self.path, self._jobs):
            made.mkdir(parents=True)
        self._write("scontrol", SCONTROL)
        self._write("scancel", SCANCEL)
        self._write("squeue", SQUEUE)
        self._write("sbatch", "exit 1")
        self._write("sacct", "exit 1")

    def add(
        self,
        number: str,
        state: str,
        reason: str = "None",
        start: str = "Unknown",
        excluded: str = "(null)",
    ) -> None:
        """Let Slurm know a job, in that state."""
        nodes = "node[1-2]" if state == "RUNNING" else "(null)"
        fields = {"state": state, "reason": reason, "start": start, "excluded": excluded}
        (self._jobs / number).write_text(JOB.format(number=number, nodes=nodes, **fields))

    def work_in(self, *folders: Path) -> None:
        """Let this user's jobs have these working directories."""
        self._folders.write_text("".join(f"{folder}\n" for folder in folders))

    def cancelled(self) -> list[str]:
        """What scancel was asked for."""
        return self._calls.read_text().splitlines() if self._calls.exists() else []

    def _write(self, name: str, script: str) -> None:
        for word, path in (
            ("JOBS", self._jobs),
            ("CALLS", self._calls),
            ("FOLDERS", self._folders),
        ):
            script = script.replace(word, str(path))
        (self.path / name).write_text(f"#!/bin/bash\n{script}\n")
        (self.path / name).chmod(0o755)
