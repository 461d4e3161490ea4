"""A person can ask of a run what became of each document, and see the texts behind the rules."""

import gzip
import json
import re
import shutil
from collections import Counter
from html import unescape
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from typer.testing import CliRunner

from data_pipeline.audit import Audit
from data_pipeline.audit_page import CHARACTERS, write_page
from data_pipeline.errors import DataError
from data_pipeline.hold_out import hold_out
from data_pipeline.recipe import load_recipe
from data_pipeline.run import run
from data_pipeline.sample import make_sample_crawl
from data_pipeline.shards import TokenReader, load_manifest
from launch.data import app
from tests.unit.data_pipeline.warc_records import record


@pytest.fixture(scope="module")
def crawl(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return make_sample_crawl(tmp_path_factory.mktemp("crawl"), pages=60, files=3, seed=5).files


@pytest.fixture(scope="module")
def folder(crawl: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "data"
    run([str(path) for path in crawl], out, load_recipe("demo"), vocab_size=600)
    return out


@pytest.fixture
def audit(folder: Path) -> Audit:
    return Audit(folder)


def asked(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["audit", *arguments])
    return done.exit_code, done.output if done.exception is None else str(done.exception)


def test_what_was_kept_is_shown_as_it_was_tokenized(audit: Audit, folder: Path) -> None:
    manifest = load_manifest(folder)
    reader, tokenizer = TokenReader(manifest), Tokenizer.from_file(str(manifest.tokenizer))
    trained = Counter(
        tokenizer.decode(reader.read(document, 0, length - 1).tolist())
        for document, length in enumerate(reader.lengths.tolist())
    )
    assert Counter(audit.look(row).text for row in audit.with_reason("kept")) == trained


def test_a_duplicate_leads_to_what_was_kept_and_back(audit: Audit) -> None:
    for dropped in audit.with_reason("near duplicate"):
        (twin,) = audit.document(dropped["twin"])
        assert twin["decision"] == "kept"
        assert twin["cluster"] == dropped["cluster"]
        assert dropped["id"] in {row["id"] for row in audit.duplicates(twin["id"])}
        code, shown = asked(str(audit.folder), "--doc", dropped["id"])
        assert code == 0
        assert f"kept instead  {twin['id']}" in shown
        code, shown = asked(str(audit.folder), "--doc", twin["id"])
        assert dropped["id"] in shown.partition("repeated by")[2]


def test_samples_are_of_their_reason_without_repeats_and_the_same_each_time(audit: Audit) -> None:
    for row in audit.funnel():
        size = min(3, row["documents"])
        drawn = audit.sample(row["stage"], row["reason"], 3)
        assert {(r["stage"], r["reason"]) for r in drawn} == {(row["stage"], row["reason"])}
        assert len({(r["file"], r["offset"]) for r in drawn}) == size
        assert drawn == audit.sample(row["stage"], row["reason"], 3)
    everything = audit.sample("shards", "kept", 10**6)
    assert everything == list(audit.with_reason("kept"))


def test_the_summary_and_the_lists_count_the_same_documents(audit: Audit) -> None:
    code, printed = asked(str(audit.folder), "--json")
    assert code == 0
    rows = [json.loads(line) for line in printed.splitlines()]
    assert rows == audit.funnel()
    for row in rows:
        _, listed = asked(
            str(audit.folder), "--reason", row["reason"], "--json", "--limit", "100000"
        )
        found = [json.loads(line) for line in listed.splitlines()]
        assert sum(r["stage"] == row["stage"] for r in found) == row["documents"]


def test_examples_of_each_reason_are_shown_without_the_archives(
    folder: Path, tmp_path: Path
) -> None:
    code, printed = asked(str(folder), "--examples", "--json")
    assert code == 0
    rows = [json.loads(line) for line in printed.splitlines()]
    assert {row["reason"] for row in rows} == {row["reason"] for row in Audit(folder).funnel()}
    _, shown = asked(str(folder), "--examples", "--reason", "near duplicate")
    of_reason = [row for row in rows if row["reason"] == "near duplicate"]
    assert of_reason
    for row in of_reason:
        assert row["url"] in shown
        assert row["excerpt"].split()[0] in shown
    assert "near duplicates: near duplicate" in shown
    _, told = asked(str(folder), "--examples", "--reason", "nothing")
    assert "has the reason 'nothing'; there are: " in told
    _, told = asked(str(folder), "--examples", "--doc", "x")
    assert "--doc and --examples are different questions" in told
    shutil.copytree(folder, tmp_path / "old")
    (tmp_path / "old" / "funnel.json").unlink()
    _, told = asked(str(tmp_path / "old"), "--examples")
    assert "funnel.json: no such file; make the data again" in told


def test_the_summary_says_how_fast_each_stage_was(folder: Path) -> None:
    _, printed = asked(str(folder), "--summary")
    documents = sum(row["documents"] for row in Audit(folder).funnel())
    assert re.search(rf"clean +│ +{documents} │", printed)
    assert re.search(r"shards +│ +\d+ │", printed)


def test_the_page_shows_texts_of_every_reason_and_loads_nothing(
    audit: Audit, tmp_path: Path
) -> None:
    write_page(audit, tmp_path / "audit.html", per_reason=2)
    page = (tmp_path / "audit.html").read_text()
    sections = re.findall(r'<section class="(\w+)" id="([^"]+)">(.*?)</section>', page, re.DOTALL)
    assert len(sections) == len(audit.funnel())
    for row, (kind, anchor, section) in zip(audit.funnel(), sections, strict=True):
        assert f'href="#{anchor}"' in page
        assert kind == ("kept" if row["reason"] == "kept" else "dropped")
        for sample in audit.sample(row["stage"], row["reason"], 2):
            text = audit.look(sample).text.strip()[:CHARACTERS]
            assert text in unescape(section)
    assert not re.search(
        r"<script|<img|<link|src=|@import|url\(",
        re.sub(r"<pre.*?</pre>", "", page, flags=re.DOTALL),
    )
    assert "default-src 'none'" in page


def test_hostile_texts_stay_texts(tmp_path: Path) -> None:
    page = "<p>" + "An innocent sentence with enough words in it to be kept. " * 20
    body = f"<html><body>{page}&lt;script&gt;alert(1)&lt;/script&gt;</p></body></html>".encode()
    header = "\r\n".join(
        [
            "WARC/1.0",
            "WARC-Type: resource",
            'WARC-Record-ID: <x"><script>',
            "WARC-Target-URI: javascript:alert(1)",
            "Content-Type: text/html",
            f"Content-Length: {len(body)}",
        ]
    )
    (tmp_path / "x.warc").write_bytes(header.encode() + b"\r\n\r\n" + body + b"\r\n\r\n")
    run([str(tmp_path / "x.warc")], tmp_path / "out", load_recipe("minimal"), vocab_size=300)
    write_page(Audit(tmp_path / "out"), tmp_path / "audit.html")
    written = (tmp_path / "audit.html").read_text()
    assert "&lt;script&gt;alert(1)" in written
    assert "<script" not in written
    assert 'href="javascript' not in written


def test_an_archive_that_is_gone_is_named_in_place_of_its_text(
    crawl: list[Path], tmp_path: Path
) -> None:
    archive = tmp_path / crawl[0].name
    archive.write_bytes(crawl[0].read_bytes())
    run([str(archive)], tmp_path / "out", load_recipe("demo"), vocab_size=600)
    archive.unlink()
    audit = Audit(tmp_path / "out")
    row = next(iter(audit.with_reason("kept")))
    assert str(archive) in (audit.look(row).problem or "")
    write_page(audit, tmp_path / "audit.html", per_reason=1)
    assert "The text cannot be shown" in (tmp_path / "audit.html").read_text()


def test_texts_that_cannot_be_found_again_are_not_said_to_be_gone(tmp_path: Path) -> None:
    plain = b"".join(record(number, compressed=False) for number in range(40))
    (tmp_path / "one.warc.gz").write_bytes(gzip.compress(plain))
    run([str(tmp_path / "one.warc.gz")], tmp_path / "out", load_recipe("minimal"), vocab_size=300)
    audit = Audit(tmp_path / "out")
    looks = [audit.look(row) for row in audit.with_reason("exact duplicate")]
    assert len(looks) == 39
    assert all("one gzip member" in str(look.problem) for look in looks)


def test_what_cannot_be_answered_is_refused_with_what_can(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no run"):
        Audit(tmp_path)
    with pytest.raises(
        DataError, match=r"no document .* has the reason 'keptt'; there are: .*kept"
    ):
        Audit(folder).with_reason("keptt")
    code, told = asked(str(folder), "--doc", "nobody")
    assert (code, "no document" in told) == (1, True)
    _, told = asked(str(folder), "--doc", "x", "--reason", "kept")
    assert "--doc and --reason are different questions" in told


def test_shards_of_no_crawl_have_no_audit(folder: Path, tmp_path: Path) -> None:
    hold_out(folder, tmp_path, share=0.5)
    with pytest.raises(DataError, match="has shards, and no audit, which `farspan data run` alone"):
        Audit(tmp_path)


def test_a_run_that_is_not_finished_says_so(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text((folder / "plan.json").read_text())
    with pytest.raises(DataError, match="is not finished: the same command continues it"):
        Audit(tmp_path)
