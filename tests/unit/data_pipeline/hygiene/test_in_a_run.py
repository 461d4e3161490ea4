"""A recipe's lists, evaluation files and masks decide, and the audit tells what they did."""

import json
import re
from pathlib import Path

import pytest

from data_pipeline.audit import Audit
from data_pipeline.errors import DataError
from data_pipeline.recipe import SHIPPED, load_recipe
from data_pipeline.run import run
from tests.unit.data_pipeline.warc_records import record

QUESTION = "When does the ferry that leaves the northern pier at noon reach the southern one?"
PAGES = [
    "The harbour was rebuilt after the storm. Write to ann@example.net, or call +49 30 901820.",
    "The captain sells tickets on a site that somebody has put on a list of bad ones.",
    "There is a frightful word in the middle of this page about the lake in winter.",
    f"My homework is about boats and nobody has helped me so far. {QUESTION} Please help.",
]
SECTIONS = """
url_blocklist: {files: [sites.txt]}
word_blocklist: {files: [words.txt], min_entries: 1, min_share: null}
decontamination: {files: [quiz.jsonl], ngram: 13, min_words: 8}
privacy: {email: <EMAIL>, ip_address: <IP>, phone: <PHONE>, card: <CARD>}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    text = (SHIPPED / "minimal.yaml").read_text()
    for line in SECTIONS.strip().splitlines():
        text = re.sub(rf"^{line.partition(':')[0]}: null$", line, text, flags=re.MULTILINE)
    assert text.count("files:") == 3
    (tmp_path / "sites.txt").write_text("example.org/1\n")
    (tmp_path / "words.txt").write_text("frightful\n")
    (tmp_path / "quiz.jsonl").write_text(json.dumps({"text": QUESTION}) + "\n")
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return path


def test_the_audit_tells_what_hygiene_did(recipe: Path, tmp_path: Path) -> None:
    archive = tmp_path / "crawl.warc.wet.gz"
    archive.write_bytes(
        b"".join(record(n, page.encode(), kind="conversion") for n, page in enumerate(PAGES))
    )
    out = tmp_path / "run"
    run([str(archive)], out, load_recipe(str(recipe)), id_header="X-Doc-Id", vocab_size=300)
    audit = Audit(out)
    rows = [audit.document(f"doc-{number}")[0] for number in range(4)]
    assert [row["reason"] for row in rows] == [
        "kept",
        "blocklist.url",
        "blocklist.words",
        "decontamination.overlap",
    ]
    assert rows[1]["detail"] == "example.org/1"
    assert rows[3]["detail"].startswith(
        "15 words of example 0 (counted from 0) of quiz.jsonl: when"
    )
    assert (rows[0]["masked_email"], rows[0]["masked_phone"], rows[0]["masked_card"]) == (1, 1, 0)
    assert audit.look(rows[0]).text.endswith("Write to <EMAIL>, or call <PHONE>.")

    (tmp_path / "words.txt").write_text("dreadful\n")
    with pytest.raises(DataError, match="word_blocklist"):
        run([str(archive)], out, load_recipe(str(recipe)), id_header="X-Doc-Id", vocab_size=300)


def test_a_list_that_is_not_there_is_refused_by_its_section(recipe: Path) -> None:
    (recipe.parent / "sites.txt").unlink()
    with pytest.raises(DataError, match=r"url_blocklist: .*sites\.txt: No such file"):
        load_recipe(str(recipe))
