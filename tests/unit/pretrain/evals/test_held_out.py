"""The loss on held-out text is that of the whole model, in every layout, and training goes on as if
nobody had asked.
"""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.synthetic import Task
from data_pipeline.synthetic.shards import make_synthetic
from pretrain.config import load_config
from pretrain.data import stream_of
from pretrain.errors import UserError
from pretrain.evals import held_out_data
from pretrain.evals.held_out_data import open_held_out
from tests.ranks import run_on_ranks
from tests.unit.pretrain.evals.test_sharded import MODEL

SCRIPT = Path(__file__).with_name("held_out_cases.py")
SHORT = "eval.seq_len=64"
# No multiple of data.seq_len. Lanes have other rows in a step: nothing is learned from them.
LONG = "eval.seq_len=214 data.seq_len=64 model.layer_pattern=[linear,sliding] optim.lr=1e-12"
LAYOUTS = {
    1: [
        "",
        "context.segments=2",
        SHORT,
        f"{SHORT} context.segments=2 parallel.recompute=full",
        LONG,
        f"{LONG} context.lane_rows=2",
    ],
    2: [
        "parallel.cp=2 parallel.ep=2 context.segments=2",
        "parallel.tp=2 parallel.dp_shard=1",
        "parallel.pp=2 parallel.pipeline.schedule=zbv",
        f"{LONG} context.lane_rows=2 parallel.cp=2",
    ],
    4: [
        "parallel.cp=2 parallel.tp=2 parallel.ep=4",
        "parallel.dp_shard=2 parallel.pp=2 train.microbatch=1",
    ],
}
Found = dict[str, dict[str, Any]]


def made(folder: Path, **of_documents: int) -> Path:
    sizes = {"length": 64, "documents": 20, "vocab_size": 64, "seed": 0} | of_documents
    make_synthetic(Task(name="multi_key", spread=True), folder, **sizes)
    return folder


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    folder = tmp_path_factory.mktemp("held-out")
    shards = made(folder / "shards")
    # Documents that go on in the next row, and a last row that is not full.
    held_out = made(folder / "held-out", length=75, documents=9, seed=1)
    run = folder / "run"
    run.mkdir()
    shutil.copy(shards / "tokenizer.json", run)
    settings = [f"data.shards={shards}", f"eval={{every: 1, sources: {held_out}}}"]
    config = load_config("tiny-hybrid-moe", [*MODEL, *settings])
    (run / "config.yaml").write_text(config.to_yaml())
    results: Found = {}
    for ranks, layouts in LAYOUTS.items():
        file = folder / f"{ranks}.pt"
        run_on_ranks(ranks, SCRIPT, str(run), str(file), *layouts)
        results |= torch.load(file, weights_only=False)
    return results


def test_training_goes_on_bit_for_bit_as_if_nobody_had_asked(found: Found) -> None:
    for layout, of_layout in found.items():
        assert of_layout["with"] == of_layout["without"], layout


def test_loss_is_that_of_the_whole_model(found: Found) -> None:
    assert found[""]["evaluated"][-1]["held-out"] == pytest.approx(found[""]["expected"], rel=1e-6)


def test_loss_does_not_depend_on_the_layout(found: Found) -> None:
    losses = {
        layout: [of_step["held-out"] for of_step in of_layout["evaluated"]]
        for layout, of_layout in found.items()
    }
    assert losses[""][0] != losses[""][-1], "it is that of the weights as they are"
    assert losses[SHORT][0] != losses[""][0], "rows matter"
    for layout, of_layout in losses.items():
        expected = losses[next(rows for rows in (SHORT, LONG, "") if rows in layout)]
        # Before the first step weights are the same; later on gradients are rounded otherwise.
        assert of_layout == pytest.approx(expected, rel=1e-5), layout


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return made(tmp_path / "shards", documents=3)


def refused(shards: Path, *settings: str) -> str:
    config = load_config("tiny", [f"data.shards={shards}", "eval.every=5", *settings])
    with pytest.raises(UserError) as told:
        open_held_out(config, stream_of(config))
    return str(told.value)


def test_what_is_trained_on_is_refused_wherever_it_lies(shards: Path) -> None:
    copy = shutil.copytree(shards, shards.with_name("copy"))
    assert "holds the same tokens as" in refused(shards, f"eval.sources={copy}")


def test_shards_of_another_tokenizer_are_refused(shards: Path) -> None:
    other = made(shards.with_name("other"), vocab_size=128)
    assert "has another tokenizer than" in refused(shards, f"eval.sources={other}")


def test_two_sources_of_one_name_are_refused(shards: Path) -> None:
    sources = "eval.sources=[{path: a/x}, {path: b/x}]"
    assert "2 sources are called 'x'" in refused(shards, sources)


def test_without_held_out_shards_it_is_told_how_to_make_some(shards: Path) -> None:
    assert "Hold some back with `farspan data hold-out`" in refused(shards)
    made(shards / "held-out", seed=1)
    config = load_config("tiny", [f"data.shards={shards}", "eval.every=5", "eval.tokens=1000"])
    ((name, source),) = open_held_out(config, stream_of(config)).items()
    # Rows of 256 tokens, and 20 documents of 64.
    assert (name, source.rows, source.tokens) == ("shards", 3, 768)


def test_sources_of_one_name_are_evaluated_each(tmp_path: Path) -> None:
    paths = [made(tmp_path / name / "pages", documents=3, seed=n) for n, name in enumerate("ab")]
    for n, path in enumerate(paths, start=2):
        made(path / "held-out", documents=3, seed=n)
    shards = f"data.shards=[{{path: {paths[0]}}}, {{path: {paths[1]}}}]"
    config = load_config("tiny", [shards, "eval.every=5"])
    assert list(open_held_out(config, stream_of(config))) == [str(path) for path in paths]


def test_no_secret_of_an_address_becomes_a_name() -> None:
    secrets = (
        "{path: 'https://me:SECRET@a/x/pages?sig=SECRET1'}, {path: 'https://a/x/pages?SECRET2'}"
    )
    config = load_config("tiny", [f"data.shards=[{secrets}]", "eval.every=5"])
    assert held_out_data._named(config) == [
        ("https://a/x/pages", "https://me:SECRET@a/x/pages/held-out?sig=SECRET1"),
        ("https://a/x/pages (2)", "https://a/x/pages/held-out?SECRET2"),
    ]
    config = load_config("tiny", ["eval={every: 5, sources: 'https://a/x/pages/?sig=SECRET'}"])
    assert held_out_data._named(config) == [("pages", "https://a/x/pages/?sig=SECRET")]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["eval.seq_len=100", "parallel.cp=8"], "must be a multiple of parallel.cp x parallel.tp"),
        (["eval.seq_len=512"], "must be at most 256 (data.seq_len, or model.attention.yarn)"),
        (
            ["phases=[{from_step: 3, data.seq_len: 512, parallel.cp: 3}]"],
            "phase 2 from step 3: data.seq_len=512, parallel.cp=3: eval.seq_len = 256: must be",
        ),
        (["context.segments=2", "eval.seq_len=200"], "multiple of the segments of 128 tokens"),
    ],
)
def test_rows_that_a_phase_cannot_run_are_refused_when_it_is_read(
    settings: list[str], message: str
) -> None:
    with pytest.raises(UserError) as told:
        load_config("tiny", ["eval.every=5", *settings])
    assert message in str(told.value)
    load_config("tiny", settings)
