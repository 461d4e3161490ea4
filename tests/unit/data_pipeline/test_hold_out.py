"""A folder of shards is divided: each document is on one side, whole, and always on the same."""

import shutil
from pathlib import Path

import pytest

from data_pipeline.crawl.transfer import RefusedError
from data_pipeline.errors import DataError
from data_pipeline.formats import export_jsonl
from data_pipeline.hold_out import hold_out
from data_pipeline.shards import Manifest, TokenReader, load_manifest, write_shards
from data_pipeline.shards.store import LocalStore
from data_pipeline.synthetic import Alphabet
from data_pipeline.synthetic.shards import make_synthetic
from data_pipeline.synthetic.stories import Task
from tests.files import contents

DOCUMENTS = [
    (f"d{n}", " ".join(f"f{1 + n % 7 * k % 5}" for k in range(n % 50))) for n in range(200)
]


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    tokenizer = tmp_path / "tokenizer.json"
    Alphabet(64).save_tokenizer(tokenizer)
    extra = {"funnel": ["counts"]}
    write_shards(DOCUMENTS, tokenizer, tmp_path / "all", tokens_per_shard=999, extra=extra)
    return tmp_path / "all"


def documents(manifest: Manifest) -> list[bytes]:
    reader = TokenReader(manifest)
    return [reader.read(n, 0, length).tobytes() for n, length in enumerate(reader.lengths.tolist())]


def test_each_document_is_on_one_side_and_equal_ones_on_the_same(shards: Path) -> None:
    out = shards.with_name("divided")
    training, held_out, is_new = hold_out(shards, out, share=0.3, tokens_per_shard=500)
    assert is_new
    sides = documents(training), documents(held_out)
    assert sorted(sides[0] + sides[1]) == sorted(documents(load_manifest(shards)))
    assert not set(sides[0]) & set(sides[1])
    assert 0.1 < len(sides[1]) / 200 < 0.5
    assert training.extra["funnel"] == ["counts"]
    assert training.tokenizer_sha256 == held_out.tokenizer_sha256
    export_jsonl(out / "held-out", shards.with_name("held-out.jsonl"))
    assert '"id": "d' in shards.with_name("held-out.jsonl").read_text()


def test_the_same_documents_are_held_out_again_and_more_of_them_of_a_larger_share(
    shards: Path,
) -> None:
    out, again, more = (shards.with_name(name) for name in ("out", "again", "more"))
    few = set(documents(hold_out(shards, out, share=0.2).held_out))
    assert not hold_out(shards, out, share=0.2).is_new
    hold_out(shards, again, share=0.2, tokens_per_shard=1 << 24)
    assert contents(again) == contents(out)
    assert few < set(documents(hold_out(shards, more, share=0.5).held_out))


def test_a_server_may_refuse_what_is_missing(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, cause = LocalStore.read, RefusedError("403")

    def read_all_but_counts(self: LocalStore, path: str) -> bytes | None:
        if path == "funnel.json":
            raise DataError("refused") from cause
        return read(self, path)

    monkeypatch.setattr(LocalStore, "read", read_all_but_counts)
    assert hold_out(shards, shards.with_name("out"), share=0.2).is_new


@pytest.mark.parametrize("share", [0.0, 1.0, 1e-9])
def test_a_share_that_leaves_one_side_empty_is_refused(shards: Path, share: float) -> None:
    with pytest.raises(DataError, match=f"share = {share}: "):
        hold_out(shards, shards.with_name("out"), share=share)


def test_a_folder_of_another_share_is_refused(shards: Path) -> None:
    hold_out(shards, shards.with_name("out"), share=0.2)
    with pytest.raises(DataError, match=r"share: 0\.2 -> 0\.3"):
        hold_out(shards, shards.with_name("out"), share=0.3)


@pytest.mark.parametrize("is_source", [True, False])
def test_shards_that_lie_where_it_writes_are_not_replaced(shards: Path, is_source: bool) -> None:
    """As when --out is the folder that has them, not a new one in it."""
    out = shards.with_name("runs")
    out.mkdir()
    there = shards.rename(out / "held-out")
    if not is_source:
        shards = shutil.copytree(there, shards)
    before = contents(out)
    with pytest.raises(DataError, match=r"runs: holds held-out but no plan\.json"):
        hold_out(there if is_source else shards, out, share=0.2)
    assert contents(out) == before


def test_shards_are_made_beside_what_was_held_out_before(shards: Path) -> None:
    """Where training looks for it."""
    held_out = shutil.copytree(shards, shards.with_name("out") / "held-out")
    task = Task(name="needle")
    out = held_out.parent
    assert make_synthetic(task, out, length=40, documents=9, vocab_size=64, seed=3).is_new
    assert contents(held_out) == contents(shards)
