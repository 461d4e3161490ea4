"""Our model and transformers' models: equal logits and gradients, in both directions."""

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pretrain.checkpoint import hf
from pretrain.model.config import (
    AttentionConfig,
    LinearAttentionConfig,
    ModelConfig,
    MoEConfig,
    YarnConfig,
)
from pretrain.model.kernels.documents import Documents
from pretrain.model.transformer import Transformer

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers")

LENGTH = 100
ROWS = [[37, 1, 62], [100]]

PLAIN = AttentionConfig(4, 2, 16, output_gate=False, rope_base=1e4, rope_fraction=1.0)
SLIDING = dataclasses.replace(PLAIN, window=24)
GATED = AttentionConfig(4, 1, 32, output_gate=True, rope_base=1e5, rope_fraction=0.25)
DENSE = MoEConfig(n_experts=0)
# A third of the tokens lie within the original length.
YARN = YarnConfig(4.0, original_length=32, beta_fast=4.0)


def model_config(**settings: Any) -> ModelConfig:
    return ModelConfig(**{"vocab_size": 131, "d_model": 48, "n_layers": 2, "d_ff": 72} | settings)


CASES = {
    "qwen3-tied": model_config(
        layer_pattern=("softmax",),
        attention=PLAIN,
        moe=DENSE,
        zero_centered_norm=False,
        tie_embeddings=True,
    ),
    "qwen3-moe": model_config(
        layer_pattern=("softmax",),
        attention=PLAIN,
        moe=MoEConfig(8, 3, 24, d_shared_expert=0, renormalise_top_k=False),
        zero_centered_norm=False,
        norm_eps=1e-5,
    ),
    "qwen3-sliding": model_config(
        n_layers=3,
        layer_pattern=("softmax", "sliding", "sliding"),
        attention=SLIDING,
        moe=DENSE,
        zero_centered_norm=False,
    ),
    "qwen3-moe-sliding": model_config(
        layer_pattern=("sliding",),
        attention=SLIDING,
        moe=MoEConfig(4, 2, 24, d_shared_expert=0),
        zero_centered_norm=False,
    ),
    "qwen3-yarn": model_config(
        layer_pattern=("softmax",),
        attention=dataclasses.replace(PLAIN, yarn=YARN),
        moe=DENSE,
        zero_centered_norm=False,
    ),
    "qwen3-moe-yarn": model_config(
        layer_pattern=("softmax",),
        attention=dataclasses.replace(
            PLAIN, yarn=dataclasses.replace(YARN, attention_factor=1.3, whole_pairs=False)
        ),
        moe=MoEConfig(8, 3, 24, d_shared_expert=0),
        zero_centered_norm=False,
    ),
    "qwen3-next-yarn": model_config(
        n_layers=4,
        attention=dataclasses.replace(GATED, yarn=YARN),
        linear=LinearAttentionConfig(2, 4, 16, 24),
        moe=MoEConfig(8, 2, 24, d_shared_expert=40),
    ),
    "qwen3-next-moe": model_config(
        n_layers=4,
        attention=GATED,
        linear=LinearAttentionConfig(2, 4, 16, 24),
        moe=MoEConfig(8, 2, 24, d_shared_expert=40),
    ),
    "qwen3-next-dense-tied": model_config(
        layer_pattern=("linear", "softmax"),
        attention=GATED,
        linear=LinearAttentionConfig(2, 2, 24, 16, conv_width=3),
        moe=DENSE,
        tie_embeddings=True,
    ),
    "qwen3-next-softmax": model_config(
        layer_pattern=("softmax",), attention=GATED, moe=MoEConfig(4, 2, 24, d_shared_expert=24)
    ),
}


@pytest.fixture(params=CASES)
def config(request: pytest.FixtureRequest) -> ModelConfig:
    return CASES[request.param]


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Weights for which every term of the model matters, yet rounding is not blown up."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        scale = 0.5 if noise.ndim == 1 else 0.4 * noise.shape[-1] ** -0.5
        parameter.copy_(noise * scale)


def random_tokens(config: ModelConfig) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(config.vocab_size, (len(ROWS), LENGTH), generator=generator)


def objective(logits: Tensor, start: int = 0) -> Tensor:
    """A fixed random projection of logits [..., T, V], whose tokens begin at `start`."""
    weights = torch.randn(LENGTH, logits.shape[-1], generator=torch.Generator().manual_seed(2))
    return (logits * weights[start : start + logits.shape[-2]]).sum()


def their_model(directory: Path, experts: str = "eager") -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(
        directory, attn_implementation="eager", experts_implementation=experts
    )


def their_gradients(config: ModelConfig, model: nn.Module) -> dict[str, Tensor]:
    """Gradients of a transformers model under our names."""
    return hf.state_from_hf(config, dict(hub_gradients(model)))


def hub_gradients(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Gradients under the names of the hub, where experts are single."""
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        prefix, _, leaf = name.rpartition(".")
        for expert, gradient in enumerate(parameter.grad if "experts." in name else []):
            if leaf == "down_proj":
                yield f"{prefix}.{expert}.down_proj.weight", gradient
            else:
                gate, up = gradient.chunk(2)
                yield f"{prefix}.{expert}.gate_proj.weight", gate
                yield f"{prefix}.{expert}.up_proj.weight", up
        if "experts." not in name:
            yield name, parameter.grad


def our_gradients(model: Transformer) -> dict[str, Tensor]:
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {name: gradient for name, gradient in gradients.items() if gradient is not None}


def assert_close(ours: Tensor, theirs: Tensor, tolerance: float, name: str) -> None:
    error = (ours - theirs).norm() / theirs.norm()
    assert theirs.norm() > 0, name
    assert error <= tolerance, f"{name}: relative error {error:.1e}"


def assert_same_gradients(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert_close(ours[name], gradient, 1e-4, name)


def test_exported_model_is_the_same_in_transformers(
    config: ModelConfig, tokenizer: Path, tmp_path: Path
) -> None:
    ours = Transformer(config)
    randomise(ours)
    hf.export(config, ours.state_dict(), tokenizer, tmp_path, eos_id=0, max_positions=LENGTH)
    theirs = their_model(tmp_path, "grouped_mm" if config.moe.n_experts > 0 else "eager")
    tokens = random_tokens(config)

    our_logits, their_logits = ours(tokens).value, theirs(tokens).logits
    objective(our_logits).backward()
    objective(their_logits).backward()

    assert_close(our_logits, their_logits, 1e-5, "logits")
    assert_same_gradients(our_gradients(ours), their_gradients(config, theirs))


def test_model_of_transformers_is_the_same_here(config: ModelConfig, tmp_path: Path) -> None:
    fields = hf.config_to_hf(config)
    theirs = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**fields), attn_implementation="eager"
    )
    randomise(theirs)
    theirs.save_pretrained(tmp_path)
    loaded_config, state = hf.load(tmp_path)
    ours = Transformer(loaded_config)
    ours.load_state_dict(state)
    tokens = random_tokens(config)

    with torch.no_grad():
        assert_close(ours(tokens).value, theirs(tokens).logits, 1e-5, "logits")


def test_packed_documents_are_independent(
    config: ModelConfig, tokenizer: Path, tmp_path: Path
) -> None:
    ours = Transformer(config)
    randomise(ours)
    hf.export(config, ours.state_dict(), tokenizer, tmp_path, eos_id=0, max_positions=LENGTH)
    theirs = their_model(tmp_path)
    tokens = random_tokens(config)

    our_logits = ours(tokens, Documents.from_lengths(ROWS)).value
    objective(our_logits).backward()
    for row, lengths in enumerate(ROWS):
        start = 0
        for length in lengths:
            document = slice(start, start + length)
            their_logits = theirs(tokens[row : row + 1, document]).logits[0]
            objective(their_logits, start).backward()
            assert_close(our_logits[row, document], their_logits, 1e-5, f"{row}, {document}")
            start += length

    assert_same_gradients(our_gradients(ours), their_gradients(config, theirs))


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Tokenizer, models

    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    vocabulary = {"<|endoftext|>": 0, "a": 1, "b": 2}
    Tokenizer(models.WordLevel(vocabulary, unk_token="<|endoftext|>")).save(str(path))
    return path
