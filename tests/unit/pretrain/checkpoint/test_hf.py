import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.checkpoint import hf
from pretrain.errors import UserError
from pretrain.model.config import (
    AttentionConfig,
    LinearAttentionConfig,
    ModelConfig,
    MoEConfig,
    YarnConfig,
)
from pretrain.model.init import initialize
from pretrain.model.rope import rotary_frequencies
from pretrain.model.transformer import Transformer

os.environ["HF_HUB_OFFLINE"] = "1"

NEXT = ModelConfig(
    vocab_size=300,
    d_model=32,
    n_layers=5,
    d_ff=48,
    attention=AttentionConfig(4, 2, 16, rope_base=5e5, rope_fraction=0.5),
    linear=LinearAttentionConfig(2, 4, 8, 12, conv_width=3),
    moe=MoEConfig(4, 2, 16, 24, renormalise_top_k=False, aux_loss=0.01),
    norm_eps=1e-5,
    init_std=0.05,
)
QWEN3 = dataclasses.replace(
    NEXT,
    layer_pattern=("softmax",),
    attention=AttentionConfig(4, 2, 16, output_gate=False, rope_fraction=1.0),
    linear=LinearAttentionConfig(),
    moe=MoEConfig(n_experts=0),
    zero_centered_norm=False,
    tie_embeddings=True,
)
QWEN3_MOE = dataclasses.replace(QWEN3, moe=MoEConfig(8, 2, 16, d_shared_expert=0))
SLIDING_ATTENTION = dataclasses.replace(QWEN3.attention, window=7)
SLIDING = dataclasses.replace(
    QWEN3, layer_pattern=("sliding", "softmax"), attention=SLIDING_ATTENTION
)
SLIDING_MOE = dataclasses.replace(
    QWEN3_MOE, layer_pattern=("sliding",), attention=SLIDING_ATTENTION
)


YARN = dataclasses.replace(
    NEXT,
    attention=dataclasses.replace(
        NEXT.attention, yarn=YarnConfig(8.0, 1024, 16.0, 2.0, attention_factor=1.25)
    ),
)
# Rotated as without YaRN, and multiplied.
MULTIPLIED = dataclasses.replace(
    QWEN3,
    attention=dataclasses.replace(QWEN3.attention, yarn=YarnConfig(attention_factor=1.25)),
)


def changed(config: ModelConfig, part: str, **settings: Any) -> ModelConfig:
    section = dataclasses.replace(getattr(config, part), **settings)
    return dataclasses.replace(config, **{part: section})


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["it doesn't matter, 123 matters"] * 20, trainer)
    tokenizer.save(str(path))
    return path


@pytest.fixture
def exported(tokenizer: Path, tmp_path: Path) -> Path:
    model = Transformer(NEXT)
    initialize(model, NEXT, seed=0)
    hf.export(NEXT, model.state_dict(), tokenizer, tmp_path, eos_id=1, max_positions=4096)
    return tmp_path


@pytest.mark.parametrize("config", [NEXT, QWEN3, QWEN3_MOE, SLIDING, SLIDING_MOE, YARN, MULTIPLIED])
def test_configuration_survives_the_round_trip(config: ModelConfig) -> None:
    returned = hf.config_from_hf(hf.config_to_hf(config))
    assert returned.layer_kinds() == config.layer_kinds()
    assert dataclasses.replace(returned, layer_pattern=config.layer_pattern) == config


@pytest.mark.parametrize("attention_factor", [1.25, None])
def test_yarn_is_the_same_in_releases_that_read_it_otherwise(
    attention_factor: float | None, tokenizer: Path, tmp_path: Path
) -> None:
    yarn = dataclasses.replace(YARN.attention.yarn, attention_factor=attention_factor)
    config = changed(YARN, "attention", yarn=yarn)
    state = Transformer(config).state_dict()
    hf.export(config, state, tokenizer, tmp_path, eos_id=1, max_positions=2048)

    fields = json.loads((tmp_path / "config.json").read_text())
    for spelling in ("rope_scaling", "rope_parameters"):
        asked = fields[spelling]
        # transformers 4.51 to 4.55.
        original_length = asked["original_max_position_embeddings"]
        assert fields["max_position_embeddings"] / original_length == yarn.factor
        # vLLM before 0.30.
        mscale = (0.1 * math.log(asked["factor"]) + 1) * asked.get("attn_factor", 1)
        assert mscale == pytest.approx(yarn.scale_of_rotated(), rel=1e-15)
    # Which transformers warns of.
    assert ("attn_factor" in asked) == (attention_factor is not None)
    assert hf.load_config(tmp_path).attention.yarn.scale_of_rotated() == yarn.scale_of_rotated()


@pytest.mark.parametrize(
    ("config", "architecture"),
    [
        (NEXT, "Qwen3NextForCausalLM"),
        (changed(NEXT, "moe", n_experts=0), "Qwen3NextForCausalLM"),
        (QWEN3, "Qwen3ForCausalLM"),
        (QWEN3_MOE, "Qwen3MoeForCausalLM"),
        (SLIDING, "Qwen3ForCausalLM"),
        (SLIDING_MOE, "Qwen3MoeForCausalLM"),
    ],
)
def test_family_follows_from_the_model(config: ModelConfig, architecture: str) -> None:
    assert hf.config_to_hf(config)["architectures"] == [architecture]


@pytest.mark.parametrize(
    ("config", "advice"),
    [
        (changed(NEXT, "attention", output_gate=False), "model.attention.output_gate=true"),
        (changed(NEXT, "moe", d_shared_expert=0), "model.moe.d_shared_expert above 0"),
        (dataclasses.replace(NEXT, zero_centered_norm=False), "model.zero_centered_norm=true"),
        (changed(QWEN3, "attention", rope_fraction=0.5), "model.attention.rope_fraction=1"),
        (changed(QWEN3_MOE, "moe", d_shared_expert=8), "model.moe.d_shared_expert=0"),
        (changed(QWEN3, "attention", output_gate=True), "model.attention.output_gate=false"),
        (
            changed(NEXT, "attention", positions=("none",)),
            r"Qwen3NextForCausalLM, needs model\.attention\.positions=\[rope\], as all its layers",
        ),
        (
            changed(QWEN3, "attention", positions=("rope", "rope", "none")),
            r"Qwen3ForCausalLM, needs model\.attention\.positions=\[rope\], as all its layers",
        ),
        (
            dataclasses.replace(NEXT, layer_pattern=("linear", "sliding")),
            "Qwen3NextForCausalLM, needs softmax instead of sliding in model.layer_pattern",
        ),
        (
            dataclasses.replace(NEXT, layer_pattern=("softmax", "sliding")),
            "Qwen3NextForCausalLM, needs softmax instead of sliding in model.layer_pattern",
        ),
        (
            dataclasses.replace(QWEN3_MOE, layer_pattern=("softmax", "sliding")),
            r"Qwen3MoeForCausalLM, needs model\.layer_pattern=\[softmax\] or \[sliding\]",
        ),
    ],
)
def test_model_without_a_family_is_refused_with_what_would_work(
    config: ModelConfig, advice: str
) -> None:
    with pytest.raises(UserError, match=advice):
        hf.config_to_hf(config)


def test_fields_of_the_released_qwen3_next_are_read() -> None:
    """The spelling of transformers 4, as in Qwen/Qwen3-Next-80B-A3B-Instruct on the hub."""
    config = hf.config_from_hf(
        {
            "architectures": ["Qwen3NextForCausalLM"],
            "model_type": "qwen3_next",
            "full_attention_interval": 4,
            "num_hidden_layers": 48,
            "partial_rotary_factor": 0.25,
            "rope_theta": 10_000_000,
            "rope_scaling": None,
            "torch_dtype": "bfloat16",
        }
    )
    assert config == ModelConfig()


@pytest.mark.parametrize(
    ("fields", "yarn"),
    [
        ({"factor": 4.0}, YarnConfig(4.0, 32_768)),
        ({"factor": None}, YarnConfig(2.0, 32_768)),
        ({"factor": 4.0, "truncate": False}, YarnConfig(4.0, 32_768, whole_pairs=False)),
        (
            {"factor": 40.0, "mscale": 0.707, "mscale_all_dim": 1.0, "beta_slow": 2},
            YarnConfig(40.0, 32_768, beta_slow=2, attention_factor=0.9210423553163399),
        ),
    ],
)
def test_yarn_is_read_as_transformers_reads_it(fields: dict[str, Any], yarn: YarnConfig) -> None:
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {"rope_type": "yarn", "original_max_position_embeddings": 32_768} | fields
    # The spelling of transformers 4.
    asked = {"model_type": "qwen3", "rope_scaling": scaling, "max_position_embeddings": 65_536}
    attention = hf.config_from_hf(asked).attention
    frequencies, scale = ROPE_INIT_FUNCTIONS["yarn"](AutoConfig.for_model(**asked))

    ours = rotary_frequencies(attention.head_dim, attention.rope_base, attention.yarn)
    assert torch.equal(ours, frequencies)
    assert attention.yarn.scale_of_rotated() == scale
    assert attention.yarn == yarn


WINDOW = {"use_sliding_window": True, "sliding_window": 64}


@pytest.mark.parametrize(
    ("fields", "kinds"),
    [
        ({"model_type": "qwen3"} | WINDOW, 28 * ["softmax"] + 4 * ["sliding"]),
        (
            {"model_type": "qwen3", "max_window_layers": 1} | WINDOW,
            ["softmax"] + 31 * ["sliding"],
        ),
        ({"model_type": "qwen3", "max_window_layers": 32} | WINDOW, 32 * ["softmax"]),
        (
            {"model_type": "qwen3", "layer_types": 16 * ["sliding_attention", "full_attention"]}
            | WINDOW,
            16 * ["sliding", "softmax"],
        ),
        ({"model_type": "qwen3", "sliding_window": 64}, 32 * ["softmax"]),
        ({"model_type": "qwen3_moe"} | WINDOW, 24 * ["sliding"]),
        ({"model_type": "qwen3_moe", "max_window_layers": 24}, 24 * ["softmax"]),
    ],
)
def test_windows_are_read_as_transformers_reads_them(
    fields: dict[str, Any], kinds: list[str]
) -> None:
    config = hf.config_from_hf(fields)
    assert list(config.layer_kinds()) == kinds
    assert "sliding" not in kinds or config.attention.window == 64


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "llama"}, "model_type = 'llama'.*allowed: qwen3, qwen3_moe, qwen3_next"),
        ({"model_type": "qwen3", "attention_bias": True}, "attention_bias = True"),
        ({"model_type": "qwen3_moe", "mlp_only_layers": [0]}, r"mlp_only_layers = \[0\]"),
        (
            {"model_type": "qwen3", "use_sliding_window": True, "sliding_window": 0},
            "sliding_window = 0",
        ),
        (
            {"model_type": "qwen3", "layer_types": 32 * ["sliding_attention"]},
            "sliding_attention by .* sliding_window = None has only full_attention",
        ),
        (
            {"model_type": "qwen3", "layer_types": 32 * ["chunked_attention"]} | WINDOW,
            "chunked_attention by .* has only full_attention, sliding_attention",
        ),
        (
            {"model_type": "qwen3_moe", "max_window_layers": 12} | WINDOW,
            "full_attention by .* Qwen3MoeForCausalLM .* has only sliding_attention",
        ),
        (
            {"model_type": "qwen3_next", "layer_types": 48 * ["sliding_attention"]} | WINDOW,
            "Qwen3NextForCausalLM .* has only linear_attention, full_attention",
        ),
        (
            {
                "model_type": "qwen3",
                "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
            },
            "rope_type = 'linear'",
        ),
        (
            {
                "model_type": "qwen3",
                "rope_scaling": {
                    "rope_type": "yarn",
                    "factor": 0.5,
                    "original_max_position_embeddings": 64,
                },
            },
            "factor = 0.5",
        ),
    ],
)
def test_model_we_cannot_express_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        hf.config_from_hf(fields)


def test_export_loads_back_bitwise(exported: Path) -> None:
    model = Transformer(NEXT)
    initialize(model, NEXT, seed=0)
    config, state = hf.load(exported)

    assert config.layer_kinds() == NEXT.layer_kinds()
    assert state.keys() == model.state_dict().keys()
    for name, weight in model.state_dict().items():
        assert torch.equal(state[name], weight), name


def test_exported_folder_generates_text_with_transformers_alone(
    exported: Path, tokenizer: Path
) -> None:
    import tokenizers
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(exported)
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    text = "it doesn't MATTER: 123456  \n\n\tcafé 語"
    ids = their_tokenizer(text).input_ids

    assert ids == tokenizers.Tokenizer.from_file(str(tokenizer)).encode(text).ids
    assert their_tokenizer.decode(ids) == text
    assert their_tokenizer.eos_token_id == model.generation_config.eos_token_id == 1
    assert model.config.max_position_embeddings == their_tokenizer.model_max_length == 4096
    generated = model.generate(torch.tensor([ids]), max_new_tokens=3, do_sample=False)
    ours = Transformer(NEXT)
    ours.load_state_dict(hf.load(exported)[1])
    for position in range(len(ids), generated.shape[1]):
        logits = ours(generated[:, :position]).value
        assert logits[0, -1].argmax() == generated[0, position]


def test_sharded_folder_is_read_whole(exported: Path, tmp_path: Path) -> None:
    import transformers

    expected = hf.load(exported)[1]
    sharded = tmp_path / "sharded"
    model = transformers.AutoModelForCausalLM.from_pretrained(exported)
    model.save_pretrained(sharded, max_shard_size="20KB")

    assert len(list(sharded.glob("*.safetensors"))) > 2
    state = hf.load(sharded)[1]
    assert all(torch.equal(state[name], expected[name]) for name in expected)


def test_bfloat16_weights_are_exported_as_such(tokenizer: Path, tmp_path: Path) -> None:
    model = Transformer(QWEN3).bfloat16()
    hf.export(QWEN3, model.state_dict(), tokenizer, tmp_path, eos_id=1, max_positions=64)

    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    assert {weight.dtype for weight in hf.load(tmp_path)[1].values()} == {torch.bfloat16}


def test_tokenizer_that_is_not_the_models_is_refused(tokenizer: Path, tmp_path: Path) -> None:
    state = Transformer(QWEN3).state_dict()
    small = dataclasses.replace(QWEN3, vocab_size=100)
    with pytest.raises(UserError, match=r"model\.vocab_size = 100"):
        hf.export(small, state, tokenizer, tmp_path / "a", eos_id=1, max_positions=64)
    with pytest.raises(UserError, match="no token has the id 299999"):
        hf.export(QWEN3, state, tokenizer, tmp_path / "b", eos_id=299_999, max_positions=64)
    assert not list(tmp_path.iterdir())


def test_a_selection_bias_is_refused_unless_it_is_zero(tokenizer: Path, tmp_path: Path) -> None:
    config = changed(NEXT, "moe", balance="bias")
    state = Transformer(config).state_dict()
    bias = torch.zeros(5, 4)
    hf.export(
        config, state, tokenizer, tmp_path / "a", eos_id=1, max_positions=64, selection_bias=bias
    )
    bias[3, 2] = -0.25
    for given, size in ((bias, r"up to 0\.25"), (None, "unknown")):
        with pytest.raises(UserError, match=rf"{size}.*model\.moe\.balance=batch"):
            hf.export(
                config,
                state,
                tokenizer,
                tmp_path / "b",
                eos_id=1,
                max_positions=64,
                selection_bias=given,
            )
    assert not (tmp_path / "b").exists()


def test_damaged_or_incomplete_folders_name_the_problem(exported: Path) -> None:
    weights = exported / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    with pytest.raises(UserError, match=r"model\.safetensors.*damaged"):
        hf.load(exported)
    weights.unlink()
    with pytest.raises(UserError, match=r"no \*\.safetensors"):
        hf.load(exported)
    (exported / "config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json: no such file"):
        hf.load(exported)


def test_weights_of_another_model_are_refused() -> None:
    state = hf.state_to_hf(QWEN3, Transformer(QWEN3).state_dict())
    with pytest.raises(UserError, match=r"missing: .*model\.layers\.0\.linear_attn"):
        hf.state_from_hf(NEXT, state)
    with pytest.raises(UserError, match=r"unknown: extra\.weight"):
        hf.state_from_hf(QWEN3, state | {"extra.weight": torch.zeros(1)})
