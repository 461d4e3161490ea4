"""Our models on DeepSpeed's ZeRO, and weights out of its checkpoints."""

from pretrain.engines.extra import check_extra

check_extra("deepspeed", {"deepspeed": "0.19.8"})
