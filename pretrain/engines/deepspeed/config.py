"""Our configuration in DeepSpeed's words."""

from typing import Any

from pretrain.config import Config
from pretrain.parallel_config import ZeroConfig


def deepspeed_config(config: Config, data_ranks: int) -> dict[str, Any]:
    """What `deepspeed.initialize` takes.

    Args:
        data_ranks: that take different rows of a global batch.
    """
    train = config.train
    theirs: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": train.microbatch,
        "gradient_accumulation_steps": train.global_batch // (data_ranks * train.microbatch),
        "gradient_clipping": config.optim.clip or 0.0,
        "zero_optimization": _zero(config.parallel.zero),
        # Optimizers other than its own: torch's AdamW is what our Trainer has.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    if train.dtype == "bfloat16":
        # Gradients are summed in fp32 whatever the weights' dtype.
        theirs |= {
            "bf16": {"enabled": True},
            "data_types": {"grad_accum_dtype": "fp32"},
            "communication_data_type": "fp32",
        }
    return theirs


def _zero(zero: ZeroConfig) -> dict[str, Any]:
    theirs: dict[str, Any] = {
        "stage": zero.stage,
        "stage3_param_persistence_threshold": zero.persistence_threshold,
    }
    if zero.offload_optimizer:
        theirs["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if zero.offload_parameters:
        theirs["offload_param"] = {"device": "cpu", "pin_memory": True}
    return theirs
