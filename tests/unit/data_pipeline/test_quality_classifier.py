"""GPT-3's classifier: trained alike from the same texts, and a text's fate depends on it alone."""

import gzip
import json
import pickle
import random
import re
from pathlib import Path
from statistics import fmean

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from data_pipeline.errors import DataError
from data_pipeline.extract import extract_archives
from data_pipeline.language import detect_language
from data_pipeline.quality import GPT3, Text
from data_pipeline.quality.gpt3 import keep_probability
from data_pipeline.quality.linear import BUCKETS, LinearModel, load_model, read_features, sha256_of
from data_pipeline.quality.training import train_classifier
from data_pipeline.recipe import SHIPPED, load_recipe
from data_pipeline.run import run
from data_pipeline.sample import make_sample_crawl
from launch.data import app

DATA = Path(__file__).parents[4] / "shared" / "data"
CURATED = [
    "river",
    "pier",
    "ferry",
    "passenger",
    "harbour",
    "winter",
    "captain",
    "lake",
    "storm",
    "anchor",
]
CRAWLED = ["buy", "cheap", "online", "price", "click", "here", "now", "offer", "shipping", "free"]
BOTH = ["the", "a", "of", "to", "and", "in", "it", "for", "on", "with"]


def make_texts(words: list[str], count: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(words + BOTH, k=draw.randint(20, 60))) for _ in range(count)]


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("texts")
    return (
        write_jsonl(folder / "curated.jsonl", make_texts(CURATED, 200, 1)),
        write_jsonl(folder / "crawl.jsonl", make_texts(CRAWLED, 300, 2)),
    )


@pytest.fixture(scope="module")
def model_file(files: tuple[Path, Path]) -> Path:
    curated, crawl = files
    path = curated.with_name("model.safetensors")
    train_classifier([curated], [crawl], 1000, 1).model.save(path)
    return path


def test_words_are_lower_case_between_spaces_and_each_counts_once() -> None:
    once = read_features("Ferry")
    assert read_features("  fErrY\n").buckets.tolist() == once.buckets.tolist()
    both = read_features("ferry pier\tferry\u00a0FERRY")
    assert len(both.buckets) == 2
    assert both.values == pytest.approx(np.log1p([3, 1]) / np.linalg.norm(np.log1p([3, 1])))
    assert len(read_features(" \n").buckets) == 0


def test_a_model_stays_of_use() -> None:
    """Where these numbers change, models trained before are worthless: change linear.FORMAT too."""
    assert read_features("the ferry é 語").buckets.tolist() == [192905, 187195, 206537, 63980]


def test_documents_of_either_kind_are_told_apart(files: tuple[Path, Path]) -> None:
    curated, crawl = files
    training = train_classifier([curated], [crawl], 1000, 1)
    assert training.documents == (200, 300)
    assert training.accuracy > 0.95
    assert training.kept[0] > 2 * training.kept[1]
    assert training.model.score("the captain of the ferry") > 0.5
    assert training.model.score("buy it cheap online now") < 0.5
    assert training.model.score("") == pytest.approx(0.5, abs=0.3)


def test_the_same_texts_give_the_same_bytes(files: tuple[Path, Path], tmp_path: Path) -> None:
    curated, crawl = files
    texts = [json.loads(line)["text"] for line in curated.read_text().splitlines()]
    folder = tmp_path / "curated"
    (folder / "deep").mkdir(parents=True)
    pq.write_table(pa.table({"text": [*texts[120:], None, ""]}), folder / "deep" / "b.parquet")
    write_jsonl(folder / "a.jsonl", texts[:130][::-1])
    (folder / "README").write_text("no texts")
    for name, positive, seed in (("one", curated, 1), ("many", folder, 1), ("other", curated, 2)):
        train_classifier([positive], [crawl, crawl], 100, seed).model.save(tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "many").read_bytes()
    assert (tmp_path / "one").read_bytes() != (tmp_path / "other").read_bytes()


def test_the_fewest_texts_that_are_allowed_are_enough(tmp_path: Path) -> None:
    few = write_jsonl(tmp_path / "curated.jsonl", make_texts(CURATED, 20, 1))
    many = write_jsonl(tmp_path / "crawl.jsonl", make_texts(CRAWLED, 100, 2))
    for seed in range(30):
        assert 0.5 <= train_classifier([few], [many], 1000, seed).accuracy <= 1


def test_a_saved_model_scores_as_the_trained_one(
    files: tuple[Path, Path], model_file: Path
) -> None:
    curated, crawl = files
    trained = train_classifier([curated], [crawl], 1000, 1).model
    loaded = load_model(model_file, sha256_of(model_file))
    assert loaded.about == {"seed": 1, "positive": 200, "negative": 300}
    for text in make_texts(CURATED + CRAWLED, 20, 3):
        assert loaded.score(text) == trained.score(text)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.jsonl", None, r"missing\.jsonl: No such file"),
        ("texts.csv", "text\n", r"texts\.csv: unknown file type; allowed are \.parquet, \.jsonl"),
        ("few.jsonl", '{"text": "a b"}\n' * 50, r"--positive: 1 different texts"),
        ("bad.jsonl", "{", r"document 0 .*bad\.jsonl: a line that is not JSON"),
        ("bad.parquet", "PAR1", r"bad\.parquet: damaged or not Parquet"),
        ("folder", ..., r"folder: no \.parquet, \.jsonl"),
    ],
)
def test_texts_that_cannot_be_used_are_named(
    files: tuple[Path, Path], tmp_path: Path, name: str, content: object, message: str
) -> None:
    path = tmp_path / name
    if isinstance(content, str):
        path.write_text(content)
    elif content is ...:
        path.mkdir()
    with pytest.raises(DataError, match=message):
        train_classifier([path], [files[1]], 1000, 1)


def test_a_column_of_another_name_is_named(files: tuple[Path, Path], tmp_path: Path) -> None:
    pq.write_table(pa.table({"content": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: no column `text` among content"):
        train_classifier([tmp_path / "a.parquet"], [files[1]], 1000, 1)


def test_a_column_of_another_type_is_named(files: tuple[Path, Path], tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": [b"a"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: column `text` is binary, it must be string"):
        train_classifier([tmp_path / "a.parquet"], [files[1]], 1000, 1)


def test_pareto_rule_is_numpys() -> None:
    draw = np.random.default_rng(1)
    for score in (0.0, 0.5, 0.9, 1.0):
        kept = np.mean(draw.pareto(9, 100_000) > 1 - score)
        assert keep_probability(score, 9) == pytest.approx(kept, abs=0.005)


def settings(**changes: object) -> GPT3:
    values = {"model": None, "pareto_alpha": 9, "threshold": None, "seed": 1}
    return GPT3.model_validate(values | changes)


def constant_model(path: Path, score: float) -> Path:
    bias = float(np.log(score / (1 - score)))
    LinearModel(np.zeros(BUCKETS, np.float32), bias, {}).save(path)
    return path


def test_the_share_that_is_kept_is_the_rules(tmp_path: Path) -> None:
    rules = settings().with_model(constant_model(tmp_path / "model", 0.9))
    texts = [f"document {number}" for number in range(3000)]
    verdicts = [rules.judge(Text(text), "en") for text in texts]
    assert {verdict.reason for verdict in verdicts} == {None, "gpt3.pareto"}
    assert fmean(v.keep for v in verdicts) == pytest.approx(keep_probability(0.9, 9), abs=0.03)
    assert all(verdict.score == pytest.approx(0.9) for verdict in verdicts)


def test_the_fate_of_a_text_depends_on_nothing_but_text_and_seed(tmp_path: Path) -> None:
    rules = settings().with_model(constant_model(tmp_path / "model", 0.9))
    elsewhere = pickle.loads(pickle.dumps(rules))
    other_seed = settings(seed=2).with_model(tmp_path / "model")
    texts = [f"document {number}" for number in range(200)]
    kept = [rules.judge(Text(text), "en").keep for text in texts]
    assert kept == [elsewhere.judge(Text(text), "xx").keep for text in reversed(texts)][::-1]
    assert kept != [other_seed.judge(Text(text), "en").keep for text in texts]


def test_a_threshold_keeps_what_reaches_it(model_file: Path) -> None:
    rules = settings(pareto_alpha=None, threshold=0.5).with_model(model_file)
    assert rules.judge(Text("the captain of the ferry"), "en").keep
    assert rules.judge(Text("buy it cheap online now"), "en").reason == "gpt3.threshold"


def test_a_plan_knows_the_model_by_its_hash_alone(model_file: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    moved.write_bytes(model_file.read_bytes())
    plans = [
        load_recipe("gpt3").override(classifier=path).model_dump(mode="json")
        for path in (model_file, moved, constant_model(tmp_path / "other", 0.9))
    ]
    assert plans[0] == plans[1] != plans[2]
    assert plans[0]["gpt3"]["sha256"] == sha256_of(model_file)


def test_a_recipe_of_ones_own_names_its_model(model_file: Path, tmp_path: Path) -> None:
    (tmp_path / "model").write_bytes(model_file.read_bytes())
    shipped = (SHIPPED / "gpt3.yaml").read_text()
    (tmp_path / "mine.yaml").write_text(shipped.replace("model: null", "model: model"))
    recipe = load_recipe(str(tmp_path / "mine.yaml")).override()
    assert recipe.judge_quality(Text("the captain of the ferry"), "en").score is not None


def test_a_recipe_without_its_classifier_is_refused() -> None:
    with pytest.raises(DataError, match=r"--classifier MODEL.*farspan data train-classifier"):
        load_recipe("gpt3").override()


def test_a_classifier_that_no_rule_asks_for_is_refused(model_file: Path) -> None:
    with pytest.raises(DataError, match="--classifier: the recipe asks for none"):
        load_recipe("c4-gopher").override(classifier=model_file)


@pytest.mark.parametrize(
    "content",
    [b"", b"PK", b"\x10" + b"\0" * 7 + b'{"a": "b"}      ', b"\xff" * 100],
)
def test_a_file_that_is_no_classifier_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model"
    path.write_bytes(content)
    with pytest.raises(DataError, match="model: not a quality classifier of this version"):
        settings().with_model(path)


def test_a_cut_or_changed_model_is_refused(model_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "model"
    path.write_bytes(model_file.read_bytes()[:-1])
    with pytest.raises(DataError, match="not a quality classifier"):
        settings().with_model(path)
    rules = settings().with_model(constant_model(path, 0.8))
    load_model.cache_clear()
    constant_model(path, 0.9)
    with pytest.raises(DataError, match="has changed while it was in use"):
        rules.judge(Text("a"), "en")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("threshold: null", "threshold: 0.5"), "give either pareto_alpha or threshold"),
        (("pareto_alpha: 9", "pareto_alpha: null"), "give either pareto_alpha or threshold"),
        (("pareto_alpha: 9", "pareto_alpha: 0"), "pareto_alpha = 0.0 is impossible"),
        (("seed: 1", "sha256: abc"), "unknown setting 'gpt3.sha256'"),
    ],
)
def test_impossible_settings_are_refused(
    tmp_path: Path, change: tuple[str, str], message: str
) -> None:
    shipped = (SHIPPED / "gpt3.yaml").read_text()
    (tmp_path / "mine.yaml").write_text(shipped.replace(*change, 1))
    with pytest.raises(DataError, match=re.escape(message)):
        load_recipe(str(tmp_path / "mine.yaml"))


def test_the_command_trains_and_says_how_well(files: tuple[Path, Path], tmp_path: Path) -> None:
    curated, crawl = files
    out = tmp_path / "model.safetensors"
    command = ["train-classifier", "--positive", curated, "--negative", crawl, "--out", out]
    result = CliRunner().invoke(app, [str(part) for part in command])
    assert result.exit_code == 0, result.output
    assert "200 curated and 300 crawled documents" in result.output
    assert f"--recipe gpt3 --classifier {out}" in result.output
    assert load_recipe("gpt3").override(classifier=out).gpt3 is not None


def test_a_run_draws_alike_for_any_number_of_workers(tmp_path: Path) -> None:
    sample = make_sample_crawl(tmp_path / "crawl", pages=40, files=2, seed=3)
    recipe = load_recipe("gpt3").override(classifier=constant_model(tmp_path / "model", 0.9))
    runs = [
        run(
            [*map(str, sample.files)],
            tmp_path / str(workers),
            recipe,
            workers=workers,
            vocab_size=600,
        )
        for workers in (1, 2)
    ]
    assert (tmp_path / "1" / "manifest.json").read_bytes() == (
        tmp_path / "2" / "manifest.json"
    ).read_bytes()
    assert any(row["reason"] == "gpt3.pareto" for row in runs[0].funnel)
    rows = pq.read_table(tmp_path / "1" / "audit").to_pylist()
    scores = [row["quality_score"] for row in rows if row["stage"] in ("quality", "shards")]
    assert scores == pytest.approx([0.9] * len(scores))
    judged = [row for row in rows if row["language"] is not None]
    assert judged
    assert all(0 <= row["language_probability"] <= 1 for row in judged)


@pytest.mark.skipif(not DATA.exists(), reason=f"no {DATA}")
def test_books_and_pages_are_told_apart(tmp_path: Path) -> None:
    """Held-out pieces of books and English pages of the web, of one length; five drawings."""
    with gzip.open(DATA / "prose-en.jsonl.gz", "rt") as file:
        books = [json.loads(line)["text"] for line in file]
    extract_archives([str(DATA / "pages-dev.warc.gz")], tmp_path / "all.jsonl", mode="fast")
    pages = [json.loads(line)["text"] for line in (tmp_path / "all.jsonl").open()]
    pages = [text[:4000] for text in pages if detect_language(text)[0] == "en"]
    curated = write_jsonl(tmp_path / "b.jsonl", [text[5000:9000] for text in books])
    crawl = write_jsonl(tmp_path / "p.jsonl", pages)
    trained = [train_classifier([curated], [crawl], 1000, seed) for seed in range(5)]
    assert fmean(training.accuracy for training in trained) >= 0.94
    assert all(training.kept[0] > 3 * training.kept[1] for training in trained)
