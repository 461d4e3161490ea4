"""Interchange with Hugging Face transformers: Qwen3, Qwen3-MoE and Qwen3-Next.

Weights are named as in the checkpoints on the hub, one entry per expert, which transformers and
vLLM load; transformers itself is imported only to read a configuration.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from pretrain.checkpoint.hf_rope import rope_to_hf, yarn_from_hf
from pretrain.checkpoint.hf_weights import State, state_from_hf, state_to_hf
from pretrain.errors import UserError
from pretrain.model.config import (
    AttentionConfig,
    LayerKind,
    LinearAttentionConfig,
    ModelConfig,
    MoEConfig,
)

_ARCHITECTURES = {
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "qwen3_next": "Qwen3NextForCausalLM",
}
_LAYER_TYPES: dict[LayerKind, str] = {
    "linear": "linear_attention",
    "softmax": "full_attention",
    "sliding": "sliding_attention",
}

# What the families allow and `Transformer` does not have: field -> the only value it can express.
_FIXED_FIELDS = {
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}


def export(
    config: ModelConfig,
    state: State,
    tokenizer: Path,
    out: Path,
    *,
    eos_id: int,
    max_positions: int,
    selection_bias: Tensor | None = None,
) -> None:
    """Write a folder that `AutoModelForCausalLM` and `AutoTokenizer` load.

    Args:
        config: the model's settings.
        state: its whole state dict, in the dtype to store.
        tokenizer: a `tokenizer.json`.
        out: the folder, made if need be.
        eos_id: the token that ends a document.
        max_positions: the longest context the model was trained on; config.json has the length that
            YaRN reaches instead, where there is YaRN.
        selection_bias: of its routers, where model.moe.balance is "bias".

    Raises:
        UserError: no family of transformers has this model, or the tokenizer is not the model's.
        OSError: no room, say, or a file system that fails.
    """
    from huggingface_hub import save_torch_state_dict
    from safetensors import SafetensorError

    if config.moe.balance == "bias":
        _refuse_selection_bias(selection_bias)
    hf_config = config_to_hf(config)
    eos_token = _eos_token(tokenizer, config.vocab_size, eos_id)
    dtype = str(state["embedding.weight"].dtype).removeprefix("torch.")
    out.mkdir(parents=True, exist_ok=True)
    try:
        save_torch_state_dict(state_to_hf(config, state), out, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(str(error)) from error
    for weights in out.glob("*.safetensors"):
        # safetensors writes files that only their owner can read.
        weights.chmod(0o644)
    _write_json(
        out / "config.json",
        {"dtype": dtype, "eos_token_id": eos_id, "max_position_embeddings": max_positions}
        | hf_config,
    )
    _write_json(out / "generation_config.json", {"eos_token_id": eos_id})
    shutil.copyfile(tokenizer, out / "tokenizer.json")
    _write_json(
        out / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": eos_token,
            "model_max_length": max_positions,
        },
    )


def load(directory: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The configuration and the state dict of a folder that transformers saved, in its dtype.

    Raises:
        UserError: a file is missing or damaged, or the model is not of a supported family.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    config = load_config(directory)
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise UserError(f"{directory}: no *.safetensors file; other weight formats are not read")
    weights: dict[str, Tensor] = {}
    for file in files:
        try:
            weights.update(load_file(file))
        except SafetensorError as error:
            raise UserError(f"{file}: {error}; the file is damaged, fetch it again") from error
    return config, state_from_hf(config, weights)


def load_config(directory: Path) -> ModelConfig:
    """The configuration of a folder that transformers saved.

    Raises:
        UserError: the file is missing or damaged, or the model is not of a supported family.
    """
    file = directory / "config.json"
    try:
        fields = json.loads(file.read_text())
    except FileNotFoundError:
        raise UserError(f"{file}: no such file; a Hugging Face model folder has one") from None
    except ValueError as error:
        raise UserError(f"{file}: {error}; the file is damaged, fetch it again") from None
    return config_from_hf(fields)


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The content of `config.json`, in the fields of transformers 5 and, for RoPE, of 4 too.

    Raises:
        UserError: no family has this model; names the nearest one and what it needs.
    """
    family = _family(config)
    attention, linear, moe = config.attention, config.linear, config.moe
    fields: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[family]],
        "model_type": family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": attention.n_heads,
        "num_key_value_heads": attention.n_kv_heads,
        "head_dim": attention.head_dim,
        "rms_norm_eps": config.norm_eps,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tie_embeddings,
        **rope_to_hf(attention),
    }
    if family != "qwen3":
        fields |= {
            "num_experts": moe.n_experts,
            "num_experts_per_tok": moe.top_k,
            "moe_intermediate_size": moe.d_expert,
            "norm_topk_prob": moe.renormalise_top_k,
            "router_aux_loss_coef": moe.aux_loss,
        }
    kinds = config.layer_kinds()
    if "sliding" in kinds:
        # max_window_layers is what older versions read instead of layer_types, and by which vLLM
        # refuses a mixture, instead of giving each of its layers the whole document.
        fields |= {
            "use_sliding_window": True,
            "sliding_window": attention.window,
            "max_window_layers": kinds.index("sliding"),
        }
    if family != "qwen3_moe":
        fields["layer_types"] = [_LAYER_TYPES[kind] for kind in kinds]
    if family == "qwen3_next":
        fields |= {
            "shared_expert_intermediate_size": moe.d_shared_expert,
            "linear_num_key_heads": linear.n_key_heads,
            "linear_num_value_heads": linear.n_value_heads,
            "linear_key_head_dim": linear.key_dim,
            "linear_value_head_dim": linear.value_dim,
            "linear_conv_kernel_dim": linear.conv_width,
        }
    return fields


def config_from_hf(fields: Mapping[str, Any]) -> ModelConfig:
    """The model of a `config.json`'s content, of any version of transformers.

    Raises:
        UserError: the family is not supported, or a field has a value that `Transformer` lacks.
    """
    family = fields.get("model_type")
    if family not in _ARCHITECTURES:
        raise UserError(
            f"config.json: model_type = {family!r} is not supported; "
            f"allowed: {', '.join(_ARCHITECTURES)}"
        )
    from transformers import AutoConfig

    hf = AutoConfig.for_model(**fields)
    for name, allowed in _FIXED_FIELDS.items():
        value = getattr(hf, name, allowed)
        if value != allowed:
            raise UserError(f"config.json: {name} = {value!r} is not supported, only {allowed!r}")
    is_next = family == "qwen3_next"
    window = _window(hf)
    return ModelConfig(
        vocab_size=hf.vocab_size,
        d_model=hf.hidden_size,
        n_layers=hf.num_hidden_layers,
        layer_pattern=_layer_pattern(_layer_types(hf, window)),
        d_ff=hf.intermediate_size,
        attention=AttentionConfig(
            n_heads=hf.num_attention_heads,
            n_kv_heads=hf.num_key_value_heads,
            head_dim=getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads,
            output_gate=is_next,
            rope_base=hf.rope_parameters["rope_theta"],
            rope_fraction=hf.rope_parameters.get("partial_rotary_factor", 1.0),
            yarn=yarn_from_hf(hf.rope_parameters, hf.max_position_embeddings),
            window=AttentionConfig.window if window is None else window,
        ),
        linear=_linear_from_hf(hf) if is_next else LinearAttentionConfig(),
        moe=MoEConfig(n_experts=0) if family == "qwen3" else _moe_from_hf(hf),
        tie_embeddings=hf.tie_word_embeddings,
        norm_eps=hf.rms_norm_eps,
        zero_centered_norm=is_next,
        init_std=hf.initializer_range,
    )


def _eos_token(tokenizer: Path, vocab_size: int, eos_id: int) -> str:
    from tokenizers import Tokenizer

    loaded = Tokenizer.from_file(str(tokenizer))
    if loaded.get_vocab_size() > vocab_size:
        raise UserError(
            f"{tokenizer}: {loaded.get_vocab_size()} tokens, but model.vocab_size = {vocab_size}; "
            "take the tokenizer that the model was trained with"
        )
    eos_token: str | None = loaded.id_to_token(eos_id)
    if eos_token is None:
        raise UserError(f"{tokenizer}: no token has the id {eos_id}, which ended each document")
    return eos_token


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _family(config: ModelConfig) -> str:
    """The model_type that has this model exactly."""
    families = ["qwen3_next"]
    if "linear" not in config.layer_kinds():
        families.insert(0, "qwen3_moe" if config.moe.n_experts > 0 else "qwen3")
    unmet = {family: _unmet_needs(config, family) for family in families}
    nearest = min(unmet, key=lambda family: len(unmet[family]))
    if unmet[nearest]:
        raise UserError(
            "no family of transformers has this model; "
            f"the nearest, {_ARCHITECTURES[nearest]}, needs {' and '.join(unmet[nearest])}"
        )
    return nearest


def _refuse_selection_bias(bias: Tensor | None) -> None:
    if bias is None or bias.any():
        size = "unknown" if bias is None else f"up to {bias.abs().max().item():.3g}"
        raise UserError(
            "the routers choose experts by a selection bias (model.moe.balance = bias; its size is "
            f"{size}), and no family of transformers has one: the exported model would choose "
            "others. A model trained with model.moe.balance=batch or sequence exports exactly"
        )


def _unmet_needs(config: ModelConfig, family: str) -> list[str]:
    """What would have to change for `family` to have this model."""
    attention, moe, kinds = config.attention, config.moe, set(config.layer_kinds())
    is_next, shared = family == "qwen3_next", moe.d_shared_expert > 0
    needs = [
        (
            not is_next or "sliding" not in kinds,
            "softmax instead of sliding in model.layer_pattern, as it has no windows",
        ),
        (
            family != "qwen3_moe" or len(kinds) == 1,
            "model.layer_pattern=[softmax] or [sliding], as its layers share one window",
        ),
        (attention.output_gate == is_next, f"model.attention.output_gate={str(is_next).lower()}"),
        (config.zero_centered_norm == is_next, f"model.zero_centered_norm={str(is_next).lower()}"),
        (is_next or attention.rope_fraction == 1, "model.attention.rope_fraction=1"),
        (
            config.rotates() == tuple(kind != "linear" for kind in config.layer_kinds()),
            "model.attention.positions=[rope], as all its layers of softmax attention rotate",
        ),
        (family != "qwen3_moe" or not shared, "model.moe.d_shared_expert=0"),
        (not is_next or shared or moe.n_experts == 0, "model.moe.d_shared_expert above 0"),
    ]
    return [text for met, text in needs if not met]


def _linear_from_hf(hf: Any) -> LinearAttentionConfig:
    return LinearAttentionConfig(
        n_key_heads=hf.linear_num_key_heads,
        n_value_heads=hf.linear_num_value_heads,
        key_dim=hf.linear_key_head_dim,
        value_dim=hf.linear_value_head_dim,
        conv_width=hf.linear_conv_kernel_dim,
    )


def _moe_from_hf(hf: Any) -> MoEConfig:
    return MoEConfig(
        n_experts=hf.num_experts,
        top_k=hf.num_experts_per_tok,
        d_expert=hf.moe_intermediate_size,
        d_shared_expert=getattr(hf, "shared_expert_intermediate_size", 0),
        renormalise_top_k=hf.norm_topk_prob,
        aux_loss=hf.router_aux_loss_coef,
    )


def _window(hf: Any) -> int | None:
    """How many tokens, its own included, a query of a sliding layer sees; None where none can.

    transformers hides the keys at `query - sliding_window` and before, so the two windows agree.
    """
    window: int | None = getattr(hf, "sliding_window", None)
    if window is not None and window < 1:
        raise UserError(f"config.json: sliding_window = {window}: must be more than zero")
    return window


def _layer_types(hf: Any, window: int | None) -> list[str]:
    """Of each layer, as config.json asks for and the family does.

    Raises:
        UserError: transformers would ignore one of them, or fail.
    """
    layer_types: list[str] | None = getattr(hf, "layer_types", None)
    if layer_types is None:
        n_whole = hf.num_hidden_layers if window is None else getattr(hf, "max_window_layers", 0)
        layer_types = [
            "full_attention" if i < n_whole else "sliding_attention"
            for i in range(hf.num_hidden_layers)
        ]
    if hf.model_type == "qwen3_next":
        allowed = ["linear_attention", "full_attention"]
    elif window is None:
        allowed = ["full_attention"]
    elif hf.model_type == "qwen3_moe":
        allowed = ["sliding_attention"]
    else:
        allowed = ["full_attention", "sliding_attention"]
    if refused := sorted(set(layer_types) - set(allowed)):
        raise UserError(
            f"config.json: {', '.join(refused)} by layer_types or max_window_layers is not "
            f"supported; {_ARCHITECTURES[hf.model_type]} with sliding_window = {window} has only "
            f"{', '.join(allowed)}"
        )
    return layer_types


def _layer_pattern(layer_types: list[str]) -> tuple[LayerKind, ...]:
    """The shortest pattern that gives these layers when repeated."""
    kinds = {theirs: ours for ours, theirs in _LAYER_TYPES.items()}
    layers = tuple(kinds[layer_type] for layer_type in layer_types)
    return next(
        layers[:period]
        for period in range(1, len(layers) + 1)
        if all(kind == layers[i % period] for i, kind in enumerate(layers))
    )
