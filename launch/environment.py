"""The environment of the ranks of an attempt: one function makes it, with the reason of each part.

It is printed when an attempt starts, and kept in its folder.
"""

import json
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass

from launch.slurm.profile import Profile
from pretrain.run_dir import ATTEMPT_VARIABLE, RunDirectory, write_atomically


@dataclass(frozen=True)
class Variable:
    name: str
    value: str
    why: str


def environment_of_ranks(
    *,
    ranks: int,
    ranks_here: int,
    address: str,
    port: int,
    cpus: int | None = None,
    attempt: int | None = None,
    profile: Profile | None = None,
    scratch: str | None = None,
    inherited: Mapping[str, str] | None = None,
) -> list[Variable]:
    """What all ranks of an attempt get; RANK and LOCAL_RANK each rank has for itself.

    What is set in the environment already stays, but for what makes the ranks find each other.

    Args:
        ranks, ranks_here: of the attempt, and of those on each machine.
        address, port: where rank 0 is found.
        cpus: of each rank (None: its share of those that this process may use).
        attempt: the number of the attempt, where a launcher has made it.
        scratch: an absolute path on each machine's own disk.
        inherited: the environment they start in (None: of this process).
    """
    inherited = os.environ if inherited is None else inherited
    meet = [
        Variable("MASTER_ADDR", address, "where rank 0 is found"),
        Variable("MASTER_PORT", str(port), "where rank 0 listens; another one in each attempt"),
        Variable("WORLD_SIZE", str(ranks), "how many ranks there are"),
    ]
    if attempt is not None:
        meet.append(Variable(ATTEMPT_VARIABLE, str(attempt), "an older attempt is fenced off"))
    settings = [*_threads(ranks_here, cpus), *_network(profile), *_caches(scratch)]
    if profile:
        chosen = {name: (given.value, given.why) for name, given in profile.environment.items()}
        settings = [one for one in settings if one.name not in chosen]
        settings += [Variable(name, *given) for name, given in chosen.items()]
    return meet + [_kept(one, inherited) for one in settings]


def note_environment(run: RunDirectory, attempt: int, variables: Iterable[Variable]) -> None:
    """Keep it with the attempt."""
    rows = [asdict(variable) for variable in variables]
    text = json.dumps(rows, indent=1, ensure_ascii=False) + "\n"
    write_atomically(run.environment_of(attempt), text)


def describe(variables: Iterable[Variable]) -> str:
    """A line for each: what it is and why."""
    lines = [(f"{variable.name}={variable.value}", variable.why) for variable in variables]
    width = min(40, max(len(setting) for setting, _ in lines))
    return "\n".join(f"  {setting:<{width}}  {why}" for setting, why in lines)


def _kept(variable: Variable, inherited: Mapping[str, str]) -> Variable:
    value = inherited.get(variable.name)
    if value is None or value == variable.value:
        return variable
    return Variable(
        variable.name, value, f"set before farspan began, which would take {variable.value}"
    )


def _threads(ranks_here: int, cpus: int | None) -> list[Variable]:
    threads = cpus or max(1, cores_here() // ranks_here)
    return [
        Variable("OMP_NUM_THREADS", str(threads), "ranks share the cores of a machine"),
        Variable("OMP_WAIT_POLICY", "PASSIVE", "threads that spin slow down those that compute"),
        Variable("PYTHONUNBUFFERED", "1", "the log has what a killed rank has said last"),
    ]


def cores_here() -> int:
    """Those that this process may use: an interactive job has a share of its machine."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _network(profile: Profile | None) -> list[Variable]:
    if profile is None:
        return []
    network, variables = profile.network, []
    if network.interface:
        why = "the network interface of this site"
        variables.append(Variable("NCCL_SOCKET_IFNAME", network.interface, why))
        # gloo takes names only, where NCCL takes patterns.
        if not network.interface.startswith(("^", "=")):
            variables.append(Variable("GLOO_SOCKET_IFNAME", network.interface, why))
    if network.hcas:
        variables.append(Variable("NCCL_IB_HCA", network.hcas, "the adapters of this site"))
    if profile.gpus != "none":
        variables += [
            Variable("NCCL_DEBUG", "WARN", "NCCL says what has failed, and nothing else"),
        ]
    return variables


def _caches(scratch: str | None) -> list[Variable]:
    if scratch is None:
        return []
    why = "thousands of ranks that compile overload a shared file system"
    return [
        Variable("TORCHINDUCTOR_CACHE_DIR", f"{scratch}/inductor", why),
        Variable("TRITON_CACHE_DIR", f"{scratch}/triton", why),
    ]


def use_no_gpu() -> None:
    """Let what this process imports later work in the memory of the host, which has more room."""
    os.environ.update(CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu")
