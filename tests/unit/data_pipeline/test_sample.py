"""The sample crawl holds what its report says, and always the same bytes."""

from collections import Counter
from pathlib import Path

import pytest
from warcio.archiveiterator import ArchiveIterator
from warcio.exceptions import ArchiveLoadFailed

from data_pipeline.errors import DataError
from data_pipeline.sample import SampleReport, make_sample_crawl

PAGES = 60


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> SampleReport:
    return make_sample_crawl(tmp_path_factory.mktemp("sample"), pages=PAGES, files=3, seed=5)


def read_planted(report: SampleReport) -> list[tuple[str, str]]:
    """(kind, URL) of each response, by a reader that is not ours."""
    found = []
    for path in report.files:
        with path.open("rb") as file:
            try:
                for record in ArchiveIterator(file):
                    if record.rec_type == "response":
                        headers = record.rec_headers
                        record.content_stream().read()
                        kind, url = headers["X-Planted"], headers["WARC-Target-URI"]
                        found.append((kind, url))
            except (ArchiveLoadFailed, EOFError):
                assert path == report.files[-1]
    return found


def test_the_report_counts_what_another_reader_finds(sample: SampleReport) -> None:
    found = read_planted(sample)
    planted = dict(sample.planted)
    assert planted.pop("cut") == 1
    assert Counter(kind for kind, _ in found) == planted
    assert planted["page"] == PAGES
    copies = planted["mirror"] + planted["edited"] + planted["shortened"]
    assert copies == round(0.15 * PAGES)
    assert len({url for _, url in found}) == len(found)
    assert sample.documents == len(found) + 1


def test_bytes_are_a_function_of_the_seed(
    sample: SampleReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not of the environment, which pydoc would print with its secrets."""
    monkeypatch.setenv("SAMPLE_SECRET", "correct horse")
    again = make_sample_crawl(tmp_path / "again", pages=PAGES, files=3, seed=5)
    other = make_sample_crawl(tmp_path / "other", pages=PAGES, files=3, seed=6)
    contents = [[path.read_bytes() for path in report.files] for report in (sample, again, other)]
    assert contents[0] == contents[1]
    assert all(a != b for a, b in zip(contents[0], contents[2], strict=True))


def test_more_pages_than_modules_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    renderer = tmp_path / "render.py"
    renderer.write_text(
        "import json, pathlib, sys\n"
        "lines = [{'trying': 'a'}, {'name': 'a', 'html': '<p>'}, {'finished': True}]\n"
        "pathlib.Path(sys.argv[2]).write_text('\\n'.join(map(json.dumps, lines)))\n"
    )
    monkeypatch.setattr("data_pipeline.sample.library.RENDERER", renderer)
    with pytest.raises(DataError, match=r"7 sample pages.*give 1"):
        make_sample_crawl(tmp_path / "out", pages=7, files=1, seed=0)


def test_a_module_that_ends_its_process_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A package whose import calls os._exit, among the packages that the renderer finds."""
    import data_pipeline.sample.library as library

    deadly = tmp_path / "site" / "aaa_deadly"
    deadly.mkdir(parents=True)
    (deadly / "__init__.py").write_text("import os; os._exit(9)")
    shadow = library.RENDERER.read_text().replace("for top in [", "for top in ['aaa_deadly', ")
    renderer = tmp_path / "render.py"
    renderer.write_text(shadow)
    monkeypatch.setattr(library, "RENDERER", renderer)
    monkeypatch.setenv("PYTHONPATH", str(deadly.parent))
    assert [page.name for page in library.library_pages(2)] == ["abc", "aifc"]
