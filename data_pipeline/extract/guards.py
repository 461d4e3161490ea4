"""Cheap looks at a body before a parser sees it."""

import re
from collections import Counter

SNIFF_BYTES = 4096
MAX_CONTROL_SHARE = 0.02
MAGIC_NUMBERS = {
    b"%PDF-": "PDF",
    b"PK\x03\x04": "ZIP",
    b"\x89PNG": "PNG",
    b"GIF8": "GIF",
    b"\xff\xd8\xff": "JPEG",
    b"RIFF": "RIFF",
    b"\x7fELF": "ELF",
    b"\xd0\xcf\x11\xe0": "OLE",
    b"Rar!": "RAR",
    b"7z\xbc\xaf": "7z",
    b"ID3": "MP3",
    b"OggS": "Ogg",
    b"wOF": "font",
}
BYTE_ORDER_MARKS = (b"\xff\xfe", b"\xfe\xff")
CONTROL_CODES = bytes(code for code in range(32) if code not in b"\0\t\n\f\r\x1b") + b"\x7f"

HTML_TAG = re.compile(rb"<(?:!doctype|html|head|body|title|meta|div|p|table|h1|a|script)\b", re.I)
TAG_NAME = re.compile(r"<(/?)([a-z][a-z0-9-]*)", re.IGNORECASE)
VOID_ELEMENTS = "area base br col embed hr img input link meta source track wbr"
# HTML ends these itself before a sibling of their kind: they do not nest.
SELF_CLOSING = "li p td th tr dt dd option optgroup thead tbody tfoot colgroup rt rp"
NOT_NESTING = frozenset(f"{VOID_ELEMENTS} {SELF_CLOSING}".split())


def binary_kind(body: bytes) -> str | None:
    """What binary format a body is in, or None where it can be text."""
    start = body[:SNIFF_BYTES]
    for magic, kind in MAGIC_NUMBERS.items():
        if start.startswith(magic):
            return kind
    if start.startswith(BYTE_ORDER_MARKS):
        return None
    controls = len(start) - len(start.translate(None, CONTROL_CODES))
    return "binary data" if controls > MAX_CONTROL_SHARE * len(start) else None


def looks_like_html(body: bytes) -> bool:
    """Whether a body of no declared type has an HTML tag near its start."""
    return HTML_TAG.search(body, 0, SNIFF_BYTES) is not None


def nesting(html: str, *, ignore_below: int) -> tuple[int, int]:
    """Upper bounds of a page's element depth and of its number of elements.

    A page with fewer than `ignore_below` start tags is not scanned: its depth is at most that.
    """
    elements = html.count("<") - html.count("</")
    if elements < ignore_below:
        return elements, elements
    open_elements: Counter[str] = Counter()
    depth = deepest = 0
    for match in TAG_NAME.finditer(html):
        name = match[2].lower()
        if name in NOT_NESTING:
            continue
        if not match[1]:
            open_elements[name] += 1
            depth += 1
            deepest = max(deepest, depth)
        elif open_elements[name]:
            open_elements[name] -= 1
            depth -= 1
    return deepest, elements
