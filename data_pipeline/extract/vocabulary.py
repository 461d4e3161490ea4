"""What the block parser knows of HTML and of the words that sites name their elements with."""

from collections import deque
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray


class Kind(IntEnum):
    """What an element does to the text around it."""

    INLINE = 0
    BLOCK = 1
    BREAK = 2
    RAW = 3  # its content is no markup, and no text of the page
    SKIP = 4  # markup whose text a reader does not see
    VOID = 5
    ROOT = 6


def names(line: str) -> tuple[str, ...]:
    return tuple(line.split())


# Tags a classifier tells apart; others of a kind share number 0 or 1.
OTHER_INLINE, OTHER_BLOCK = 0, 1
BLOCK_TAGS = names(
    "p div section article main aside nav header footer h1 h2 h3 h4 h5 h6 ul ol li dl dt dd menu "
    "table caption thead tbody tfoot tr td th form fieldset legend button details summary dialog "
    "figure figcaption blockquote pre address center hgroup"
)
INLINE_TAGS = names("a b strong em i span time")
BREAK_TAGS = names("br hr")
RAW_TAGS = names("script style textarea title iframe noframes noembed xmp")
SKIP_TAGS = names("noscript template svg select object video audio canvas datalist")
VOID_TAGS = names("img input")
ROOT_TAGS = names("html head body")

KINDS = {
    **dict.fromkeys(BLOCK_TAGS, Kind.BLOCK),
    **dict.fromkeys(INLINE_TAGS, Kind.INLINE),
    **dict.fromkeys(BREAK_TAGS, Kind.BREAK),
    **dict.fromkeys(RAW_TAGS, Kind.RAW),
    **dict.fromkeys(SKIP_TAGS, Kind.SKIP),
    **dict.fromkeys(VOID_TAGS, Kind.VOID),
    **dict.fromkeys(ROOT_TAGS, Kind.ROOT),
}
TAGS = {name: number for number, name in enumerate(KINDS, OTHER_BLOCK + 1)}
TAG_KINDS = np.array([Kind.INLINE, Kind.BLOCK, *KINDS.values()], dtype=np.uint8)

# One line is one meaning. A space is the edge of a word, so that " ad " is not found in "head".
MEANINGS = """
article|artikel|beitrag
content|inhalt|contenido|contenu
body
entry
 post|post 
story
main
 text|text |txt|prose|richtext|wysiwyg|copy 
paragraph
intro| lead |lede|standfirst|summary|abstract|excerpt|vorspann| dek 
caption|legend|bildunterschrift
title|titel|headline|heading|kicker|overline
author|byline|autor|writer
 date| time|timestamp|publish|datum
image|photo|picture|figure| img|bild|foto
gallery|slide|carousel|swiper
video|player|audio|podcast
quote|zitat
product|shop|cart|price|preis|buy
description|detail|spec 
review|rating|vote
forum|thread|topic|message
question|answer|reply
comment|kommentar|disqus|respond
share|sharing|teilen
social|facebook|twitter|whatsapp|instagram
 nav|navi|navbar
menu
breadcrumb
footer|footnav
header|masthead
sidebar|side-bar|sidebar|aside| rail|secondary
widget|module| box 
related|similar|verwandt|weitere|readmore|read-more| more 
recommend|suggest|outbrain|taboola
popular|trending|most|latest|ticker|recent
promo|sponsor|teaser
 ad | ads | adv|advert|werbung|anzeige|dfp|commercial
banner
newsletter|subscri|signup|paywall|abo 
login|register|account|user|profile
cookie|consent|gdpr|privacy|datenschutz
modal|popup|overlay|dialog|lightbox|tooltip
 tag | tags|tagged|keyword
categor|rubrik|section 
pagina|pager| prev| next
copyright|legal|disclaimer|imprint|impressum|license
skip|hidden|hide|visually|sr only|screen reader|invisible
search|suche
form |input|field
button|btn|cta 
toolbar|tools|actions|print|drucken|download
note|footnote|reference|citation|correction
 bio |about|contact|kontakt
card|tile|grid
list 
item
feed|stream
link
credit|source|quelle|agency
 toc |contents|index
 map|weather|wetter|calendar|event
 logo|brand|icon
""".strip("\n").split("\n")
LETTERS = 27
EDGE = 0


FNV_START, FNV_PRIME = 14695981039346656037, 1099511628211


def fnv1a(name: str) -> int:
    """64-bit FNV-1a hash (Fowler, Noll, Vo)."""
    value = FNV_START
    for byte in name.encode():
        value = (value ^ byte) * FNV_PRIME & (1 << 64) - 1
    return value


def tag_table(slots: int = 256) -> tuple[NDArray[np.uint64], NDArray[np.uint8]]:
    """Hashes and numbers of the known tags, by linear probing from hash modulo `slots`."""
    keys = np.zeros(slots, dtype=np.uint64)
    numbers = np.zeros(slots, dtype=np.uint8)
    for name, number in TAGS.items():
        slot = fnv1a(name) % slots
        while keys[slot]:
            slot = (slot + 1) % slots
        keys[slot], numbers[slot] = fnv1a(name), number
    return keys, numbers


def meaning_automaton() -> tuple[NDArray[np.int32], NDArray[np.uint64]]:
    """The automaton of Aho and Corasick (1975) over a-z and the edge of a word.

    Returns:
        the next state by (state, letter), and the meanings found on reaching a state, as bits.
    """
    children: list[dict[int, int]] = [{}]
    found = [0]
    for bit, meaning in enumerate(MEANINGS):
        for word in meaning.split("|"):
            state = 0
            for letter in word.replace("-", " "):
                code = EDGE if letter == " " else ord(letter) - ord("a") + 1
                if code not in children[state]:
                    children.append({})
                    found.append(0)
                    children[state][code] = len(children) - 1
                state = children[state][code]
            found[state] |= 1 << bit
    following = np.zeros((len(children), LETTERS), dtype=np.int32)
    fallback = [0] * len(children)
    queue = deque([0])
    while queue:
        state = queue.popleft()
        for code in range(LETTERS):
            child = children[state].get(code)
            otherwise = int(following[fallback[state], code]) if state else 0
            if child is None:
                following[state, code] = otherwise
                continue
            following[state, code] = child
            fallback[child] = otherwise
            found[child] |= found[otherwise]
            queue.append(child)
    return following, np.array(found, dtype=np.uint64)
