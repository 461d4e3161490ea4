"""Mask what reaches a person or an account: emails, IP addresses, phone and card numbers.

A compiled pass over a text finds runs of digits that could be a number; only these, and what is
around an `@` or a `::`, are held against the formats. No pattern repeats without a bound, so that
the time is linear in the text.

Not found: addresses written out ("joe at example dot com"), local parts that begin with one of
`#%&'*+^~-` or have `/=?{|}` or a backtick in them (these are markup and URLs far more often), phone
numbers in letters (1-800-FLOWERS) or in national forms that a price or a date also has, unless a
word such as "phone" is before them, and private, reserved and documentation IP addresses.
"""

import functools
import ipaddress
import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import field_validator

from data_pipeline.compiled import compiled
from data_pipeline.hygiene.numbers import find_cards, find_phones
from data_pipeline.quality.verdict import Thresholds
from data_pipeline.quality.words import IDEOGRAPHS

DIGIT, SEPARATOR = 1, 2
SEPARATORS = " -./()\u00a0\u202f\u2010\u2011\u2012\u2013"
DOT, PLUS, BRACKET, ZERO, COLON = map(ord, ".+(0:")
LONGEST_SEPARATOR = 3
FEWEST_DIGITS = 7
DOTS_OF_AN_ADDRESS = 3
COLONS_OF_AN_ADDRESS = 6  # with the last two groups as an IPv4 address
LONGEST_GROUP = 4
Span = tuple[int, int]

LOCAL_OCTETS, DOMAIN_OCTETS = 64, 255  # RFC 5321, section 4.5.3.1
LABEL = r"[^\W_](?:[^\W_]|-(?!\.)){0,62}"
TOP_LEVEL = r"(?:xn--[0-9A-Za-z-]{1,59}|[A-Za-z]{2,63}(?![0-9A-Za-z])|[^\W\d_a-zA-Z][^\W\d_]{1,62})"
LITERAL = r"\[(?:IPv6:[0-9A-Fa-f:.]{2,45}|\d{1,3}(?:\.\d{1,3}){3})\]"
AT_DOMAIN = re.compile(rf"@(?:(?:{LABEL}\.){{1,9}}{TOP_LEVEL}|{LITERAL})")
ATOM = rf"(?:[^\W{IDEOGRAPHS}]|[!#$%&'*+^~-])+"
# From the `@` backwards. An atom next to Chinese or Japanese has no space before it.
REVERSED_LOCAL = re.compile(
    rf"{ATOM}(?:\.{ATOM})*|[{IDEOGRAPHS}]+|" r'"(?:["\\]\\|[^"\\\r\n]){1,62}"'
)
MARKUP = "#%&'*+^~-"
FILE_TYPES = frozenset(
    ["bmp", "css", "gif", "html", "ico", "jpeg", "jpg", "js", "json", "pdf", "php", "png", "svg"]
)

OCTET = r"(?:25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)"
IPV4 = re.compile(rf"(?<![\w.])(?<![^\W\d_]-)(?<![^\W\d_]/)(?:{OCTET}\.){{3}}{OCTET}(?!\w|\.\w)")
IPV6 = re.compile(
    r"(?<![\w:.])(?:[23][0-9A-F]{3}:|(?:::|(?:0{1,4}:){5})ffff:)[0-9A-F:.]{1,41}(?![\w:])", re.I
)
GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")  # RFC 4291, section 2.4; IANA has no other
# Of a hundred addresses one has fewer numbers from 32 on, of section and version numbers most do.
LARGE_NUMBER, LARGE_NUMBERS = 32, 2
CONTEXT = 24
IS_ADDRESS = re.compile(r"(?:\bip(?:v4)?\b[^\n]{0,16}|://|\baddress\W{0,3}|\bping )$", re.I)
IS_NUMBERING = re.compile(
    r"(?:§|(?<![^\W\d_])(?:v|ver|vers|versi\w+|верси\w+|version\w*|release|rev|revision|build|"
    r"firmware|driver|software|update|patch|sec|sect|section|chapter|clause|article|art|fig|figure|"
    r"table|appendix|annex|para|paragraph|item|step|part|rule|oid|abschnitt|kapitel|"
    r"secci[oó]n|раздел)|版本|第)\W{0,3}$",
    re.I,
)


class Masked(NamedTuple):
    """A text with its masks, and how many of each kind of `Privacy` stand in it."""

    text: str
    counts: dict[str, int]


class Privacy(Thresholds):
    """What is written in place of each kind; null leaves the kind as it is.

    IP addresses are masked where anybody can reach them (IANA's global ones), cards where issuer,
    length and check digit are right.
    """

    email: str | None
    ip_address: str | None
    phone: str | None
    card: str | None

    @field_validator("*")
    @classmethod
    def _is_one_line(cls, mask: str | None) -> str | None:
        if mask is not None and (not mask.strip() or not mask.isprintable()):
            raise ValueError(f"mask {mask!r} is empty or not printable; null leaves what is there")
        return mask

    def mask(self, text: str) -> Masked:
        """Replace what is found, longest from the left where two kinds claim a place."""
        masks = self.model_dump()
        found = [
            (start, -stop, kind)
            for start, stop, kind in find_personal(text)
            if masks[kind] is not None
        ]
        if not found:
            return Masked(text, dict.fromkeys(masks, 0))
        pieces: list[str] = []
        counts = Counter(dict.fromkeys(masks, 0))
        end = 0
        for start, stop, kind in sorted(found):
            if start >= end:
                pieces += text[end:start], masks[kind]
                counts[kind] += 1
                end = -stop
        return Masked("".join(pieces) + text[end:], dict(counts))


def find_personal(text: str) -> Iterator[tuple[int, int, str]]:
    """Where something personal stands and its kind, a field of `Privacy`; kinds may overlap."""
    if "@" in text:
        yield from ((*span, "email") for span in find_emails(text))
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    runs, has_ipv6 = _find_runs(codes, _kinds())
    if has_ipv6:
        yield from ((*span, "ip_address") for span in find_ipv6(text))
    for start, stop in runs.tolist():
        yield from ((*span, "ip_address") for span in find_ipv4(text, start, stop))
        yield from ((*span, "card") for span in find_cards(text, start, stop))
        yield from ((*span, "phone") for span in find_phones(text, start, stop))


def find_emails(text: str) -> Iterator[Span]:
    """Addresses of RFC 5322, section 3.4.1, and RFC 6531 that have a domain of two labels."""
    for match in AT_DOMAIN.finditer(text):
        at = match.start()
        local = REVERSED_LOCAL.match(text[max(0, at - LOCAL_OCTETS - 2) : at][::-1])
        if local is None:
            continue
        size = len(local[0][::-1].lstrip(MARKUP))
        start = at - size
        if (
            0 < size <= LOCAL_OCTETS
            and match.end() - at <= DOMAIN_OCTETS
            and text[start - 1 : start] != "@"  # a name in the fediverse: @joe@example.social
            and match[0].rpartition(".")[2].lower() not in FILE_TYPES
        ):
            yield start, match.end()


def find_ipv4(text: str, start: int = 0, stop: int | None = None) -> Iterator[Span]:
    """Global addresses in dotted decimals, without leading zeros (RFC 3986, section 3.2.2)."""
    stop = len(text) if stop is None else stop
    for match in IPV4.finditer(text, start, min(len(text), stop + 2)):
        before = text[max(0, match.start() - CONTEXT) : match.start()]
        large = sum(int(octet) >= LARGE_NUMBER for octet in match[0].split("."))
        if (
            (large >= LARGE_NUMBERS or IS_ADDRESS.search(before))
            and not IS_NUMBERING.search(before)
            and _is_global(match[0])
        ):
            yield match.span()


def find_ipv6(text: str) -> Iterator[Span]:
    """Global unicast addresses in the forms of RFC 4291, section 2.2."""
    for match in IPV6.finditer(text):
        address = match[0].rstrip(".")
        if address.endswith(":") and not address.endswith("::"):
            address = address[:-1]
        if _is_global(address):
            yield match.start(), match.start() + len(address)


@functools.lru_cache(maxsize=4096)
def _is_global(address: str) -> bool:
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed.ipv4_mapped is None:
            return parsed in GLOBAL_UNICAST and parsed.is_global
        parsed = parsed.ipv4_mapped
    return parsed.is_global and not parsed.is_multicast


@functools.cache
def _kinds() -> NDArray[np.uint8]:
    """The kind of each character up to the last one that has any, else 0."""
    members = {DIGIT: "0123456789", SEPARATOR: SEPARATORS}
    kinds = np.zeros(max(map(ord, SEPARATORS)) + 1, np.uint8)
    for kind, characters in members.items():
        kinds[[ord(character) for character in characters]] = kind
    return kinds


@compiled
def _end_of_run(
    codes: NDArray[np.uint32], kinds: NDArray[np.uint8], i: int
) -> tuple[int, int, int]:
    """Where a run from digit i on stops, its digits, and its dots behind one and before another."""
    stop = i
    digits = dots = 0
    while i < len(codes) and i - stop <= LONGEST_SEPARATOR and codes[i] < len(kinds):
        kind = kinds[codes[i]]
        if kind == DIGIT:
            digits += 1
            dots += codes[stop] == DOT
            stop = i + 1
        elif kind != SEPARATOR:
            break
        i += 1
    return stop, digits, dots


@compiled
def _find_runs(
    codes: NDArray[np.uint32], kinds: NDArray[np.uint8]
) -> tuple[NDArray[np.int64], bool]:
    """Runs [n, 2] of digits and what separates them, and whether an IPv6 address is possible.

    A run has as many digits as a phone number or as many dots between digits as an IPv4 address.
    """
    # The shortest has seven characters, seven digits or four with three dots between them, and what
    # is behind a run is no digit, so begins no other: n of them take 8n - 1 characters at least.
    runs = np.empty((len(codes) // 8 + 1, 2), np.int64)
    found = colons = i = 0
    last_colon = -1
    has_ipv6 = False
    while i < len(codes):
        if not ZERO <= codes[i] <= COLON:  # nine follows zero, and the colon follows nine
            i += 1
            continue
        if codes[i] == COLON:
            has_ipv6 |= last_colon == i - 1
            colons = colons + 1 if i - last_colon <= LONGEST_GROUP + 1 else 1
            has_ipv6 |= colons >= COLONS_OF_AN_ADDRESS
            last_colon = i
            i += 1
        else:
            start = i - 1 if i and (codes[i - 1] == PLUS or codes[i - 1] == BRACKET) else i
            stop, digits, dots = _end_of_run(codes, kinds, i)
            if digits >= FEWEST_DIGITS or dots >= DOTS_OF_AN_ADDRESS:
                runs[found, 0], runs[found, 1] = start, stop
                found += 1
            i = stop
    return runs[:found], has_ipv6
