"""The ranks, as DeepSpeed knows them."""

import os

import deepspeed
import torch
from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder


def join_deepspeed(device: torch.device) -> None:
    """Give DeepSpeed the process group that this rank has joined, and its device."""
    if device.type == "cpu":
        # Collectives are gloo's: its own in shared memory would have to be compiled first.
        deepspeed.ops.__compatible_ops__[ShareMemCommBuilder.NAME] = False
    else:
        # It takes this for the number of its GPU: 0 where Slurm shows each rank its own alone.
        os.environ["LOCAL_RANK"] = str(device.index)
    deepspeed.init_distributed()
