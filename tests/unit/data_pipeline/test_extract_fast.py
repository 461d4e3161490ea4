"""What `fast` keeps of pages of many kinds, and that no bytes make it slow or fail."""

import random
import re
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from resiliparse.extract.html2text import extract_plain_text

from data_pipeline.crawl import Page
from data_pipeline.extract import ExtractError, extract_text
from data_pipeline.extract.blocks import read_blocks
from data_pipeline.extract.forest import SHIPPED, Forest, format_digest
from data_pipeline.extract.labels import coverage
from data_pipeline.extract.main_content import block_texts, blocks_of
from data_pipeline.extract.vocabulary import EDGE, MEANINGS, meaning_automaton

SHARED = Path(__file__).parents[4] / "shared" / "data"

PARAGRAPHS = [
    "The river rises in the hills to the north, where rain falls on most days of the year, and "
    "it reaches the sea after three hundred miles of meadows, locks and small towns.",
    "Boats have carried timber and wool along it since the Middle Ages. The last of the barges was "
    "sold in 1962, but a few families still live on the water, and repair what they can.",
    "“We never wanted to live in a house,” says one of them, who was born on a barge and has "
    "worked on the locks for forty years. “You sleep better when the floor moves a little.”",
    "Every spring the meadows are flooded, as they always have been; what has changed is how "
    "quickly the water comes, and how long it takes to drain away from the fields again.",
]
ARTICLE = "".join(f"<p>{paragraph}</p>" for paragraph in PARAGRAPHS)
MENU = (
    '<header><nav class="main-menu"><ul>'
    + "".join(f'<li><a href="/{n}">Topic number {n}</a></li>' for n in range(12))
    + "</ul></nav></header>"
)
FOOTER = (
    '<footer class="site-footer"><ul><li><a href="/imprint">Imprint of the publisher</a></li>'
    '<li><a href="/privacy">Privacy statement</a></li></ul>'
    "<p>Copyright 2024 The River Company. All rights reserved.</p></footer>"
)


def page(content: str, title: str = "Life on the river") -> Page:
    body = (
        f"<!DOCTYPE html><html><head><title>{title}</title></head>"
        f"<body>{MENU}{content}{FOOTER}</body></html>"
    ).encode()
    return Page("1", "http://example.org", "f.warc", 0, 200, "text/html", "utf-8", body)


def raw(body: bytes) -> Page:
    return Page("1", "http://example.org", "f.warc", 0, 200, "text/html", "utf-8", body)


def article(more: str = "", inside: str = "") -> Page:
    heading = "<h1>Life on the river</h1>"
    return page(f'<main><article class="post">{heading}{ARTICLE}{inside}</article></main>{more}')


def assert_article_without(text: str, *unwanted: str) -> None:
    for paragraph in PARAGRAPHS:
        assert paragraph in text.split("\n")
    for phrase in ("Topic number", "Imprint of", "All rights reserved", *unwanted):
        assert phrase not in text


def test_menus_and_footers_are_left_out() -> None:
    assert_article_without(extract_text(article()))


def test_comments_are_left_out() -> None:
    comment = (
        '<li class="comment"><div class="comment-author"><a href="/u">Reader {n}</a> says:</div>'
        '<div class="comment-body"><p>I have been there with my family, number {n}.</p></div>'
        '<a class="reply" href="#">Reply</a></li>'
    )
    comments = "".join(comment.format(n=n) for n in range(8))
    section = f'<section id="comments"><h2>8 comments</h2><ol>{comments}</ol></section>'
    assert_article_without(extract_text(article(section)), "I have been there", "8 comments")


@pytest.mark.parametrize("first", [True, False])
def test_cookie_banners_are_left_out(first: bool) -> None:
    banner = (
        '<div id="cookie-consent" class="cookie-banner modal" role="dialog"><p>We and our partners '
        "use cookies to personalise content and ads, and to analyse our traffic. You can change "
        'your choice at any time.</p><button class="btn">Accept all</button>'
        '<button class="btn">Reject</button></div>'
    )
    main = f'<main><article class="post"><h1>Life on the river</h1>{ARTICLE}</article></main>'
    text = extract_text(page(banner + main if first else main + banner))
    assert_article_without(text, "our partners", "Accept all")


def test_related_articles_and_share_buttons_are_left_out() -> None:
    share = '<div class="share"><a href="#">Facebook</a> <a href="#">Twitter</a></div>'
    related = '<aside class="related"><h3>Read more</h3><ul>' + "".join(
        f'<li><a href="/{n}">Another story about town number {n}</a></li>' for n in range(6)
    )
    text = extract_text(article(related + "</ul></aside>", inside=share))
    assert_article_without(text, "Facebook", "Another story")


def test_a_forum_gives_its_posts() -> None:
    posts = [
        "Has anybody replaced the pump on a boat of this size? Mine leaks since the winter.",
        "Yes, last year. You need to take out the whole engine first, which takes a day or two.",
        "Thanks! Did you keep the old bolts, or did you order new ones from the shipyard?",
        "New ones, of course; the old ones break as soon as you look at them. Good luck.",
    ]
    threads = "".join(
        f'<div class="post"><div class="author"><a href="/u/{n}">sailor{n}</a></div>'
        f'<div class="message"><p>{post}</p></div></div>'
        for n, post in enumerate(posts)
    )
    text = extract_text(page(f'<div id="thread"><h1>Pump</h1>{threads}</div>', "Pump"))
    assert all(post in text for post in posts)


def test_a_product_page_gives_its_description() -> None:
    description = (
        "A rope of twelve millimetres for boats of up to nine metres. It floats, it does not rot, "
        "and it can be spliced by hand. Sold by the metre, in white or in blue."
    )
    content = (
        '<div class="product"><h1>Mooring rope</h1><span class="price">3.20</span>'
        f'<form class="cart"><button>Add to basket</button></form>'
        f'<div class="description"><p>{description}</p></div></div>'
    )
    assert description in extract_text(page(content, "Mooring rope"))


def test_a_page_of_links_alone_gives_something() -> None:
    links = "".join(f'<li><a href="/s/{n}">The story of lock {n}</a></li>' for n in range(40))
    assert "The story of lock 7" in extract_text(page(f"<ul>{links}</ul>", "Stories"))


def test_rows_of_a_table_are_lines() -> None:
    rows = "".join(
        f"<tr><td>Lock number {n}, by the mill</td><td>{1800 + n}</td><td>{n} metres</td></tr>"
        for n in range(4, 9)
    )
    text = extract_text(
        article(inside=f"<table><tr><th>Lock</th><th>Built</th></tr>{rows}</table>")
    )
    assert "Lock number 5, by the mill 1805 5 metres" in text.split("\n")


def test_lines_of_code_stay_lines() -> None:
    code = "def flow(width, depth):\n    area = width * depth\n    return area * 1.5"
    text = extract_text(article(inside=f"<pre><code>{code}</code></pre><p>{PARAGRAPHS[0]}</p>"))
    assert "def flow(width, depth):\n area = width * depth\n return area * 1.5" in text


def test_items_of_a_list_are_marked() -> None:
    items = [
        "Bring a coat, even in summer, because the wind on the water is colder than you think.",
        "Ask before you moor, since most of the places along the bank belong to somebody.",
        "Take enough to eat for two days; there is no shop between the fourth lock and the sea.",
    ]
    listed = "".join(f"<li>{item}</li>" for item in items)
    text = extract_text(article(inside=f"<p>Three rules:</p><ul>{listed}</ul>"))
    assert all(f"- {item}" in text.split("\n") for item in items)


@pytest.mark.parametrize(
    ("sentence", "menu"),
    [
        (
            "这条河发源于北方的山区，全年大部分时间都在下雨，流经三百英里的草地后注入大海。",
            "首页新闻",
        ),
        (
            "川は北の山々に源を発し、一年の大半は雨が降り、三百マイルを流れて海に注いでいます。",
            "ホーム",
        ),
        (
            "ينبع النهر من التلال في الشمال، حيث تهطل الأمطار في معظم أيام السنة، ويصل إلى البحر.",
            "الرئيسية",
        ),
        (
            "แม่น้ำสายนี้มีต้นกำเนิดจากภูเขาทางเหนือซึ่งมีฝนตกเกือบทั้งปีและไหลลงสู่ทะเล",
            "หน้าแรก",
        ),
        (
            "Река берёт начало в горах на севере, где дожди идут весь год, и течёт к морю.",
            "Главная",
        ),
    ],
)
def test_other_scripts_are_read_alike(sentence: str, menu: str) -> None:
    paragraphs = "".join(f"<p>{sentence * 3}</p>" for _ in range(4))
    links = "".join(f'<li><a href="/{n}">{menu}</a></li>' for n in range(10))
    body = (
        f'<html><body><div class="nav"><ul>{links}</ul></div><div class="text">{paragraphs}</div>'
        f'<div class="footer"><a href="/">{menu}</a></div></body></html>'
    )
    assert extract_text(raw(body.encode())).split("\n\n") == [sentence * 3] * 4


def test_broken_markup_is_read_as_browsers_do() -> None:
    body = (
        "<p>One<p>Two <b>bo</b>ld<br>three<table><tr><td>a<td>b<tr><td>c</table>"
        "<div>x</span> y</div><!-- <p>no --><p title='>'>t &amp; u</p><ul><li>i<li>j</ul>z"
    )
    assert block_texts(blocks_of(body)) == (
        ["One", "Two bold", "three", "a", "b", "c", "x y", "t & u", "i", "j", "z"]
    )


def test_two_line_breaks_or_more_end_a_paragraph() -> None:
    verse = "<div>One long line<br>another<br> <br>a third<br><br><br>and the last</div>"
    text = extract_text(raw(verse.encode()))
    assert text == "One long line\nanother\n\na third\n\nand the last"


def test_hidden_and_raw_content_is_told_apart() -> None:
    body = (
        '<div style="color: red; DISPLAY: none">a</div><div hidden>b</div><p>c</p>'
        "<script>if (a < b) '</div>'</script><style>p{}</style><noscript><p>d</p></noscript>"
        "<svg><text>e</text></svg><textarea>f</textarea><select><option>g</option></select>"
    )
    blocks = blocks_of(body)
    assert block_texts(blocks) == ["a", "b", "c"]
    assert blocks.node_hidden[blocks.block_node].tolist() == [True, True, False]


@pytest.mark.skipif(not SHARED.exists(), reason=f"no real pages at {SHARED}")
def test_blocks_of_real_pages_have_the_words_that_resiliparse_sees() -> None:
    from data_pipeline.extract.charset import decode
    from data_pipeline.extract.train import read_pages

    shares = []
    for document in read_pages(SHARED)[::20]:
        decoded = decode(document.body, document.charset).replace("\0", "")
        ours = set(re.findall(r"\w+", " ".join(block_texts(blocks_of(decoded)))))
        theirs = set(re.findall(r"\w+", extract_plain_text(decoded, alt_texts=False)))
        shares.append(len(ours & theirs) / max(1, len(ours | theirs)))
    assert sum(shares) / len(shares) > 0.95


def test_a_page_gives_the_same_text_each_time() -> None:
    assert len({extract_text(article()) for _ in range(3)}) == 1


@pytest.mark.parametrize(
    "body",
    [
        b"<" * 1_000_000,
        b"<a " * 300_000,
        b"<a b='" * 200_000,
        b"<!--" * 250_000,
        b"<!-- - --" * 100_000,
        b"<script>" * 100_000,
        b"</script " * 100_000,
        b"&" * 1_000_000,
        b"&amp" * 250_000,
        b"<p>&#1" * 150_000,
        b"<div><td>" * 100_000 + b"</div>" * 100_000,
        b"<li><ul>" * 100_000 + b"</li>" * 100_000,
        b"<table><tr><td>" * 60_000,
        b"<b><i>" * 150_000 + b"</b>" * 150_000,
        b"<svg>" * 200_000 + b"text",
        b"<p style='" + b":none y:" * 100_000 + b"'>text",
        b"<p class='" + b"comment " * 100_000 + b"'>text",
        b"<p>word</p>" * 100_000,
        b"<td>cell" * 100_000,
        b" \t \xc2\xa0\n" * 200_000 + b"text",
        b"\0<p\0>\0te\0xt" * 100_000,
        b"<pre>" + b"\n" * 1_000_000 + b"text",
    ],
    ids=lambda body: repr(body[:12]),
)
def test_hostile_pages_take_linear_time(body: bytes) -> None:
    """Of a megabyte, at most ten CPU seconds where a search over open tags takes minutes."""
    extract_text(raw(b"<p>compiled by now"))
    start = time.process_time()
    try:
        extract_text(raw(body))
    except ExtractError as error:
        assert error.reason == "no text"  # noqa: PT017  both are fine
    assert time.process_time() - start < 10


def test_one_line_of_50_megabytes_is_kept() -> None:
    assert extract_text(raw(b"<p>" + b"a" * 50_000_000)) == "a" * 50_000_000


PIECES = (
    b"< > </ <p <div> </div> <td> <li> <!-- --> \" ' = & &amp; &#0; <script> </script <pre> "
    b"<table> </table> <svg> </svg> <a\thref=x> </a> <br> <title> style= / text \0 \xff "
    b"\xe3\x80\x82 \xc2 \xa0"
).split(b" ")


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from([*PIECES, b" ", b"\n"]), max_size=60))
def test_any_bytes_give_text_or_none(pieces: list[bytes]) -> None:
    try:
        text = extract_text(raw(b"".join(pieces)))
    except ExtractError as error:
        assert error.reason in ("no text", "binary")  # noqa: PT017  both are fine
        return
    assert text.strip() == text
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", text)


def test_blocks_lie_in_their_elements() -> None:
    random.seed(3)
    tags = ["div", "p", "ul", "li", "table", "tr", "td", "section", "a", "b", "svg"]
    for _ in range(50):
        pieces = [
            random.choice(["<{}>", "</{}>", "<{}>text"]).format(random.choice(tags))
            for _ in range(200)
        ]
        blocks = read_blocks(np.frombuffer("".join(pieces).encode(), dtype=np.uint8))
        number = np.arange(len(blocks.block_node))
        first = blocks.node_first_block[blocks.block_node]
        end = blocks.node_end_block[blocks.block_node]
        assert (first <= number).all()
        assert (number < end).all()
        parents = blocks.node_parent[1:]
        assert (parents < np.arange(1, len(blocks.node_parent))).all()
        assert (blocks.node_end_block[1:] <= blocks.node_end_block[parents]).all()


def test_the_automaton_finds_what_a_search_finds() -> None:
    following, found = meaning_automaton()
    names = ["post-comments", "header", "ad-slot", "navbar nav", "sidebarad", "entry content", "xx"]
    for name in names:
        text = f" {name.replace('-', ' ')} "
        state, bits = 0, 0
        for letter in text:
            code = EDGE if letter == " " else ord(letter) - ord("a") + 1
            state = following[state, code]
            bits |= int(found[state])
        expected = {
            number
            for number, meaning in enumerate(MEANINGS)
            if any(word.replace("-", " ") in text for word in meaning.split("|"))
        }
        assert {number for number in range(len(MEANINGS)) if bits >> number & 1} == expected


def test_coverage_goes_by_runs_of_words_and_short_blocks_by_their_neighbours() -> None:
    blocks = ["home news sport", "one two three four five", "six", "one two other three four", "--"]
    shares = coverage(blocks, "one two three four five six seven")
    assert shares[:4].tolist() == [0, 1, 1, 0]
    assert np.isnan(shares[4])


def test_the_shipped_forest_is_of_the_present_features() -> None:
    with np.load(SHIPPED) as arrays:
        assert arrays["format"] == format_digest()


def test_a_forest_sums_its_leaves(tmp_path: Path) -> None:
    forest = Forest(
        root=np.array([0, 1], dtype=np.int32),
        feature=np.array([2, 0], dtype=np.int32),
        threshold=np.array([0.5, -1], dtype=np.float32),
        children=np.array([[-1, -2], [-3, -4]], dtype=np.int32),
        leaf=np.array([1, 2, 10, 20], dtype=np.float32),
    )
    forest.save(tmp_path / "forest.npz")
    rows = np.array([[0, 0, 0.5], [-1, 0, 0.6]], dtype=np.float32)
    chances = Forest.load(tmp_path / "forest.npz").chances(rows)
    assert chances == pytest.approx(1 / (1 + np.exp([-21.0, -12.0])))


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.exists(), reason=f"no real pages at {SHARED}")
def test_training_makes_the_shipped_forest() -> None:
    from data_pipeline.extract.train import fit, read_examples

    made, shipped = fit(read_examples(SHARED)), Forest.load(SHIPPED)
    assert made.root.tolist() == shipped.root.tolist()
    assert made.feature.tolist() == shipped.feature.tolist()
    assert made.threshold.tolist() == shipped.threshold.tolist()
    assert made.leaf == pytest.approx(shipped.leaf, abs=1e-6)
