import dataclasses
from pathlib import Path

import pytest

from pretrain.checkpoint.formats import FORMATS, format_of, writer_of
from pretrain.checkpoint.formats.same_model import refuse_another_model
from pretrain.config import load_config
from pretrain.errors import UserError
from pretrain.model.config import ModelConfig
from tests.foreign import NEXT, QWEN3_MOE, settings_in

FILES = {
    "hf": ["config.json", "model-00001-of-00002.safetensors"],
    "megatron": ["metadata.json", "common.pt"],
    "deepspeed": ["latest", "zero_to_fp32.py"],
}


def lay(folder: Path, *formats: str) -> Path:
    for name in (name for one in formats for name in FILES[one]):
        (folder / name).touch()
    return folder


def changed(model: ModelConfig, part: str, **settings: object) -> ModelConfig:
    section = dataclasses.replace(getattr(model, part), **settings)
    return dataclasses.replace(model, **{part: section})


@pytest.mark.parametrize("name", FILES)
def test_a_format_is_known_by_its_files(name: str, tmp_path: Path) -> None:
    assert format_of(lay(tmp_path, name)) == name


def test_of_several_formats_one_has_to_be_said(tmp_path: Path) -> None:
    lay(tmp_path, "hf", "deepspeed")
    with pytest.raises(UserError, match="several formats; say which: --from hf or deepspeed"):
        format_of(tmp_path)
    assert format_of(tmp_path, "deepspeed") == "deepspeed"


def test_what_is_not_known_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(UserError) as refused:
        format_of(tmp_path)
    assert all(f"{name}: {one.known_by}" in str(refused.value) for name, one in FORMATS.items())
    with pytest.raises(UserError, match=r"not a folder on this machine; .* `hf download"):
        format_of(tmp_path / "Qwen3-0.6B")
    with pytest.raises(UserError, match="--from gguf is not a format; allowed: hf, megatron, d"):
        format_of(tmp_path, "gguf")
    with pytest.raises(UserError, match="--to deepspeed is not a format; allowed: hf, megatron"):
        writer_of("deepspeed")


@pytest.mark.parametrize("model", [NEXT, QWEN3_MOE])
def test_settings_of_a_refusal_make_the_model_fit(model: ModelConfig) -> None:
    with pytest.raises(UserError, match="another model than the recipe's") as refused:
        refuse_another_model("there", model, load_config("tiny").model)
    fitting = load_config("tiny", settings_in(str(refused.value))).model
    refuse_another_model("there", model, fitting)


@pytest.mark.parametrize(
    "same",
    [
        dataclasses.replace(NEXT, layer_pattern=NEXT.layer_kinds(), init_std=0.5, d_ff=8),
        changed(NEXT, "attention", window=3, positions=("rope", "rope")),
        changed(NEXT, "moe", balance="bias", aux_loss=0.0, capacity_factor=2.0),
    ],
)
def test_what_computes_the_same_fits(same: ModelConfig) -> None:
    refuse_another_model("there", NEXT, same)


@pytest.mark.parametrize(
    ("other", "setting"),
    [
        (dataclasses.replace(NEXT, norm_eps=1e-6), "model.norm_eps=1e-05"),
        (changed(NEXT, "attention", rope_base=1e4), "model.attention.rope_base=500000.0"),
        (changed(NEXT, "attention", positions=("none",)), r"model.attention.positions=\[rope\]"),
        (changed(NEXT, "moe", top_k=1), "model.moe.top_k=2"),
        (changed(NEXT, "moe", n_experts=0), "model.moe.n_experts=4"),
    ],
)
def test_what_computes_otherwise_is_refused(other: ModelConfig, setting: str) -> None:
    with pytest.raises(UserError, match=setting):
        refuse_another_model("there", NEXT, other)
