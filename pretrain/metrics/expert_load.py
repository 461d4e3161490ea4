"""How the tokens of a step were spread over the experts."""

from typing import Any

from torch import Tensor


def summarise_load(expert_counts: Tensor, dropped: Tensor) -> dict[str, Any]:
    """The moe/* metrics of a step, nothing for a dense model.

    Args:
        expert_counts: [layers, E], token-slots that chose each expert over the global batch.
        dropped: [layers], those of them over their expert's capacity.
    """
    if not expert_counts.numel():
        return {}
    load = expert_counts / expert_counts.sum(-1, keepdim=True)
    return {
        "moe/load": load.tolist(),
        "moe/max_violation": float(load.max() * load.shape[1] - 1),
        "moe/dead_experts": int((expert_counts == 0).sum()),
        "moe/dropped": float(dropped.sum() / expert_counts.sum()),
    }
