"""What the sections of `bench.gpu` share: the machine, its clock, and tables."""

import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch

from pretrain.metrics.peaks import peak_by_name

REPEATS = 5


@dataclass(frozen=True)
class Machine:
    """Where it runs. On a CPU the sizes are small and the times mean nothing."""

    device: torch.device
    is_smoke: bool

    @property
    def name(self) -> str:
        is_cuda = self.device.type == "cuda"
        return torch.cuda.get_device_name(self.device) if is_cuda else f"CPU {platform.machine()}"

    @property
    def peak_flops(self) -> float | None:
        return peak_by_name(self.name, torch.bfloat16)

    def versions(self) -> str:
        """Of what its numbers depend on."""
        found = [f"Python {platform.python_version()}", f"torch {torch.__version__}"]
        for package in ("triton", "transformers", "flash-attn", "flash-attn-3"):
            try:
                found.append(f"{package} {version(package)}")
            except PackageNotFoundError:
                found.append(f"no {package}")
        return ", ".join(found)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, run: Callable[[], object]) -> float:
        """By the clock, once."""
        self.synchronize()
        start = time.perf_counter()
        run()
        self.synchronize()
        return time.perf_counter() - start

    def compare(self, sides: Mapping[str, Callable[[], object]]) -> dict[str, float]:
        """Median seconds of each side, which take turns after a round to warm up."""
        rounds = [{name: self.seconds(run) for name, run in sides.items()} for _ in range(REPEATS)]
        return {name: statistics.median(one[name] for one in rounds[1:]) for name in sides}

    def peak_gb(self, run: Callable[[], object]) -> float:
        """The most memory that tensors took while it ran."""
        if self.device.type != "cuda":
            run()
            return 0.0
        torch.cuda.reset_peak_memory_stats(self.device)
        self.seconds(run)
        return torch.cuda.max_memory_allocated(self.device) / 1e9

    def random(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        """A leaf of standard normal numbers."""
        return torch.randn(shape, device=self.device, dtype=dtype).requires_grad_()


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """As markdown; what is numbers, to the right."""
    print("| " + " | ".join(header) + " |")
    print("|" + "|".join("---:" if row[:1].isdigit() else "---" for row in rows[0]) + "|")
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print(flush=True)
