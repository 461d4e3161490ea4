"""What a crawl holds besides good pages: site furniture, near-copies, other languages, junk."""

import random
import re
from dataclasses import dataclass

from data_pipeline.sample.library import LibraryPage
from data_pipeline.sample.sentences import SENTENCES

BODY = re.compile(r"<body[^>]*>(.*)</body>", re.DOTALL | re.IGNORECASE)
TEXT_OR_TAG = re.compile(r"(<[^>]*>)")
WORD = re.compile(r"\b[a-z]{4,}\b")
SITES = ("docs.example.org", "reference.example.net", "manuals.example.com", "library.example.edu")
TOPICS = ("Home", "Tutorials", "Reference", "Downloads", "Community", "Blog", "Search", "About")
SPAM = ("cheap", "best", "price", "online", "buy", "discount", "tickets", "hotel", "casino", "free")


@dataclass(frozen=True)
class Fetch:
    """One HTTP response to be; `planted` says what kind of document it is."""

    planted: str
    url: str
    body: bytes
    status: str = "200 OK"
    content_type: str = "text/html; charset=utf-8"


def original(page: LibraryPage, rng: random.Random) -> Fetch:
    """A documentation page inside the furniture of a site."""
    site = rng.choice(SITES)
    return Fetch("page", f"https://{site}/{page.name}.html", _furnished(page.html, site, rng))


def mirror(page: LibraryPage, rng: random.Random) -> Fetch:
    """The same text at another address, inside other furniture."""
    site = f"mirror{rng.randrange(100)}.example.org"
    url = f"http://{site}/{page.name}.html?ref={rng.randrange(10**6)}"
    return Fetch("mirror", url, _furnished(page.html, site, rng))


def edited(page: LibraryPage, rng: random.Random) -> Fetch:
    """One word in two hundred replaced: Jaccard similarity of 5-grams about 0.95."""
    pieces = TEXT_OR_TAG.split(page.html)
    vocabulary = WORD.findall(page.html)[:500] or ["word"]

    def replace(match: re.Match[str]) -> str:
        return rng.choice(vocabulary) if rng.random() < 0.005 else match[0]

    html = "".join(piece if piece.startswith("<") else WORD.sub(replace, piece) for piece in pieces)
    site = rng.choice(SITES)
    url = f"https://{site}/latest/{page.name}.html"
    return Fetch("edited", url, _furnished(html, site, rng))


def shortened(page: LibraryPage, rng: random.Random) -> Fetch:
    """The last tenth cut off."""
    keep = int(len(page.html) * rng.uniform(0.90, 0.97))
    html = page.html[: page.html.rindex("<", 0, keep)] + "</body></html>"
    site = rng.choice(SITES)
    url = f"https://{site}/print/{page.name}.html"
    return Fetch("shortened", url, _furnished(html, site, rng))


def foreign(language: str, rng: random.Random) -> Fetch:
    """A page of shuffled sentences in another language."""
    sentences = list(SENTENCES[language])
    paragraphs = []
    for _ in range(4):
        rng.shuffle(sentences)
        paragraphs.append(f"<p>{' '.join(sentences[:6])}</p>")
    html = f"<html><body><h1>{sentences[0]}</h1>{''.join(paragraphs)}</body></html>"
    url = f"https://{language}.example.org/{rng.getrandbits(40):010x}.html"
    return Fetch(f"language {language}", url, html.encode())


def empty(rng: random.Random) -> Fetch:
    return Fetch("empty", f"https://{rng.choice(SITES)}/{rng.getrandbits(40):010x}", b"")


def not_found(rng: random.Random) -> Fetch:
    url = f"https://{rng.choice(SITES)}/{rng.getrandbits(40):010x}.html"
    body = b"<html><body><h1>Not found</h1><p>The page you asked for is not here.</p></body></html>"
    return Fetch("not found", url, body, status="404 Not Found")


def binary(rng: random.Random) -> Fetch:
    url = f"https://{rng.choice(SITES)}/files/{rng.getrandbits(40):010x}"
    return Fetch("binary", url, rng.randbytes(rng.randrange(2_000, 20_000)))


def spam(rng: random.Random) -> Fetch:
    """A few keywords over and over."""
    words = rng.sample(SPAM, 4)
    text = " ".join(rng.choice(words) for _ in range(rng.randrange(200, 600)))
    url = f"http://{'-'.join(words[:2])}.example.biz/{rng.randrange(10**6)}"
    return Fetch("spam", url, f"<html><body><p>{text}</p></body></html>".encode())


JUNK = (empty, not_found, binary, spam)
COPIES = (mirror, edited, shortened)


def _furnished(html: str, site: str, rng: random.Random) -> bytes:
    topics = rng.sample(TOPICS, 5)
    links = "".join(f'<li><a href="/{topic.lower()}">{topic}</a></li>' for topic in topics)
    match = BODY.search(html)
    content = match[1] if match else html
    page = (
        f"<!DOCTYPE html><html><head><title>{site}</title></head><body>"
        f'<nav class="menu"><ul>{links}</ul></nav>'
        '<div class="cookie-banner" role="dialog">This site uses cookies. '
        "<button>Accept</button></div>"
        f"<main>{content}</main>"
        f'<footer class="footer">Copyright {rng.randrange(2001, 2026)} {site}. '
        f'<a href="/privacy">Privacy policy</a></footer></body></html>'
    )
    return page.encode("utf-8", "replace")
