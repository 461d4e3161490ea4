"""From a crawled page to its main text."""

import re
from typing import Literal, get_args

from resiliparse.extract.html2text import extract_plain_text
from resiliparse.parse.html import HTMLTree

from data_pipeline.crawl import Page
from data_pipeline.extract.charset import decode
from data_pipeline.extract.guards import binary_kind, is_nested_beyond, looks_like_html

Mode = Literal["fast", "accurate"]
MODES: tuple[Mode, ...] = get_args(Mode)

# libxml2, under trafilatura, gives up on deeper trees.
MAX_DEPTH = 250
# resiliparse takes about 0.15 us per element and level above it (one core).
MAX_DEPTH_TIMES_ELEMENTS = 10_000_000

CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ufeff]")
SPACES = re.compile(r" {2,}")
BLANK_LINES = re.compile(r"\n{3,}")


class ExtractError(Exception):
    """A page without text: `reason` is what the audit row says."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)  # both, so that it pickles
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        return self.detail


def extract_text(page: Page, mode: Mode = "fast") -> str:
    """The main text of a page: one line per block, no control characters.

    `fast` classifies blocks of text, `accurate` is trafilatura, a twelfth as fast. A page
    nested too deeply for either is flattened to all of its visible text.

    Raises:
        ExtractError: reason `binary`, `parser` or `no text`.
    """
    if kind := binary_kind(page.body):
        raise ExtractError("binary", f"the body is {kind}")
    decoded = decode(page.body, page.charset).replace("\0", "")
    try:
        text = _tidy(_main_text(decoded, mode) if _is_html(page) else decoded)
    except Exception as error:  # third-party parsers on hostile input: one page, never the run
        raise ExtractError("parser", f"{type(error).__name__}: {error}") from error
    if not text:
        raise ExtractError("no text", "the page has no main text")
    return text


def _is_html(page: Page) -> bool:
    if page.content_type is None:
        return looks_like_html(page.body)
    return page.content_type != "text/plain"


def _main_text(html: str, mode: Mode) -> str:
    if mode == "fast":
        from data_pipeline.extract.main_content import main_text  # loads compiled code

        return main_text(html)
    tree = HTMLTree.parse(html)
    if is_nested_beyond(tree, MAX_DEPTH, MAX_DEPTH_TIMES_ELEMENTS):
        return str(extract_plain_text(tree, main_content=False, alt_texts=False))
    return _trafilatura(html)


def _trafilatura(html: str) -> str:
    import trafilatura  # half a second to import, wasted on `fast`

    return trafilatura.extract(html, include_comments=False) or ""


def _tidy(text: str) -> str:
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\t", " ").replace("\u00a0", " ")
    text = SPACES.sub(" ", CONTROL_CHARACTERS.sub("", text)).replace(" \n", "\n")
    return BLANK_LINES.sub("\n\n", text).strip()
