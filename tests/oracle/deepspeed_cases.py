"""Three steps of our Transformer under ZeRO; run on N ranks by test_deepspeed.py.

DeepSpeed shards the optimizer's state (stage 1), the gradients too (2), the weights too (3), and
reduces, clips and steps. A case is named by its stage: zero1, zero2, zero3.
"""

from typing import Any

import deepspeed
import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad
from torch import Tensor, nn

from pretrain.config import Config
from pretrain.data import open_stream
from pretrain.model.init import initialize
from pretrain.model.kernels.cross_entropy import IGNORED
from pretrain.model.kernels.documents import Documents
from pretrain.model.transformer import Transformer
from pretrain.optim import build_optimizer
from tests.oracle.cases import STEPS, Microbatch, read_microbatches, run_cases


class Loss(nn.Module):
    """The summed cross-entropy of a microbatch."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.model = Transformer(config.model)
        initialize(self.model, config.model, config.train.seed)

    def forward(self, batch: Microbatch) -> Tensor:
        logits = self.model(batch.tokens, Documents.from_position(batch.position)).value
        return F.cross_entropy(
            logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORED, reduction="sum"
        )


def build_engine(config: Config, stage: int) -> Any:
    train, loss = config.train, Loss(config)
    engine, *_ = deepspeed.initialize(
        model=loss,
        optimizer=build_optimizer(loss, config.optim),
        config={
            "train_batch_size": train.global_batch,
            "train_micro_batch_size_per_gpu": train.microbatch,
            "gradient_clipping": config.optim.clip,
            "zero_allow_untested_optimizer": True,
            # By default the small weights of a small model would stay whole on every rank.
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        },
    )
    return engine


def backward(engine: Any, batches: list[Microbatch]) -> float:
    """Leave the gradient of a global batch in the engine; returns its loss."""
    tokens = torch.stack([(batch.labels != IGNORED).sum() for batch in batches]).sum()
    dist.all_reduce(tokens)
    total = torch.zeros(())
    for batch in batches:
        engine.set_gradient_accumulation_boundary(batch is batches[-1])
        loss = engine(batch)
        total += loss.detach()
        # The engine takes the mean over ranks and microbatches of what is a sum over tokens.
        engine.backward(loss / tokens * dist.get_world_size() * len(batches))
    dist.all_reduce(total)
    return total.item() / tokens.item()


def run_case(name: str, config: Config, _: torch.device) -> dict[str, Any]:
    engine, stream = build_engine(config, int(name.removeprefix("zero"))), open_stream(config)
    parameters = dict(engine.module.model.named_parameters())
    losses, gradients = [], {}
    for step in range(STEPS):
        batches = read_microbatches(stream, config.train, dist.get_rank(), dist.get_world_size())
        losses.append(backward(engine, batches))
        if step == 0:
            gradients = {name: safe_get_full_grad(p).clone() for name, p in parameters.items()}
        engine.step()
    weights = {name: safe_get_full_fp32_param(p).clone() for name, p in parameters.items()}
    return {"losses": losses, "gradients": gradients, "weights": weights}


if __name__ == "__main__":
    # Collectives are gloo's: its own in shared memory would have to be compiled first.
    deepspeed.ops.__compatible_ops__[ShareMemCommBuilder.NAME] = False
    run_cases(run_case)
