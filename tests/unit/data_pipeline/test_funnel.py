"""What a step passes on is what the next one gets, in documents and in the bytes of its form."""

from collections import Counter
from pathlib import Path

import pytest

from data_pipeline.errors import DataError
from data_pipeline.examples import Examples
from data_pipeline.funnel import FUNNEL, read_funnel, save_funnel, steps_of
from data_pipeline.ledger import Tally


def count(documents: int, page: int = 0, extracted: int = 0, text: int = 0) -> Counter[str]:
    sizes = {"page_bytes": page, "extracted_bytes": extracted, "text_bytes": text}
    return Counter({"documents": documents, **sizes})


# Of ten documents one goes at each step.
COUNTS: Tally = {
    ("crawl", "status"): count(1),
    ("blocklist", "blocklist.domain"): count(1, 100),
    ("extract", "no text"): count(1, 100),
    ("language", "de"): count(1, 100, 30),
    ("quality", "c4.sentences"): count(1, 100, 30, 20),
    ("quality", "gpt3.pareto"): count(1, 100, 30, 20),
    ("decontamination", "overlap"): count(1, 100, 30, 20),
    ("dedup", "near duplicate"): count(1, 100, 30, 20),
    ("dedup", "exact duplicate"): count(1, 100, 30, 20),
    ("shards", "kept"): count(1, 100, 30, 20),
}


def test_bytes_change_their_form_where_documents_do(tmp_path: Path) -> None:
    save_funnel(steps_of(COUNTS, 250, Examples()), tmp_path)
    steps = read_funnel(tmp_path)
    assert [(step["step"], step["documents_in"], step["bytes_in"]) for step in steps] == [
        ("crawl", 10, 250),
        ("blocklist", 9, 900),
        ("extract", 8, 800),
        ("language", 7, 210),
        ("quality", 6, 180),
        ("classifier", 5, 100),
        ("decontamination", 4, 80),
        ("exact duplicates", 3, 60),
        ("near duplicates", 2, 40),
        ("shards", 1, 20),
    ]
    dropped = {step["step"]: step["dropped"] for step in steps}
    assert [len(reasons) for reasons in dropped.values()] == [1] * 9 + [0]
    assert dropped["crawl"][0]["bytes"] is None
    assert dropped["language"][0]["bytes"] == 30
    assert (steps[-1]["documents_out"], steps[-1]["kept"]["documents"]) == (1, 1)


def test_a_step_that_a_recipe_does_not_have_is_left_out() -> None:
    optional = ("blocklist", "decontamination")
    counts = {
        (stage, reason): counted
        for (stage, reason), counted in COUNTS.items()
        if stage not in optional and reason != "gpt3.pareto"
    }
    names = [step["step"] for step in steps_of(counts, 250, Examples())]
    assert names[:4] == ["crawl", "extract", "language", "quality"]
    assert names[4:] == ["exact duplicates", "near duplicates", "shards"]


def test_a_crawl_without_documents_has_a_funnel() -> None:
    steps = steps_of({}, 250, Examples())
    assert steps[0]["bytes_in"] == 250
    assert {step["documents_out"] for step in steps} == {0}


@pytest.mark.parametrize(
    "content", ["{", '{"steps": []}', "[]", '{"format_version": 2, "steps": []}']
)
def test_another_file_of_that_name_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / FUNNEL).write_text(content)
    with pytest.raises(DataError, match=FUNNEL):
        read_funnel(tmp_path)
