"""Lists of sites and of words that nobody wants to train on."""

import functools
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

from pydantic import model_validator

from data_pipeline.errors import DataError
from data_pipeline.hygiene.listed import FileSettings, Finding, read_lines
from data_pipeline.quality.phrases import Phrases, by_first_word, find_phrases, words_of

SCHEME = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
DOMAIN = re.compile(r"(?:[^\W_](?:[\w-]{0,61}\w)?\.)*[^\W_](?:[\w-]{0,61}\w)?")
SHOWN = 5


class UrlBlocklist(FileSettings):
    """Drop the pages of listed sites.

    An entry `example.com` blocks this domain and those below it, `example.com/users/joe` the
    addresses that begin so, on this host alone. Schemes, letter case and ports of hosts do not
    matter; a name beyond ASCII may be written as it reads or encoded (xn--).
    """

    def load(self) -> "Sites":
        return _load_sites(self.files, self.sha256)

    def judge(self, url: str) -> Finding | None:
        """Why the page of an address is dropped, None where it is not."""
        sites = self.load()
        host, path = _split(url)
        domain = host
        while domain:
            if domain in sites.domains:
                return Finding("blocklist.domain", domain)
            domain = domain.partition(".")[2]
        for prefix in sites.prefixes.get(host, ()):
            if path.startswith(prefix):
                return Finding("blocklist.url", host + prefix)
        return None


class WordBlocklist(FileSettings):
    """Drop texts with listed words or phrases, whole ones in any letter case.

    Attributes:
        min_entries: so many different entries of the list are enough; null for no such limit.
        min_share: such a share of all words of the text is enough; null for no such limit.
    """

    min_entries: int | None
    min_share: float | None

    @model_validator(mode="after")
    def _has_a_limit(self) -> "WordBlocklist":
        if self.min_entries is None and self.min_share is None:
            raise ValueError("drops nothing; give min_entries, min_share or both")
        if self.min_entries is not None and self.min_entries < 1:
            raise ValueError(f"min_entries = {self.min_entries} is impossible; allowed: 1 or more")
        if self.min_share is not None and not 0 < self.min_share <= 1:
            raise ValueError(f"min_share = {self.min_share} is impossible; allowed: above 0, to 1")
        return self

    def load(self) -> "Phrases":
        return _load_phrases(self.files, self.sha256)

    def judge(self, text: str) -> Finding | None:
        """Why a text is dropped, None where it is not."""
        words = words_of(text)
        found: dict[str, None] = {}
        listed = 0
        end = 0  # of the words that are counted already
        for place, phrase in find_phrases(words, self.load()):
            found[" ".join(phrase)] = None
            listed += max(0, place + len(phrase) - max(place, end))
            end = max(end, place + len(phrase))
        enough = self.min_entries is not None and len(found) >= self.min_entries
        too_many = self.min_share is not None and listed >= self.min_share * len(words)
        if not found or not (enough or too_many):
            return None
        shown = ", ".join(list(found)[:SHOWN]) + (", ..." if len(found) > SHOWN else "")
        return Finding(
            "blocklist.words",
            f"{len(found)} listed, {listed / len(words):.2%} of {len(words)} words: {shown}",
        )


class Sites(NamedTuple):
    """Blocked domains, and for each host the beginnings of its blocked paths."""

    domains: frozenset[str]
    prefixes: Mapping[str, tuple[str, ...]]


@functools.lru_cache(maxsize=2)
def _load_sites(files: tuple[Path, ...], hashes: tuple[str, ...]) -> Sites:
    domains: set[str] = set()
    prefixes: defaultdict[str, list[str]] = defaultdict(list)
    for file, sha256 in zip(files, hashes, strict=True):
        for entry, place in read_lines(file, sha256):
            if len(entry.split()) > 1:
                raise DataError(f"{place}: {entry!r:.80} has a space; write one entry a line")
            host, path = _split(entry.removeprefix("*").removeprefix("."))
            if not DOMAIN.fullmatch(host):
                raise DataError(
                    f"{place}: {entry!r:.80} is neither a domain (example.com) nor the beginning "
                    "of an address (example.com/users/joe)"
                )
            if path in ("", "/") and not SCHEME.match(entry):
                domains.add(host)
            else:
                prefixes[host].append(path)
    return Sites(frozenset(domains), {host: tuple(paths) for host, paths in prefixes.items()})


@functools.lru_cache(maxsize=2)
def _load_phrases(files: tuple[Path, ...], hashes: tuple[str, ...]) -> Phrases:
    entries: list[str] = []
    for file, sha256 in zip(files, hashes, strict=True):
        for entry, place in read_lines(file, sha256):
            if not words_of(entry):
                raise DataError(f"{place}: {entry!r:.80} has no word")
            entries.append(entry)
    return by_first_word(entries)


def _split(url: str) -> tuple[str, str]:
    """The host of an address, in lower case and as it reads, and what follows it."""
    rest = SCHEME.sub("", url.strip(), count=1)
    end = next((place for place, letter in enumerate(rest) if letter in "/?#"), len(rest))
    host = rest[:end].rpartition("@")[2]
    host = re.sub(r":\d*$", "", unquote(host)).strip(".").lower()
    if "xn--" in host:
        host = ".".join(map(_decode, host.split(".")))
    return host, rest[end:]


def _decode(label: str) -> str:
    """A label of a domain as it reads (RFC 3492), or as it is where it cannot be decoded."""
    if not label.startswith("xn--"):
        return label
    try:
        return label[4:].encode().decode("punycode").lower()
    except UnicodeError:
        return label
