"""lm-evaluation-harness asks an export what our own model would be asked."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch

from data_pipeline.example_tasks import write_example_tasks
from data_pipeline.stream import load_tokenizer
from pretrain.checkpoint.hf import export
from pretrain.config import load_config
from pretrain.errors import TrainingError, UserError
from pretrain.evals import lm_eval as evaluation
from pretrain.evals import lm_eval_tasks
from pretrain.evals.generate import generate
from pretrain.evals.lm_eval_model import ExportedModel
from pretrain.evals.lm_eval_tasks import load_tasks
from pretrain.evals.perplexity import perplexity
from pretrain.metrics.lm_eval import read_lm_eval
from pretrain.model.init import initialize
from pretrain.model.transformer import Transformer
from pretrain.run_dir import RunDirectory

CONTEXT = 96
TEXT = "ab cde fghi jklm nop abc <|endoftext|> lmno pab cde " * 3


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No network, and nothing in the cache of who runs the tests."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def exported(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Transformer, Path]:
    """A hybrid of experts as it is initialised, and its export."""
    config = load_config(
        "tiny-hybrid-moe",
        ["model.vocab_size=1024", "model.d_model=32", "model.init_std=0.3"],
    )
    model = Transformer(config.model).eval()
    initialize(model, config.model, seed=0)
    folder = tmp_path_factory.mktemp("export")
    tokenizer = shards / "bpe.json"
    eos_id = load_tokenizer(tokenizer).eos_id
    export(config.model, model.state_dict(), tokenizer, folder, eos_id=eos_id, max_positions=4096)
    return model, folder


@pytest.fixture(scope="module")
def asked(exported: tuple[Transformer, Path]) -> ExportedModel:
    """Several rows share a pass, of different lengths."""
    return ExportedModel(exported[1], CONTEXT, 3 * CONTEXT, torch.device("cpu"))


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    write_example_tasks(tmp_path / "tasks", seed=1, questions=6)
    return tmp_path / "tasks"


def request(*arguments: Any) -> Any:
    return SimpleNamespace(args=arguments, task_name="task")


@torch.no_grad()
def loglikelihood(model: Transformer, context: list[int], answer: list[int]) -> tuple[float, bool]:
    """From all logits of the whole row."""
    tokens = torch.tensor((context + answer)[-(CONTEXT + 1) :])
    scores = model(tokens[None, :-1]).value[0].double().log_softmax(-1)[-len(answer) :]
    labels = tokens[-len(answer) :]
    total = scores.gather(1, labels[:, None]).sum().item()
    return total, bool((scores.argmax(-1) == labels).all())


def test_loglikelihoods_are_those_of_our_model(
    exported: tuple[Transformer, Path], asked: ExportedModel
) -> None:
    model, folder = exported
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    context = tokenizer.encode(TEXT)
    # What greedy decoding gives is told, and rows of answers of one token are shared.
    likeliest = generate(model, context[-CONTEXT:], 1)
    pairs = [
        *((context[:40], [token]) for token in (5, 99, 700)),
        *((context[:length], context[length : length + 7]) for length in (1, 30, 60, 80)),
        ([tokenizer.eos_id], context[:20]),
        # Longer than the model may see.
        (context[-CONTEXT:], likeliest),
        (context, [3, 4, 5]),
    ]
    found = asked._score(pairs)
    for pair, (total, greedy) in zip(pairs, found, strict=True):
        expected, is_greedy = loglikelihood(model, *pair)
        assert total == pytest.approx(expected, abs=1e-4)
        assert greedy == is_greedy
    assert sum(greedy for _, greedy in found) >= 1


def test_computation_in_bfloat16_is_near(
    exported: tuple[Transformer, Path], asked: ExportedModel
) -> None:
    rounded = ExportedModel(exported[1], CONTEXT, CONTEXT, torch.device("cpu"), torch.bfloat16)
    requests = [request("ab cde", " fghi jklm"), request("nop", " abc")]
    for (near, _), (exact, _) in zip(
        rounded.loglikelihood(requests), asked.loglikelihood(requests), strict=True
    ):
        assert near == pytest.approx(exact, rel=0.05)
        assert near != exact


def test_text_is_encoded_as_in_training(asked: ExportedModel) -> None:
    """A special token that a text spells is text."""
    text = " fghi<|endoftext|>"
    ((spelled, _),) = asked.loglikelihood([request("ab cde", text)])
    ids = asked.tok_encode("ab cde" + text)
    assert asked.eot_token_id not in ids
    context = asked.tok_encode("ab cde")
    assert spelled == pytest.approx(asked._score([(context, ids[len(context) :])])[0][0])


def test_a_context_of_white_space_is_as_an_empty_one(asked: ExportedModel) -> None:
    (blank,), (empty,) = (asked.loglikelihood([request(context, " fghi")]) for context in (" ", ""))
    assert blank[0] == pytest.approx(asked._score([asked._alone("  fghi")])[0][0])
    assert empty[0] == pytest.approx(asked._score([asked._alone(" fghi")])[0][0])


def test_rolling_loglikelihood_is_our_perplexity(
    exported: tuple[Transformer, Path], asked: ExportedModel
) -> None:
    model, _ = exported
    words = TEXT.split()
    # Whole windows: the harness gives the last one more context, if it is shorter.
    text = next(
        text
        for count in range(len(words))
        for text in [" ".join(words[:count])]
        if len(asked.tok_encode(text)) == CONTEXT
    )
    ids = [asked.eot_token_id, *asked.tok_encode(text)]
    ours = perplexity(model, ids, CONTEXT)
    (theirs,) = asked.loglikelihood_rolling([request(text)])
    assert -theirs / CONTEXT == pytest.approx(ours.loss, abs=1e-5)


def test_texts_are_continued_as_by_our_model(
    exported: tuple[Transformer, Path], asked: ExportedModel
) -> None:
    model, folder = exported
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    new = 10
    contexts = ["ab", "cde fghi", TEXT, "nop abc"]
    settings = {"until": ["\n\n"], "max_gen_toks": new}
    found = asked.generate_until([request(context, settings) for context in contexts])
    for context, text in zip(contexts, found, strict=True):
        seen = tokenizer.encode(context)[-(CONTEXT - new) :]
        expected = tokenizer.decode(generate(model, seen, new, stop_id=tokenizer.eos_id))
        assert text == expected
    # It ends before what stops it.
    stop = found[0][1:3]
    (stopped,) = asked.generate_until([request(contexts[0], settings | {"until": [stop]})])
    assert stopped == found[0].split(stop)[0]


def test_what_is_truncated_is_counted(asked: ExportedModel) -> None:
    long, short = TEXT, "ab"
    asked.truncated.clear()
    asked.loglikelihood([request(long, " cde"), request(short, " cde")])
    assert asked.truncated == {"task": 1}
    asked.generate_until([request(long, {"until": [], "max_gen_toks": 2})])
    assert asked.truncated == {"task": 2}


def test_what_cannot_be_asked_is_refused(asked: ExportedModel) -> None:
    with pytest.raises(UserError, match=r"task: an answer has \d+ tokens, and the model sees 96"):
        asked.loglikelihood([request("ab", TEXT)])
    with pytest.raises(UserError, match=r"task: the answer '' has no token of its own after 'ab'"):
        asked.loglikelihood([request("ab", "")])
    with pytest.raises(UserError, match="task generates up to 96 tokens, and the model sees 96"):
        asked.generate_until([request("ab", {"until": [], "max_gen_toks": CONTEXT})])


def test_logits_that_are_not_finite_are_no_answer(
    exported: tuple[Transformer, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = ExportedModel(exported[1], CONTEXT, CONTEXT, torch.device("cpu"))
    with torch.no_grad():
        broken._head.fill_(torch.nan)
    with pytest.raises(TrainingError, match="not finite"):
        broken.loglikelihood([request("ab", " cde")])


@pytest.fixture
def evaluated(
    exported: tuple[Transformer, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., evaluation.HarnessEvaluation]:
    """Evaluates a run whose newest checkpoint is the export."""
    config = load_config("tiny-hybrid-moe", [])
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    (tmp_path / "checkpoints").mkdir()

    def newest(run: RunDirectory, out: Path) -> tuple[int, Any]:
        for file in exported[1].iterdir():
            (out / file.name).write_bytes(file.read_bytes())
        return 7, config

    monkeypatch.setattr(evaluation, "export_newest", newest)
    return lambda **asked: evaluation.evaluate(
        RunDirectory(tmp_path), evaluation.HarnessRequest(**asked)
    )


def test_scores_have_chance_shots_and_versions_and_are_kept(
    evaluated: Callable[..., evaluation.HarnessEvaluation], tasks: Path, tmp_path: Path
) -> None:
    found = evaluated(tasks=("example",), shots=(0, 2), tasks_dir=tasks, limit=4, context=48)
    scores = {(row.task, row.metric, row.shots): row for row in found.rows}
    assert {key[0] for key in scores} == {
        "example_arithmetic",
        "example_copy",
        "example_reversal",
    }
    choice = scores["example_arithmetic", "acc", 2]
    assert (choice.chance, choice.samples, choice.requests) == (0.25, 4, 16)
    assert choice.version == "1.0"
    assert choice.max_length == 48
    assert choice.value in (0, 0.25, 0.5, 0.75, 1)
    assert scores["example_copy", "acc", 0].chance is None
    assert scores["example_copy", "perplexity", 0].higher_is_better is False
    # Two examples and the question take more tokens than the model may see.
    assert scores["example_copy", "acc", 2].truncated == 4
    assert scores["example_copy", "acc", 0].truncated == 0

    # The file keeps what another evaluation of the step does not ask.
    again = evaluated(tasks=("example_copy",), shots=(2,), tasks_dir=tasks, limit=2)
    assert {row.samples for row in again.rows} == {2}
    run = RunDirectory(tmp_path)
    kept = json.loads(run.evaluation("lm-eval", 7).read_text())["rows"]
    assert len(kept) == len(found.rows)
    assert {row["samples"] for row in kept if row["task"] == "example_copy"} == {4, 2}
    assert not list(run.evaluations.glob(".*"))

    table = read_lm_eval(run)
    assert table is not None
    assert (table.step, table.columns) == (7, ("chance", "0 shots", "2 shots"))
    rows = {row.label: row.cells for row in table.rows}
    assert rows["example_arithmetic acc"][0] == "25.0%"
    assert all("%" in cell for cell in rows["example_arithmetic acc"])
    assert "example_copy perplexity ↓" in rows
    assert (
        "example_arithmetic 1.0: 4 questions, example_copy 1.0: 2 or 4 questions"
        in (table.notes[0])
    )


def test_groups_are_scored_over_their_tasks(
    evaluated: Callable[..., evaluation.HarnessEvaluation], tasks: Path
) -> None:
    first = (tasks / "example_arithmetic.yaml").read_text()
    (tasks / "sums.yaml").write_text(first.replace("task: example_arithmetic", "task: sums"))
    group = {
        "group": "choices",
        "task": ["example_arithmetic", "sums"],
        "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
    }
    (tasks / "choices.yaml").write_text(json.dumps(group))
    found = evaluated(tasks=("choices",), tasks_dir=tasks, limit=3)
    (of_group,) = (row for row in found.rows if row.task == "choices")
    (of_task,) = (row for row in found.rows if (row.task, row.metric) == ("sums", "acc"))
    assert (of_group.samples, of_group.requests, of_group.chance) == (6, 24, 0.25)
    assert (of_group.value, of_group.version) == (of_task.value, "")


def test_a_model_that_no_family_has_is_refused(tmp_path: Path) -> None:
    config = load_config("tiny-hybrid-moe", ["model.attention.output_gate=false"])
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    with pytest.raises(UserError, match="no family of transformers has this model"):
        evaluation.evaluate(RunDirectory(tmp_path), evaluation.HarnessRequest(tasks=("x",)))


def write_task(folder: Path, **fields: Any) -> None:
    """A task with three questions and nothing else."""
    folder.mkdir(exist_ok=True)
    lines = [{"question": f"{n}?", "answer": f"{n}!"} for n in range(3)]
    (folder / "test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    task = {
        "task": "mine",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": "test.jsonl"}},
        "test_split": "test",
        "output_type": "loglikelihood",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
    }
    (folder / "mine.yaml").write_text(json.dumps(task | fields))


@pytest.mark.parametrize(
    "splits",
    [
        {},
        {"fewshot_split": "test"},
        {"test_split": None, "validation_split": "test", "fewshot_split": "test"},
        {"test_split": None, "validation_split": "test"},
    ],
)
def test_no_question_is_an_example_of_itself(tmp_path: Path, splits: dict[str, Any]) -> None:
    write_task(tmp_path / "mine", **splits)
    loaded = load_tasks(["mine"], tmp_path / "mine")
    loaded.prepare(2)
    task = loaded.tasks["mine"]
    task.build_all_requests(rank=0, world_size=1)
    for instance in task.instances:
        context = instance.args[0]
        assert context.count(instance.doc["question"]) == 1, context
        assert context.count("!") == 2
    with pytest.raises(UserError, match=r"--num-fewshot 3: mine has 3 examples.*allowed: up to 2"):
        loaded.prepare(3)


@pytest.mark.parametrize(
    ("names", "fields", "message"),
    [
        (["example_arithmetics"], {}, "did you mean example_arithmetic"),
        (["mine"], {"dataset_path": "somebody/nowhere"}, "the data is not on this machine"),
        (["mine"], {"dataset_kwargs": {"data_files": {"test": "no.jsonl"}}}, "no.jsonl"),
        (["mine"], {"test_split": "exam"}, "exam"),
        (["mine"], {"unsafe_code": True}, "mine runs code that the model writes"),
    ],
)
def test_tasks_that_are_not_there_or_not_fit_are_refused(
    tasks: Path,
    names: list[str],
    fields: dict[str, Any],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The harness's own take seconds to read.
    local = partial(lm_eval_tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(lm_eval_tasks, "TaskManager", local)
    write_task(tasks, **fields)
    with pytest.raises(UserError, match=message):
        load_tasks(names, tasks)


def test_examples_of_a_task_that_takes_none(tmp_path: Path) -> None:
    write_task(tmp_path, num_fewshot=0)
    loaded = load_tasks(["mine"], tmp_path)
    loaded.prepare(0)
    with pytest.raises(UserError, match=r"--num-fewshot 1: mine takes no examples"):
        loaded.prepare(1)


def test_folders_without_tasks_and_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no task file .*farspan data example-tasks"):
        load_tasks(["mine"], tmp_path)
    (tmp_path / "broken.yaml").write_text("task: [")
    with pytest.raises(UserError, match=r"broken\.yaml: not a task file"):
        load_tasks(["mine"], tmp_path)
