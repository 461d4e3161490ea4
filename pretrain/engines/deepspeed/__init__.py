"""Our models on DeepSpeed's ZeRO, and weights out of its checkpoints."""

from pretrain.engines.extra import TESTED, check_extra

check_extra("deepspeed", TESTED["deepspeed"])
