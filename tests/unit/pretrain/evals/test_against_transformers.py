"""Perplexity and greedy generation equal those of transformers on the same weights."""

import pytest
import torch
import transformers

from pretrain.checkpoint.hf import load
from pretrain.evals.generate import generate
from pretrain.evals.perplexity import perplexity
from pretrain.model.transformer import Transformer

COMMON = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "initializer_range": 0.3,
}
FAMILIES = {
    "Qwen3": (
        transformers.Qwen3Config(**COMMON, num_hidden_layers=2),
        transformers.Qwen3ForCausalLM,
    ),
    "Qwen3-Next": (
        transformers.Qwen3NextConfig(
            **COMMON,
            num_hidden_layers=2,
            layer_types=["linear_attention", "full_attention"],
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            linear_key_head_dim=16,
            linear_value_head_dim=16,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=16,
        ),
        transformers.Qwen3NextForCausalLM,
    ),
}


@pytest.fixture(params=FAMILIES)
def models(request, tmp_path):
    config, family = FAMILIES[request.param]
    torch.manual_seed(0)
    theirs = family(config).eval()
    theirs.save_pretrained(tmp_path)
    our_config, state = load(tmp_path)
    ours = Transformer(our_config)
    ours.load_state_dict(state)
    return ours, theirs


@pytest.mark.parametrize("batch", [1, 3])
def test_perplexity(models, batch):
    ours, theirs = models
    ids = torch.randint(97, (150,), generator=torch.Generator().manual_seed(1))
    windows = [ids[start : start + 33] for start in range(0, 149, 32)]
    assert len(windows[-1]) == 22
    with torch.no_grad():
        total = sum(float(theirs(w[None], labels=w[None]).loss) * (len(w) - 1) for w in windows)
    result = perplexity(ours, ids.tolist(), 32, batch=batch)
    assert result.loss == pytest.approx(total / 149, rel=1e-6)


def test_greedy_generation(models):
    ours, theirs = models
    prompt = [5, 17, 31]
    expected = theirs.generate(
        torch.tensor([prompt]), max_new_tokens=12, do_sample=False, use_cache=False
    )
    assert generate(ours, prompt, 12) == expected[0, 3:].tolist()
