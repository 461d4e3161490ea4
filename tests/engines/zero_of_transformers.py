"""Save a model of transformers, named first, as ZeRO 3 does on N ranks, into a folder."""

import sys
from datetime import timedelta
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from torch import nn

from parallel.mesh import join_ranks
from pretrain.engines.deepspeed.ranks import join_deepspeed
from tests.foreign import MODELS, transformers_model


def save_under_zero_3(theirs: nn.Module, directory: Path) -> None:
    """Collective."""
    join_deepspeed(torch.device("cpu"))
    engine, *_ = deepspeed.initialize(
        model=theirs,
        model_parameters=theirs.parameters(),
        optimizer=torch.optim.AdamW(theirs.parameters()),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
            "zero_allow_untested_optimizer": True,
        },
    )
    engine.save_checkpoint(str(directory))


if __name__ == "__main__":
    join_ranks(timedelta(minutes=10))
    save_under_zero_3(transformers_model(MODELS[sys.argv[1]]), Path(sys.argv[2]))
    # gloo may abort a rank that leaves while another still works.
    dist.barrier()
    dist.destroy_process_group()
