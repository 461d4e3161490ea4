"""Small models as others save them, and what transformers makes of them."""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain.checkpoint import hf
from pretrain.model.config import AttentionConfig, LinearAttentionConfig, ModelConfig, MoEConfig

NEXT = ModelConfig(
    vocab_size=1024,
    d_model=32,
    n_layers=4,
    d_ff=48,
    attention=AttentionConfig(4, 2, 16, rope_base=5e5, rope_fraction=0.5),
    linear=LinearAttentionConfig(2, 4, 8, 16, conv_width=3),
    moe=MoEConfig(4, 2, 16, 24, renormalise_top_k=False, aux_loss=0.01),
    norm_eps=1e-5,
)
QWEN3_MOE = ModelConfig(
    vocab_size=1024,
    d_model=32,
    n_layers=2,
    layer_pattern=("softmax",),
    attention=AttentionConfig(4, 2, 16, output_gate=False, rope_base=1e4, rope_fraction=1.0),
    moe=MoEConfig(8, 2, 16, d_shared_expert=0),
    zero_centered_norm=False,
    tie_embeddings=True,
)
MODELS = {"qwen3-next": NEXT, "qwen3-moe": QWEN3_MOE}
# What every run here has besides its model.
RUN = ("data.seq_len=64", "train.global_batch=2", "train.steps=2")


def transformers_model(model: ModelConfig) -> Any:
    """The same model of transformers, with weights for which every term of it matters."""
    import transformers

    fields = transformers.AutoConfig.for_model(**hf.config_to_hf(model))
    theirs = transformers.AutoModelForCausalLM.from_config(fields, attn_implementation="eager")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in theirs.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(noise * (0.5 if noise.ndim == 1 else 0.4 * noise.shape[-1] ** -0.5))
    return theirs


@torch.no_grad()
def logits_of(theirs: Any) -> Tensor:
    """Of tokens that are the same each time."""
    vocabulary = theirs.config.vocab_size
    tokens = torch.randint(vocabulary, (2, 40), generator=torch.Generator().manual_seed(1))
    logits: Tensor = theirs(tokens).logits
    return logits


def logits_in(folder: Path) -> Tensor:
    """Of what transformers loads from a folder."""
    import transformers

    return logits_of(
        transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    )


def settings_in(refusal: str) -> list[str]:
    """The settings that a refusal of an import names, as they are given."""
    return re.findall(r"^  (model\.\S+=\S+)", refusal, re.MULTILINE)
