"""Listed sites and words are found whole, and a list that cannot be meant so is refused."""

import pickle
import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from data_pipeline.errors import DataError
from data_pipeline.hygiene.blocklist import UrlBlocklist, WordBlocklist

SITES = """
# ours
bad.example      # a domain and all below it
*.worse.example
.worst.example
bücher.example
203.0.113.7
host.example/users/joe
https://other.example/
"""
WORDS = """
foul
two words
Straße
不好
don't
"""


def sites(tmp_path: Path, text: str = SITES) -> UrlBlocklist:
    (tmp_path / "sites.txt").write_text(text)
    return UrlBlocklist(files=(Path("sites.txt"),)).with_files(tmp_path)


def words(tmp_path: Path, entries: int | None = 1, share: float | None = None) -> WordBlocklist:
    (tmp_path / "words.txt").write_text(WORDS)
    settings = WordBlocklist(files=(Path("words.txt"),), min_entries=entries, min_share=share)
    return settings.with_files(tmp_path)


@pytest.mark.parametrize(
    ("url", "detail"),
    [
        ("https://bad.example", "bad.example"),
        ("http://BAD.example:8080/page?a#b", "bad.example"),
        ("https://www.deep.bad.example/", "bad.example"),
        ("http://joe:secret@bad.example./", "bad.example"),
        ("http://a.worse.example/", "worse.example"),
        ("http://worst.example/", "worst.example"),
        ("http://xn--bcher-kva.example/", "bücher.example"),
        ("http://www.Bücher.example/", "bücher.example"),
        ("http://203.0.113.7/", "203.0.113.7"),
        ("https://host.example/users/joe/photos", "host.example/users/joe"),
        ("http://other.example/any", "other.example/"),
    ],
)
def test_a_page_of_a_listed_site_is_dropped(tmp_path: Path, url: str, detail: str) -> None:
    finding = sites(tmp_path).judge(url)
    assert finding is not None
    assert finding.detail == detail


@pytest.mark.parametrize(
    "url",
    [
        "https://notbad.example/",
        "https://bad.example.org/",
        "https://example/",
        "https://good.example/?from=bad.example",
        "https://good.example/bad.example",
        "https://host.example/users/ann",
        "https://www.host.example/users/joe",
        "https://sub.other.example/",
        "http://13.203.0.113/",
        "http://xn--\x80/",
        "urn:uuid:1",
        "",
    ],
)
def test_other_pages_stay(tmp_path: Path, url: str) -> None:
    assert sites(tmp_path).judge(url) is None


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("A FOUL, they said", "foul"),
        ("in two\n  Words.", "two words"),
        ("STRASSE und", "strasse"),
        ("这不好吗", "不 好"),
        ("I don’t know", "don t"),
    ],
)
def test_whole_words_are_found_in_any_case(tmp_path: Path, text: str, found: str) -> None:
    finding = words(tmp_path).judge(text)
    assert finding is not None
    assert finding.detail.endswith(f": {found}")


@pytest.mark.parametrize("text", ["fouls afoul", "two other words", "不是好", "", "don"])
def test_parts_of_words_are_not(tmp_path: Path, text: str) -> None:
    assert words(tmp_path).judge(text) is None


def test_different_entries_count_once_each(tmp_path: Path) -> None:
    settings = words(tmp_path, entries=2)
    assert settings.judge("foul foul foul") is None
    assert settings.judge("foul in two words") == (
        "blocklist.words",
        "2 listed, 75.00% of 4 words: foul, two words",
    )


def test_a_share_of_the_words_is_enough(tmp_path: Path) -> None:
    settings = words(tmp_path, entries=None, share=0.5)
    assert settings.judge("foul foul and good") is not None
    assert settings.judge("foul and very good") is None
    assert settings.judge("") is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a.example\nb.example c.example\n", "sites.txt:2: 'b.example c.example' has a space"),
        (b"a.example\n\nhttp:///path\n", "sites.txt:3: 'http:///path' is neither a domain"),
        (b"a..example\n", "sites.txt:1: 'a..example' is neither"),
        (b"# nothing\n\n", "sites.txt: holds no entry"),
        (b"a.example\nb\xfc.example\n", "sites.txt:2: not UTF-8"),
    ],
)
def test_a_malformed_list_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "sites.txt").write_bytes(content)
    with pytest.raises(DataError, match=re.escape(message)):
        UrlBlocklist(files=(Path("sites.txt"),)).with_files(tmp_path)


def test_a_list_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.txt: No such file"):
        UrlBlocklist(files=(Path("gone.txt"),)).with_files(tmp_path)
    with pytest.raises(DataError, match="`files` is empty"):
        UrlBlocklist().with_files(tmp_path)


def test_another_list_has_another_plan(tmp_path: Path) -> None:
    one, other = sites(tmp_path), sites(tmp_path, "bad.example\n")
    assert one.model_dump().keys() == {"sha256"}
    assert one.model_dump() != other.model_dump()
    pinned = UrlBlocklist(files=one.files, sha256=one.sha256)
    with pytest.raises(DataError, match="but the recipe asks for"):
        pinned.with_files(tmp_path)


def test_a_list_that_changes_under_a_run_is_refused(tmp_path: Path) -> None:
    settings = sites(tmp_path)
    (tmp_path / "sites.txt").write_text("changed.example\n")
    sites(tmp_path, "other.example\n")
    sites(tmp_path, "another.example\n")  # what was read first is no longer held
    with pytest.raises(DataError, match="has changed while it was in use"):
        pickle.loads(pickle.dumps(settings)).judge("http://bad.example/")


@pytest.mark.parametrize(
    ("entries", "share", "message"),
    [(None, None, "drops nothing"), (0, None, "min_entries = 0"), (None, 1.5, "min_share = 1.5")],
)
def test_impossible_limits_are_refused(
    entries: int | None, share: float | None, message: str
) -> None:
    with pytest.raises(ValidationError, match=re.escape(message)):
        WordBlocklist(min_entries=entries, min_share=share)
