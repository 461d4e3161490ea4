"""A small model on one rank, its optimizer, and where they are saved."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from pretrain.balancing import RouterState
from pretrain.checkpoint.contents import of_optimizer, of_routers, of_weights
from pretrain.checkpoint.store import CheckpointStore, Progress, Retention
from pretrain.checkpoint.target import Target
from pretrain.config import OptimConfig
from pretrain.model.config import MoEConfig
from pretrain.optim import build_optimizer, moments

NEWEST_TWO = Retention(2)
USUAL = OptimConfig()


class Saved:
    """What a checkpoint holds, and a store for it."""

    def __init__(
        self,
        target: Target,
        retention: Retention = NEWEST_TWO,
        attempt: int = 1,
        optim: OptimConfig = USUAL,
    ) -> None:
        torch.manual_seed(0)
        self.weights = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Linear(8, 4, bias=False))
        self.optimizer = build_optimizer(self.weights, optim)
        self.routers = RouterState(2, MoEConfig(4, 1, 8, 8)).state_dict()
        self.target = target
        self.current_attempt = attempt
        self.store = CheckpointStore(target, retention, attempt, self._check)
        target.make()

    def _check(self) -> None:
        if self.current_attempt != self.store._attempt:
            raise RuntimeError("another attempt has begun")

    def train(self) -> None:
        self.weights(torch.randn(3, 6)).square().sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.routers["frequencies"].add_(0.5)

    def begin(self, step: int, loss: float | None = None) -> None:
        progress = Progress(step, 10 * step, {"cursor": step}, loss)
        self.store.start_save(progress, self.tensors())

    def save(self, step: int, loss: float | None = None) -> bool:
        self.begin(step, loss)
        is_saved = self.store.finish_save()
        self.store.wait_for_removals()
        return is_saved

    def load(self, up_to: int | None = None) -> Progress | None:
        progress = self.store.load(lambda index: self.tensors(), up_to=up_to)
        if progress:
            self.store.go_on_from(progress.step)
        return progress

    def tensors(self) -> dict[str, torch.Tensor]:
        return {
            **of_weights(self.weights),
            **of_optimizer(self.weights, self.optimizer),
            **of_routers(self.routers),
        }

    def values(self) -> list[torch.Tensor]:
        weights = list(self.weights.parameters())
        states = [x for weight in weights for x in moments(self.optimizer, weight).values()]
        everything = [*weights, *states, *self.routers.values()]
        return [tensor.detach().clone() for tensor in everything]


@pytest.fixture(scope="module", autouse=True)
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def saved(tmp_path: Path) -> Saved:
    return Saved(Target(str(tmp_path / "checkpoints")))
