"""A model on its ranks, and one optimizer step of it."""

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from data_pipeline.stream import Batch
from parallel.apply import Parallelised, apply
from parallel.fsdp import owned_region
from parallel.gradients import clip_gradients
from parallel.mesh import Mesh
from pretrain.checkpoint.store import CheckpointStore, Progress
from pretrain.config import Config
from pretrain.data import open_stream
from pretrain.errors import TrainingError
from pretrain.layouts import resolve_layout
from pretrain.loss import (
    IGNORED,
    balance_loss,
    chunked_cross_entropy,
    expert_frequencies,
    uniform_frequencies,
)
from pretrain.model.init import initialize
from pretrain.model.kernels.documents import Documents
from pretrain.model.transformer import Transformer
from pretrain.optim import build_optimizer, set_learning_rate
from pretrain.run_dir import RunDirectory
from pretrain.schedule import learning_rate


@dataclass
class StepResult:
    """What a step measured, equal on all ranks."""

    loss: float
    aux_loss: float
    grad_norm: float
    expert_counts: Tensor
    stop_requested: bool
    data_wait_s: float


class Trainer:
    """A model on its ranks, its optimizer, its data, and how far they have come.

    It stands at the newest whole checkpoint of `run`, or at the start. Collective.
    """

    def __init__(self, config: Config, run: RunDirectory, device: torch.device) -> None:
        self.config = config
        self.device = device
        layout = resolve_layout(config, dist.get_world_size())
        self.mesh = Mesh.build(device, **asdict(layout))
        self.tokens_per_step = config.train.global_batch * config.data.seq_len
        self.stream = open_stream(config)
        self.parallelised = self._build_model()
        self.model = self.parallelised.model
        self.optimizer = build_optimizer(self.model, config.optim)
        moe_layers = sum(hasattr(module, "dispatch") for module in self.model.modules())
        self.frequencies = uniform_frequencies(moe_layers, config.model.moe.n_experts)
        self.store = CheckpointStore(run.checkpoints, config.checkpoint.keep)
        loaded = self.store.load(self.model, self.optimizer, self.frequencies)
        self.progress = loaded or Progress(0, 0, self.stream.state_dict())
        self.stream.load_state_dict(self.progress.stream)
        self.frequencies = self.frequencies.to(self.device)

    def _build_model(self) -> Parallelised:
        with torch.device("meta"):
            model = Transformer(self.config.model)
        dtype = getattr(torch, self.config.train.dtype)
        parallelised = apply(model, self.mesh, dtype)
        model.to_empty(device=self.device)
        initialize(model, self.config.model, self.config.train.seed, owned_region)
        return parallelised

    def step(self, stop_requested: bool) -> StepResult:
        """One optimizer step over the next global batch."""
        began = time.perf_counter()
        microbatches = self.read_batch()
        data_wait_s = time.perf_counter() - began

        loss, aux_loss, counts, stop = self.backward(microbatches, stop_requested)
        grad_norm = self.finish_step(counts)
        return StepResult(loss, aux_loss, grad_norm, counts, stop, data_wait_s)

    def backward(
        self, microbatches: Sequence[Batch], stop_requested: bool = False
    ) -> tuple[float, float, Tensor, bool]:
        """Leave the gradient of a global batch in the weights' `.grad`.

        Args:
            microbatches: this rank's part of the batch.
            stop_requested: whether this rank was asked to stop.

        Returns:
            Cross-entropy, balance loss and expert counts [layers, E] of the global batch, and
            whether any rank was asked to stop; equal on all ranks.
        """
        loss_tokens = torch.tensor(sum(int((b.labels != IGNORED).sum()) for b in microbatches))
        dist.all_reduce(loss_tokens)
        count = max(1, int(loss_tokens))
        total = torch.zeros(3 + self.frequencies.numel(), dtype=torch.float64)
        for batch in microbatches:
            self.parallelised.accumulate_gradients(is_last=batch is microbatches[-1])
            total += self._forward_backward(batch, count).cpu()
        total[2] = stop_requested
        dist.all_reduce(total)
        cross_entropy, aux_loss, stop = total[:3].tolist()
        counts = total[3:].view(self.frequencies.shape)
        return cross_entropy / count, aux_loss, counts, stop > 0

    def finish_step(self, expert_counts: Tensor) -> float:
        """Clip, step the optimizer and count the step; returns the norm before clipping."""
        grad_norm = clip_gradients(self.model.parameters(), self.config.optim.clip).item()
        if not math.isfinite(grad_norm):
            raise TrainingError(
                f"the gradient norm of step {self.progress.step + 1} is {grad_norm}; its weights "
                "were not updated, and the checkpoints are from before"
            )
        set_learning_rate(self.optimizer, self.lr())
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.frequencies = expert_frequencies(expert_counts).to(self.device)
        self.progress.step += 1
        self.progress.tokens += self.tokens_per_step
        self.progress.stream = self.stream.state_dict()
        return grad_norm

    def read_batch(self) -> list[Batch]:
        """This rank's microbatches of the next global batch."""
        train = self.config.train
        plan = self.stream.next_batch(train.global_batch)
        share = train.global_batch // self.mesh.data_ranks
        first = self.mesh.data_rank * share
        return [
            self.stream.read(plan, range(row, row + train.microbatch))
            for row in range(first, first + share, train.microbatch)
        ]

    def _forward_backward(self, batch: Batch, loss_tokens: int) -> Tensor:
        """Add to the gradients; returns [cross-entropy sum, balance loss, 0, expert counts...]."""
        tokens, labels, position = (
            torch.from_numpy(array).to(self.device, non_blocking=True)
            for array in (batch.tokens, batch.labels, batch.position)
        )
        cross_entropy = partial(
            chunked_cross_entropy, labels=labels, chunk=self.config.train.loss_chunk
        )
        out = self.model(tokens, Documents.from_position(position), cross_entropy)
        aux_loss = balance_loss(out.router_probability, self.frequencies, self.tokens_per_step)
        (out.value / loss_tokens + self.config.model.moe.aux_loss * aux_loss).backward()
        scalars = torch.stack([out.value.detach(), aux_loss.detach(), torch.zeros_like(aux_loss)])
        return torch.cat([scalars.double(), out.expert_counts.flatten().double()])

    def lr(self) -> float:
        """The learning rate of the step to come."""
        return learning_rate(
            self.progress.step, self.config.train.steps, self.config.optim.lr, self.config.schedule
        )

    def save(self) -> None:
        self.store.save(self.progress, self.model, self.optimizer, self.frequencies.cpu())
