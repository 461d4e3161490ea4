"""All-reduce over all ranks of the job: is the sum right, and how fast is it?

`python -m launch.slurm.doctor.bandwidth FOLDER`, a process for each rank; the first one writes what
was measured to FOLDER/bandwidth.json.
"""

import os
import statistics
import sys
import time
from datetime import timedelta

from launch.slurm.doctor.findings import Check, Finding
from launch.slurm.doctor.node import enter
from pretrain.run_dir import write_atomically
from pretrain.settings import Section

# gloo sends over sockets what NCCL sends over NVLink.
ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 27}
TIMES = 5
TIMEOUT = timedelta(minutes=5)


class Bandwidth(Section):
    """
    Attributes:
        seconds: the median time of an all-reduce.
        bytes_reduced: of each rank.
        is_right: whether all ranks got the sum.
    """

    backend: str
    ranks: int
    bytes_reduced: int
    seconds: float
    is_right: bool

    def gb_per_s(self) -> float:
        """The bus bandwidth in GB/s: of the algorithm's 2 (n-1)/n bytes per byte, as nccl-tests
        counts it (doc/PERFORMANCE.md), comparable over numbers of ranks.
        """
        sent = 2 * (self.ranks - 1) / self.ranks * self.bytes_reduced
        return sent / self.seconds / 1e9


def measure() -> Bandwidth:
    """Collective."""
    import torch
    import torch.distributed as dist

    from parallel.mesh import join_ranks

    device = join_ranks(TIMEOUT)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    values = torch.empty(ELEMENTS[device.type], device=device)
    seconds, is_right = [], True
    for _ in range(1 + TIMES):
        values.fill_(1 + rank % 2)
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(values)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
        is_right &= bool((values == ranks + ranks // 2).all())
    agreed = torch.tensor(is_right, dtype=torch.int, device=device)
    dist.all_reduce(agreed, dist.ReduceOp.MIN)
    dist.destroy_process_group()
    return Bandwidth(
        backend="nccl" if device.type == "cuda" else "gloo",
        ranks=ranks,
        bytes_reduced=values.nbytes,
        # The first one connects.
        seconds=statistics.median(seconds[1:]),
        is_right=bool(agreed.item()),
    )


def check(measured: Bandwidth | None, error: str, floor: float | None) -> Check:
    """
    Args:
        measured: None if the job did not get so far.
        error: the last thing that its ranks have said.
        floor: in GB/s, of the profile.
    """
    name = "all-reduce"
    if measured is None:
        finding = Finding(
            "all ranks",
            f"the all-reduce over all ranks has failed: {error or 'its ranks said nothing'}",
            "mend what the checks above have found first; with NCCL_DEBUG=INFO in the profile's "
            "environment NCCL says which network it takes",
        )
        return Check(name, "failed", (finding,))
    findings = []
    if not measured.is_right:
        what = f"the sum over {measured.ranks} ranks by {measured.backend} is wrong"
        fix = "run it on fewer nodes to find the one to blame: its GPU, memory or adapter is broken"
        findings.append(Finding("all ranks", what, fix))
    if floor is not None and measured.ranks > 1 and measured.gb_per_s() < floor:
        findings.append(
            Finding(
                "all ranks",
                f"{measured.gb_per_s():.3g} GB/s, less than the {floor:g} GB/s of the profile",
                "see by NCCL_DEBUG=INFO whether NCCL takes the fast network (NET/IB or NET/OFI, "
                "not NET/Socket); run it on fewer nodes to find one that is slow",
            )
        )
    how = f"{measured.backend}, {measured.ranks} ranks, {measured.bytes_reduced / 1e6:.0f} MB"
    saw = f"{measured.gb_per_s():.3g} GB/s bus bandwidth ({how})"
    return Check(name, saw, tuple(findings))


def main() -> None:
    folder = enter(sys.argv[1])
    measured = measure()
    if os.environ["RANK"] == "0":
        write_atomically(folder.bandwidth, measured.model_dump_json() + "\n")


if __name__ == "__main__":
    main()
