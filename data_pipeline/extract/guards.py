"""Cheap looks at a body before a parser, or a reader of its tree, spends time on it."""

import re

from resiliparse.parse.html import DOMContext, HTMLTree, traverse_dom

SNIFF_BYTES = 4096
MAX_CONTROL_SHARE = 0.02
MAGIC_NUMBERS = {
    b"%PDF-": "PDF",
    b"PK\x03\x04": "ZIP",
    b"\x89PNG": "PNG",
    b"\xff\xd8\xff": "JPEG",
    b"\x7fELF": "ELF",
    b"\xd0\xcf\x11\xe0": "OLE",
    b"7z\xbc\xaf": "7z",
}
# Words of a text too: a control code follows soon where they are more.
SPELLED_MAGIC_NUMBERS = {
    b"GIF8": "GIF",
    b"RIFF": "RIFF",
    b"Rar!": "RAR",
    b"ID3": "MP3",
    b"OggS": "Ogg",
    b"wOF": "font",
}
SPELLED_MAGIC_BYTES = 64
BYTE_ORDER_MARKS = (b"\xff\xfe", b"\xfe\xff")
CONTROL_CODES = bytes(code for code in range(32) if code not in b"\0\t\n\f\r\x1b") + b"\x7f"

HTML_TAG = re.compile(rb"<(?:!doctype|html|head|body|title|meta|div|p|table|h1|a|script)\b", re.I)


class _TooDeepError(Exception):
    """Ends a walk through a tree."""


def binary_kind(body: bytes) -> str | None:
    """What binary format a body is in, or None where it can be text."""
    start = body[:SNIFF_BYTES]
    for magic, kind in MAGIC_NUMBERS.items():
        if start.startswith(magic):
            return kind
    near = start[:SPELLED_MAGIC_BYTES]
    if len(near.translate(None, CONTROL_CODES + b"\0")) < len(near):
        for magic, kind in SPELLED_MAGIC_NUMBERS.items():
            if start.startswith(magic):
                return kind
    if start.startswith(BYTE_ORDER_MARKS):
        return None
    controls = len(start) - len(start.translate(None, CONTROL_CODES))
    return "binary data" if controls > MAX_CONTROL_SHARE * len(start) else None


def looks_like_html(body: bytes) -> bool:
    """Whether a body of no declared type has an HTML tag near its start."""
    return HTML_TAG.search(body, 0, SNIFF_BYTES) is not None


def is_nested_beyond(tree: HTMLTree, depth: int, depth_times_elements: int) -> bool:
    """Whether the parser's own tree is deeper, or larger for its depth, than a reader of it bears.

    Tags cannot tell: which of them open or close an element only the parser decides.
    """
    root = tree.document and tree.document.first_element_child
    if root is None:
        return False
    elements = len(root.get_elements_by_tag_name("*")) + 1
    if elements <= depth and elements**2 <= depth_times_elements:
        return False
    visited = deepest = 0

    def visit(context: DOMContext) -> None:
        nonlocal visited, deepest
        visited += 1
        deepest = max(deepest, context.depth)
        if deepest > depth or deepest * visited > depth_times_elements:
            raise _TooDeepError

    try:
        traverse_dom(root, visit, elements_only=True)
    except _TooDeepError:
        return True
    return False
