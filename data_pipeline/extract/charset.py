"""Decode a page whose declared character encoding may be missing or wrong."""

import codecs
import re

from resiliparse.parse.encoding import bytes_to_str, detect_encoding, map_encoding_to_html5

META_CHARSET = re.compile(
    rb"<meta[^>]{0,200}?charset\s*=\s*[\"']?\s*([\w.:-]{2,40})", re.IGNORECASE
)
META_BYTES = 4096
BYTE_ORDER_MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
MULTI_BYTE = frozenset(
    {"shift_jis", "euc_jp", "iso2022_jp", "gbk", "gb18030", "big5", "euc_kr", "utf-16-le"}
)
ISO_2022_ESCAPE = b"\x1b$"
MAX_INVALID_SHARE = 0.05


def decode(body: bytes, declared: str | None) -> str:
    """Decode `body` with the first encoding its own bytes confirm.

    UTF-8 and the multi-byte East Asian encodings confirm themselves: other text does not decode
    as one of them. Single-byte encodings decode anything, so their declaration is believed last.

    Args:
        declared: the charset of the Content-Type header; the page's own <meta> comes second.
    """
    encoding = _encoding_of(body, declared)
    return str(bytes_to_str(body, encoding, errors="replace", fallback_encodings=[]))


def _encoding_of(body: bytes, declared: str | None) -> str:
    for mark, encoding in BYTE_ORDER_MARKS.items():
        if body.startswith(mark):
            return encoding
    if _is_utf8(body) and ISO_2022_ESCAPE not in body:
        return "utf-8"
    named = [encoding for encoding in (_known(declared), _known(_meta_charset(body))) if encoding]
    detected = _known(detect_encoding(body)) or "utf-8"
    for encoding in [*named, detected]:
        if encoding in MULTI_BYTE and _decodes(body, encoding):
            return encoding
    single_byte = [encoding for encoding in named if encoding not in MULTI_BYTE | {"utf-8"}]
    return single_byte[0] if single_byte else detected


def _is_utf8(body: bytes) -> bool:
    """Whether nearly every byte outside ASCII belongs to a UTF-8 sequence."""
    if _decodes(body, "utf-8"):
        return True
    beyond_ascii = len(body) - len(body.decode("ascii", "ignore"))
    invalid = body.decode("utf-8", "replace").count("\ufffd")
    return invalid <= MAX_INVALID_SHARE * beyond_ascii


def _decodes(body: bytes, encoding: str) -> bool:
    """Whether `body` decodes, save for a character cut at its end."""
    try:
        codecs.getincrementaldecoder(encoding)().decode(body)
    except UnicodeDecodeError:
        return False
    return True


def _meta_charset(body: bytes) -> str | None:
    match = META_CHARSET.search(body, 0, META_BYTES)
    return match[1].decode("ascii", "replace") if match else None


def _known(name: str | None) -> str | None:
    """Python's name of the encoding that browsers take a label for, or None."""
    if not name:
        return None
    try:
        return codecs.lookup(str(map_encoding_to_html5(name))).name
    except (LookupError, ValueError):
        return None
