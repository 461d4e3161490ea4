"""Text survives wrong charsets, hostile markup and bodies that are no pages."""

import io
import json
from pathlib import Path

import pytest
from warcio.warcwriter import WARCWriter

from data_pipeline.crawl import Page
from data_pipeline.extract import MODES, ExtractError, Mode, extract_archives, extract_text

SENTENCE = (
    "A perfectly ordinary paragraph about rivers, boats and the people who live beside them, "
    "long enough to keep. "
)
GERMAN = "Die Größe der Straße überrascht jeden, der früher über die Brücke ging. " * 4
FRENCH = "L’été dernier, nous avons goûté à la crème brûlée près de la forêt. " * 4
JAPANESE = "日本語の文章です。川と船と人々についての普通の段落。" * 12
CHINESE = "这是一个关于河流、船只和住在河边的人们的普通段落。" * 12
TRADITIONAL = "這是一個關於河流、船隻和住在河邊的人們的普通段落。" * 12
RUSSIAN = "Это обычный абзац о реках, лодках и людях, которые живут рядом с ними. " * 4


def page(
    body: bytes | str, content_type: str | None = "text/html", charset: str | None = None
) -> Page:
    encoded = body.encode() if isinstance(body, str) else body
    return Page("1", "http://example.org", "f.warc", 0, 200, content_type, charset, encoded)


def html(text: str, head: str = "") -> str:
    return f"<!DOCTYPE html><html><head>{head}</head><body><p>{text}</p></body></html>"


@pytest.mark.parametrize(
    ("text", "encoding", "declared"),
    [
        (GERMAN, "utf-8", "iso-8859-1"),
        (GERMAN, "iso-8859-1", "iso-8859-1"),
        (GERMAN, "iso-8859-1", "utf-8"),
        (FRENCH, "windows-1252", "utf-8"),
        (JAPANESE, "shift_jis", "utf-8"),
        (JAPANESE, "shift_jis", "iso-8859-1"),
        (JAPANESE, "euc_jp", None),
        (JAPANESE, "iso2022_jp", "utf-8"),
        (CHINESE, "gb18030", None),
        (TRADITIONAL, "big5", "big5"),
        (RUSSIAN, "windows-1251", "windows-1251"),
        (RUSSIAN, "koi8_r", "utf-8"),
        (JAPANESE, "utf-16", None),
        (RUSSIAN, "utf-8-sig", "windows-1251"),
        (GERMAN, "utf-8", "no-such-charset"),
    ],
)
def test_the_bytes_overrule_a_declared_charset(
    text: str, encoding: str, declared: str | None
) -> None:
    body = html(text).encode(encoding)
    assert extract_text(page(body, charset=declared)) == text.strip()


def test_a_meta_charset_counts_where_the_server_names_none() -> None:
    head = '<meta http-equiv="Content-Type" content="text/html; charset=iso-8859-2">'
    body = html("Příliš žluťoučký kůň. " * 3, head).encode("iso-8859-2")
    assert extract_text(page(body)).startswith("Příliš žluťoučký kůň.")


def test_utf8_cut_inside_a_character_stays_utf8() -> None:
    body = html(JAPANESE).encode()[: -len("</p></body></html>") - 1]
    assert extract_text(page(body)).startswith("日本語の文章です")


@pytest.mark.parametrize("mode", MODES)
def test_site_furniture_is_left_out(mode: Mode) -> None:
    body = (
        "<html><body><nav><ul><li><a href='/'>Home page</a></li></ul></nav>"
        f"<main><h1>Rivers</h1><p>{SENTENCE * 4}</p><p>{SENTENCE * 3}</p></main>"
        "<script>var tracking = 1;</script><footer>Copyright notice</footer></body></html>"
    )
    text = extract_text(page(body), mode)
    assert SENTENCE.strip() in text
    assert not any(word in text for word in ("Home page", "tracking", "Copyright"))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "tags",
    [
        "<div>",
        "<div></x>",
        "<b><i><span>",
        "<li><dd>",
        '<div title="</div>">',
        '<div><script>"</div>"</script>',
        "<div><!--</div>-->",
        "<div><object></div></object>",
    ],
)
def test_deep_nesting_gives_text_in_bounded_time(mode: Mode, tags: str) -> None:
    """The parsers need over a minute for this, or give nothing; pytest has no patience either."""
    furniture = "<nav>Home page</nav>"
    text = extract_text(page(f"<body>{furniture}{tags * 100_000}<p>{SENTENCE}</p>"), mode)
    assert text.endswith(SENTENCE.strip())


@pytest.mark.parametrize("mode", MODES)
def test_a_page_nested_too_deeply_is_flattened(mode: Mode) -> None:
    text = extract_text(page(f"<nav>Home page</nav>{'<div>' * 2000}<p>{SENTENCE}</p>"), mode)
    assert text == f"Home page\n\n{SENTENCE.strip()}"


@pytest.mark.parametrize("mode", MODES)
def test_many_elements_below_a_deep_stack_are_read_too(mode: Mode) -> None:
    body = "<div>" * 1000 + "<i>deep words</i> " * 50_000
    assert extract_text(page(body), mode).startswith("deep words deep words")


def test_control_characters_and_needless_space_are_removed() -> None:
    body = html("one\0two   three\u00a0 four\x07\x1b").replace("</p>", "</p>\n\n\n\n<p>five</p>")
    assert extract_text(page(body)).split("\n") == ["onetwo three four", "", "five"]


@pytest.mark.parametrize(
    "body",
    [
        b"%PDF-1.4\n" + SENTENCE.encode() * 20,
        b"PK\x03\x04" + SENTENCE.encode() * 20,
        bytes(range(256)) * 40,
        b"\x89PNG\r\n" + SENTENCE.encode(),
        b"ID3\x03\0\0\0" + SENTENCE.encode() * 20,
    ],
)
@pytest.mark.parametrize("content_type", ["text/html", "text/plain", None])
def test_binary_bodies_are_dropped_whatever_their_label(
    body: bytes, content_type: str | None
) -> None:
    with pytest.raises(ExtractError) as error:
        extract_text(page(body, content_type))
    assert error.value.reason == "binary"


@pytest.mark.parametrize("start", ["ID3 tags explained.", "RIFF files.", "Rar! Rar!", "wOF"])
def test_text_that_begins_like_a_binary_format_is_text(start: str) -> None:
    text = f"{start} {SENTENCE}".strip()
    assert extract_text(page(text, "text/plain")) == text


@pytest.mark.parametrize("body", [html(""), "<html><script>code()</script></html>"])
def test_a_page_without_text_says_so(body: str) -> None:
    with pytest.raises(ExtractError) as error:
        extract_text(page(body))
    assert error.value.reason == "no text"


def test_a_body_of_no_type_is_html_if_it_looks_so() -> None:
    assert extract_text(page(html("x < y &amp; z"), None)) == "x < y & z"
    assert extract_text(page("x < y &amp; z", None)) == "x < y &amp; z"


def test_plain_text_is_kept_as_it_is() -> None:
    text = "Title\n\n  indented <b>tag</b>\n\n\n\nlast &amp; least"
    assert extract_text(page(text, "text/plain")) == (
        "Title\n\n indented <b>tag</b>\n\nlast &amp; least"
    )


def test_archives_become_jsonl(tmp_path: Path) -> None:
    source = tmp_path / "crawl.wet.gz"
    with source.open("wb") as file:
        writer = WARCWriter(file, gzip=True)
        for number, text in enumerate(("Größe 日本", "  ")):
            record = writer.create_warc_record(
                f"http://example.org/{number}",
                "conversion",
                payload=io.BytesIO(text.encode()),
                warc_headers_dict={"X-Id": f"id-{number}", "Content-Type": "text/plain"},
            )
            writer.write_record(record)
    out = tmp_path / "new" / "texts.jsonl"
    outcomes = extract_archives([str(source)], out, id_header="X-Id")
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert rows == [{"id": "id-0", "url": "http://example.org/0", "text": "Größe 日本"}]
    assert outcomes == {"pages": 1, "crawl: empty": 1}
