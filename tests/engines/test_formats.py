"""Weights from transformers to a run, to megatron-core, to a run and back; and out of ZeRO."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from launch.importing import import_weights
from launch.inference import export_model
from pretrain.errors import UserError
from tests.foreign import MODELS, RUN, logits_in, settings_in, transformers_model
from tests.ranks import run_on_ranks

pytestmark = pytest.mark.oracle

RECIPE = "tiny-hybrid-moe"
ZERO = Path(__file__).with_name("zero_of_transformers.py")

Import = Callable[..., Path]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """An import has a process of its own, whose environment it may change."""
    for name, value in (("CUDA_VISIBLE_DEVICES", ""), ("DS_ACCELERATOR", "cpu")):
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def theirs(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that transformers has saved."""
    folder = tmp_path_factory.mktemp(model)
    transformers_model(MODELS[model]).save_pretrained(folder)
    return folder


@pytest.fixture
def imports(shards: Path, tmp_path: Path) -> Import:
    def run_import(source: Path, settings: list[str], name: str) -> Path:
        given = [*RUN, f"data.shards={shards}", *settings]
        import_weights(source, None, RECIPE, given, tmp_path / name)
        return tmp_path / name

    return run_import


def fitting(imports: Import, theirs: Path) -> list[str]:
    with pytest.raises(UserError, match="is of another model") as refused:
        imports(theirs, [], "other")
    return settings_in(str(refused.value))


def test_logits_are_equal_after_a_round_trip(theirs: Path, imports: Import, tmp_path: Path) -> None:
    settings = fitting(imports, theirs)
    export_model(imports(theirs, settings, "first"), "megatron", tmp_path / "megatron")
    again = imports(tmp_path / "megatron", settings, "second")
    assert json.loads((again / "imported.json").read_text())["format"] == "megatron"
    export_model(again, "hf", tmp_path / "hf")
    torch.testing.assert_close(logits_in(tmp_path / "hf"), logits_in(theirs), rtol=0, atol=0)


def test_another_vocabulary_is_neither_cut_nor_padded(
    theirs: Path, imports: Import, tmp_path: Path
) -> None:
    settings = fitting(imports, theirs)
    export_model(imports(theirs, settings, "first"), "megatron", tmp_path / "megatron")
    with pytest.raises(
        UserError, match=r"embedding\S* is \[1024, 32\] there, \[1152, 32\] in the model"
    ):
        imports(tmp_path / "megatron", [*settings, "model.vocab_size=1152"], "larger")
    assert not (tmp_path / "larger").exists()


def test_a_folder_of_megatron_lm_names_its_newest(
    theirs: Path, imports: Import, tmp_path: Path
) -> None:
    settings = fitting(imports, theirs)
    folder = tmp_path / "megatron"
    export_model(imports(theirs, settings, "first"), "megatron", folder / "iter_0000300")
    (folder / "latest_checkpointed_iteration.txt").write_text("200\n")
    with pytest.raises(UserError, match=r"names \S*iter_0000200, which has no metadata\.json"):
        imports(folder, settings, "second")
    (folder / "latest_checkpointed_iteration.txt").write_text("300\n")
    assert imports(folder, settings, "second").is_dir()


def test_a_model_of_transformers_under_zero_is_imported(
    model: str, theirs: Path, imports: Import, tmp_path: Path
) -> None:
    settings = fitting(imports, theirs)
    run_on_ranks(2, ZERO, model, str(tmp_path / "zero"))
    run = imports(tmp_path / "zero", settings, "run")
    assert json.loads((run / "imported.json").read_text())["format"] == "deepspeed"
    export_model(run, "hf", tmp_path / "hf")
    torch.testing.assert_close(logits_in(tmp_path / "hf"), logits_in(theirs), rtol=0, atol=0)
