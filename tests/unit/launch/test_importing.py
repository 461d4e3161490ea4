"""A run that begins with the weights of others."""

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.importing import import_weights
from launch.train import prepare
from parallel.fsdp import local_tensor
from parallel.mesh import alone
from pretrain.checkpoint.export import export_newest
from pretrain.checkpoint.formats.hf import write as write_hf
from pretrain.checkpoint.index import Index
from pretrain.checkpoint.manifest import Manifest, read_index
from pretrain.checkpoint.store import checkpoint_in, saved_steps
from pretrain.checkpoint.target import Target
from pretrain.checkpoint.trained import load_trained
from pretrain.config import load_config
from pretrain.errors import UserError
from pretrain.run_dir import RunDirectory
from pretrain.trainer import Trainer
from tests.disks import files_of_at_most
from tests.foreign import MODELS, RUN, logits_in, settings_in, transformers_model

RECIPE = "tiny-hybrid-moe"

Import = Callable[..., RunDirectory]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """An import has a process of its own, whose environment it may change."""
    for name in ("CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR"):
        monkeypatch.setenv(name, "")


@pytest.fixture(scope="module", params=MODELS)
def theirs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that transformers has saved."""
    folder = tmp_path_factory.mktemp(request.param)
    transformers_model(MODELS[request.param]).save_pretrained(folder)
    return folder


@pytest.fixture
def imports(shards: Path, tmp_path: Path) -> Import:
    def run_import(source: Path, *settings: str, form: str | None = None) -> RunDirectory:
        given = [*RUN, f"data.shards={shards}", *settings]
        import_weights(source, form, RECIPE, given, tmp_path / "run")
        return RunDirectory(tmp_path / "run")

    return run_import


def fitting(imports: Import, source: Path) -> list[str]:
    """What the refusal of another model says."""
    with pytest.raises(UserError, match=r"config\.json is of another model") as refused:
        imports(source)
    return settings_in(str(refused.value))


def test_a_run_begins_with_the_weights_of_transformers(
    theirs: Path, imports: Import, tmp_path: Path
) -> None:
    settings = fitting(imports, theirs)
    assert not (tmp_path / "run").exists()
    run = imports(theirs, *settings)

    export_newest(run, tmp_path / "exported")
    torch.testing.assert_close(logits_in(tmp_path / "exported"), logits_in(theirs))
    _, ours = load_trained(run, step=0)
    tokens = torch.randint(1024, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens).value, logits_in(theirs), rtol=1e-4, atol=1e-4)


def test_the_checkpoint_of_step_0_has_no_optimizer(theirs: Path, imports: Import) -> None:
    run = imports(theirs, *fitting(imports, theirs))
    checkpoint = checkpoint_in(Target(str(run.checkpoints)), 0)
    manifest = Manifest.read(checkpoint)
    names = Index.from_bytes(read_index(checkpoint, manifest)).by_name
    assert {name.partition(".")[0] for name in names} == {"model", "routers"}
    assert (manifest.progress["step"], manifest.progress["tokens"]) == (0, 0)
    assert json.loads(run.imported.read_text())["format"] == "hf"


def test_training_goes_on_from_it_with_a_new_optimizer(
    theirs: Path, imports: Import, shards: Path
) -> None:
    settings = [*RUN, f"data.shards={shards}", *fitting(imports, theirs), "train.dtype=float32"]
    run = imports(theirs, *settings)
    _, imported = load_trained(run)
    with alone():
        trainer = Trainer(load_config(RECIPE, settings), run, torch.device("cpu"), attempt=1)
        # The moments are made where there are none.
        found = {name: local_tensor(x) for name, x in trainer.engine.tensors().items()}
    assert trainer.progress.step == trainer.stream.tokens == 0
    for name, weight in imported.state_dict().items():
        assert torch.equal(found[f"model.{name}"], weight), name
        assert not found[f"optimizer.{name}.exp_avg"].any(), name
        assert found[f"optimizer.{name}.step"] == 0


def test_a_run_that_has_begun_is_refused(theirs: Path, imports: Import) -> None:
    settings = fitting(imports, theirs)
    run = imports(theirs, *settings)
    with pytest.raises(UserError, match="has a checkpoint of step 0 already"):
        imports(theirs, *settings)
    (run.checkpoints / "step-00000000" / "manifest.json").unlink()
    run.begin_attempt()
    with pytest.raises(UserError, match="has begun already, with attempt 1"):
        imports(theirs, *settings)


def test_a_folder_that_another_run_has_claimed_is_refused_before_a_run_is_made(
    theirs: Path, imports: Import, tmp_path: Path
) -> None:
    settings = [*fitting(imports, theirs), f"checkpoint.dir={tmp_path / 'checkpoints'}"]
    imports(theirs, *settings).root.rename(tmp_path / "first")
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000000")
    with pytest.raises(UserError, match=rf"has the checkpoints of .*{tmp_path / 'run'}: "):
        imports(theirs, *settings)
    assert not (tmp_path / "run").exists()


def test_an_import_cut_short_does_not_become_another_run(
    theirs: Path, imports: Import, shards: Path
) -> None:
    settings = fitting(imports, theirs)
    run = imports(theirs, *settings)
    (run.checkpoints / "step-00000000" / "manifest.json").unlink()
    given = [*RUN, f"data.shards={shards}", *settings]
    prepare(RECIPE, given, 1, run.root)
    for attempt in (1, None):
        with alone(), pytest.raises(UserError, match="the same `farspan import` again completes"):
            Trainer(load_config(RECIPE, given), run, torch.device("cpu"), attempt)

    imports(theirs, *settings)
    assert saved_steps(Target(str(run.checkpoints))) == [0]


def test_another_tokenizer_is_refused(theirs: Path, imports: Import, shards: Path) -> None:
    settings = fitting(imports, theirs)
    tokenizer = theirs / "tokenizer.json"
    content = json.loads((shards / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    try:
        tokenizer.write_text(json.dumps(content))
        with pytest.raises(UserError, match=r"'a' is the token .* one of 2 that differ"):
            imports(theirs, *settings)
        tokenizer.write_bytes((shards / "tokenizer.json").read_bytes())
        imports(theirs, *settings)
    finally:
        tokenizer.unlink()


def test_an_export_without_room_is_told_and_leaves_nothing(
    theirs: Path, imports: Import, tmp_path: Path
) -> None:
    run = imports(theirs, *fitting(imports, theirs))
    out = tmp_path / "exports" / "one"

    def without_room(*asked: Any) -> None:
        with files_of_at_most(10_000):
            write_hf(*asked)

    told = f"{out} cannot be written: .*File too large.*; nothing is left of it. Make room there"
    with pytest.raises(UserError, match=told):
        export_newest(run, out, without_room)
    assert not list(out.parent.iterdir())


def test_an_export_is_whole_or_absent(theirs: Path, imports: Import, tmp_path: Path) -> None:
    run = imports(theirs, *fitting(imports, theirs))
    out = tmp_path / "exports" / "one"

    def fail(*_: object) -> None:
        (next(out.parent.iterdir()) / "half").touch()
        raise OSError(errno.ENOSPC, "no space left on device", "half")

    told = "one cannot be written: .*no space left on device: 'half'; nothing"
    with pytest.raises(UserError, match=told):
        export_newest(run, out, fail)
    assert not list(out.parent.iterdir())
    export_newest(run, out)
    with pytest.raises(UserError, match=r"one is there and not empty; name another folder"):
        export_newest(run, out)
