"""The engine of a run on its ranks."""

import warnings

import torch
import torch.distributed as dist

from pretrain.config import Config
from pretrain.engines.choice import check_engine
from pretrain.engines.engine import Engine
from pretrain.engines.limits import note_of_megatron
from pretrain.layouts import Layout


def build_engine(config: Config, layout: Layout, device: torch.device) -> Engine:
    """The engine that `train.engine` names, with weights that mean nothing yet. Collective.

    Raises:
        UserError: it cannot do what is wanted, or its extra is not installed.
    """
    check_engine(config, layout)
    # Of megatron-core and DeepSpeed, at each of their collectives.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    match config.train.engine:
        case "native":
            from pretrain.engines.native import NativeEngine

            return NativeEngine(config, layout, device)
        case "megatron":
            from pretrain.engines.megatron.engine import MegatronEngine

            if (note := note_of_megatron(config, layout)) and dist.get_rank() == 0:
                print(f"note: {note}", flush=True)
            return MegatronEngine(config, layout, device)
        case "deepspeed":
            from pretrain.engines.deepspeed.engine import DeepSpeedEngine

            return DeepSpeedEngine(config, layout, device)
