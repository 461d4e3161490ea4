"""The ranks, as DeepSpeed knows them."""

import deepspeed
import torch
from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder


def join_deepspeed(device: torch.device) -> None:
    """Give DeepSpeed the process group that this rank has joined."""
    if device.type == "cpu":
        # Collectives are gloo's: its own in shared memory would have to be compiled first.
        deepspeed.ops.__compatible_ops__[ShareMemCommBuilder.NAME] = False
    deepspeed.init_distributed()
