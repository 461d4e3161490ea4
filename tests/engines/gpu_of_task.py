"""ZeRO 3 on ranks of a node that each see one GPU, in whose place is the CPU."""

import os
from datetime import timedelta
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from torch import nn

from parallel.mesh import join_ranks
from pretrain.engines.deepspeed.ranks import join_deepspeed

ZERO = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero_allow_untested_optimizer": True,
}


def set_device(_: CPU_Accelerator, device: Any) -> None:
    if not isinstance(device, torch.device) and int(device) != 0:
        raise RuntimeError(f"invalid device ordinal {device}")


def device_name(_: CPU_Accelerator, index: Any = None) -> str:
    if index is not None and int(index) != 0:
        raise RuntimeError(f"invalid device ordinal {index}")
    return "cpu"


if __name__ == "__main__":
    join_ranks(timedelta(minutes=10))
    assert int(os.environ["LOCAL_RANK"]) == dist.get_rank()
    join_deepspeed(torch.device("cpu"))
    CPU_Accelerator.set_device, CPU_Accelerator.device_name = set_device, device_name
    join_deepspeed(torch.device("cuda", 0))
    with deepspeed.zero.Init(config_dict_or_path=ZERO):
        model = nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(model.parameters())
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ZERO)
    engine.backward(engine(torch.ones(1, 4)).sum())
    engine.step()
    # gloo may abort a rank that leaves while another still works.
    dist.barrier()
    dist.destroy_process_group()
