"""What is left for a process, by a tree of files as the kernel writes them."""

from pathlib import Path

import pytest

from parallel.host_memory import available_memory

GIB = 1 << 30


class Kernel:
    """What it shows of a machine with 64 GiB free."""

    def __init__(self, folder: Path, groups: str) -> None:
        self.proc, self.root = folder / "proc", folder / "cgroup"
        (self.proc / "self").mkdir(parents=True)
        (self.proc / "self" / "cgroup").write_text(groups)
        (self.proc / "meminfo").write_text(f"MemTotal: 0 kB\nMemAvailable: {64 << 20} kB\n")

    def limit(self, group: str, limit: int | str, used: int, cache: int) -> None:
        """Of cgroup v2."""
        self._write(
            group,
            {"memory.max": limit, "memory.current": used, "memory.stat": f"inactive_file {cache}"},
        )

    def limit_v1(self, group: str, limit: int, used: int, cache: int) -> None:
        stat = f"inactive_file 0\ntotal_inactive_file {cache}"
        files = {"memory.limit_in_bytes": limit, "memory.usage_in_bytes": used, "memory.stat": stat}
        self._write(group, files)

    def _write(self, group: str, files: dict[str, int | str]) -> None:
        (self.root / group).mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (self.root / group / name).write_text(f"{content}\n")

    def available(self) -> int:
        return available_memory(self.proc, self.root)


def test_a_group_without_a_limit_leaves_what_the_machine_has(tmp_path: Path) -> None:
    kernel = Kernel(tmp_path, "0::/user.slice\n")
    kernel.limit("user.slice", "max", used=70 * GIB, cache=0)
    assert kernel.available() == 64 * GIB


def test_a_job_is_bound_by_the_groups_above_its_step(tmp_path: Path) -> None:
    kernel = Kernel(tmp_path, "0::/slurm/job_7/step_0\n")
    kernel.limit("slurm/job_7", 32 * GIB, used=10 * GIB, cache=0)
    kernel.limit("slurm/job_7/step_0", "max", used=9 * GIB, cache=0)
    assert kernel.available() == 22 * GIB
    kernel.limit("slurm/job_7/step_0", 16 * GIB, used=9 * GIB, cache=0)
    assert kernel.available() == 7 * GIB


def test_files_that_were_read_are_not_in_the_way(tmp_path: Path) -> None:
    kernel = Kernel(tmp_path, "0::/\n")
    kernel.limit("", 32 * GIB, used=31 * GIB, cache=25 * GIB)
    assert kernel.available() == 26 * GIB


@pytest.mark.parametrize("shown", ["memory/docker/a", "memory"])
def test_limits_of_the_first_version_count(tmp_path: Path, shown: str) -> None:
    kernel = Kernel(tmp_path, "5:cpu,cpuacct:/b\n4:memory:/docker/a\n0::/\n")
    # A container that sees its own group as the root of all.
    kernel.limit_v1(shown, 8 * GIB, used=6 * GIB, cache=GIB)
    assert kernel.available() == 3 * GIB


@pytest.mark.parametrize(
    ("hidden", "left"), [("memory.stat", 26), ("memory.current", 64), ("memory.max", 64)]
)
def test_files_of_a_group_that_a_sandbox_does_not_show_are_done_without(
    tmp_path: Path, hidden: str, left: int
) -> None:
    kernel = Kernel(tmp_path, "0::/\n")
    kernel.limit("", 32 * GIB, used=6 * GIB, cache=GIB)
    (kernel.root / hidden).unlink()
    assert kernel.available() == left * GIB


def test_this_machine_has_some() -> None:
    assert available_memory() > 0
