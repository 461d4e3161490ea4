"""What reaches a person is masked, what only looks like it stays, and no text takes for ever."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from data_pipeline.hygiene.privacy import Privacy, find_personal
from tests.unit.data_pipeline.hygiene import cases

ALL = Privacy(email="<EMAIL>", ip_address="<IP>", phone="<PHONE>", card="<CARD>")
PAGE = """Write to ann@example.org or bob@example.org, call +49 30 901820 or (212) 555-0123,
pay by 4111 1111 1111 1111; edits by 93.184.216.34 and 2606:4700:4700::1111 on 2014-05-12."""


def test_every_kind_is_masked_and_counted() -> None:
    masked = ALL.mask(PAGE)
    assert masked.text == (
        "Write to <EMAIL> or <EMAIL>, call <PHONE> or <PHONE>,\n"
        "pay by <CARD>; edits by <IP> and <IP> on 2014-05-12."
    )
    assert masked.counts == {"email": 2, "ip_address": 2, "phone": 2, "card": 1}


def test_a_kind_without_a_mask_stays() -> None:
    only_email = ALL.model_copy(update={"ip_address": None, "phone": None, "card": None})
    masked = only_email.mask(PAGE)
    assert masked.text == PAGE.replace("ann@example.org", "<EMAIL>").replace(
        "bob@example.org", "<EMAIL>"
    )
    assert masked.counts == {"email": 2, "ip_address": 0, "phone": 0, "card": 0}


@pytest.mark.parametrize("mask", ["", " ", "a\nb"])
def test_a_mask_that_nobody_sees_is_refused(mask: str) -> None:
    with pytest.raises(ValidationError, match="null leaves what is there"):
        Privacy(email=mask, ip_address=None, phone=None, card=None)


@pytest.mark.parametrize("kind", cases.KINDS)
def test_precision_and_recall_on_the_formats(kind: str) -> None:
    score = cases.score(kind)
    assert score.right >= 25
    assert score.precision >= 0.95
    assert score.recall >= 0.95


def test_places_are_of_characters_behind_letters_of_all_sizes() -> None:
    text = "é語😀\ud800 ann@example.org 93.184.216.34"
    assert ALL.mask(text).text == "é語😀\ud800 <EMAIL> <IP>"


@given(st.text(alphabet="a1.@:-+() \n4fF9/é語", max_size=60))
def test_the_text_around_the_masks_is_kept(text: str) -> None:
    rest, at = ALL.mask(text).text, 0
    for start, stop, kind in sorted(cases.masked_places(text)):
        before, _, rest = rest.partition({"ip_address": "<IP>"}.get(kind, f"<{kind.upper()}>"))
        assert before == text[at:start]
        at = stop
    assert rest == text[at:]


def test_no_address_is_missed_behind_the_shortest_runs_of_digits() -> None:
    text = "1.1.1.\n" * 20
    assert ALL.mask(f"{text}Ask 93.184.216.34").text == f"{text}Ask <IP>"


HOSTILE = """
a@|1-|::|1.|a.|01 |+49 |(|1|4111 |2001:|a@a.|"@a.com |-|1   |93.184.216.34 |\
212-555-0123 |a@a-|1.1.1.\n|tel 
"""


@pytest.mark.parametrize("piece", HOSTILE.strip().split("|"))
def test_time_grows_no_faster_than_the_text(piece: str) -> None:
    """A quarter of a megabyte and four of them; a quadratic pattern takes sixteen times as long."""
    list(find_personal(piece))
    short, long = (seconds(piece * (size // len(piece))) for size in (1 << 18, 1 << 20))
    assert long < max(0.5, 10 * short)


def seconds(text: str) -> float:
    """CPU time, the least of two tries, so that other processes matter little."""
    tries = []
    for _ in range(2):
        start = time.process_time()
        list(find_personal(text))
        tries.append(time.process_time() - start)
    return min(tries)
