"""Who keeps whom waiting."""

import json
from collections.abc import Callable, Iterator, Sequence

import pytest

from parallel.verdict import Answer, first_of, who_has_not_arrived


def answer(what: str, *ranks: int) -> Answer:
    return Answer(what, ranks, step=7, phase="optimizer", silent_s=31.4)


REDUCE = "all_reduce (axis tp, ranks 0, 1)"


def test_ranks_outside_of_collectives_keep_those_inside_waiting() -> None:
    answers = {0: answer(REDUCE, 0, 1), 2: answer("read (a.py:1)"), 1: answer("work (b.py:2)")}
    assert who_has_not_arrived(0, answers) == [
        (1, "has not arrived: it is in work (b.py:2) at step 7 (optimizer, for 31 s)"),
        (2, "has not arrived: it is in read (a.py:1) at step 7 (optimizer, for 31 s)"),
    ]


def test_it_makes_no_difference_who_asks() -> None:
    answers = {0: answer("read (a.py:1)"), 1: answer(REDUCE, 0, 1)}
    assert who_has_not_arrived(0, answers) == who_has_not_arrived(1, answers)


def test_ranks_in_other_collectives_are_followed() -> None:
    answers = {
        0: answer(REDUCE, 0, 1),
        1: answer("barrier (all ranks)", 0, 1, 2),
        2: answer("send (ranks 2, 3)", 2, 3),
        3: answer("send (ranks 2, 3)", 2, 3),
    }
    assert [rank for rank, _ in who_has_not_arrived(0, answers)] == [1, 0, 2]


def test_where_two_wait_for_each_other_both_are_named_whoever_asks() -> None:
    answers = {0: answer(REDUCE, 0, 1), 1: answer("barrier (all ranks)", 0, 1)}
    for asking in (0, 1):
        assert {rank for rank, _ in who_has_not_arrived(asking, answers)} == {0, 1}


def test_ranks_in_one_collective_are_not_to_blame() -> None:
    answers = {rank: answer(REDUCE, 0, 1) for rank in (0, 1)}
    assert who_has_not_arrived(0, answers) == []


def test_where_nobody_waits_all_are_named() -> None:
    answers = {0: answer("compute (a.py:1)"), 1: answer("compute (a.py:1)")}
    told = who_has_not_arrived(1, answers)
    assert [rank for rank, _ in told] == [0, 1]
    assert all(text.startswith("waits for no other rank: it is in compute") for _, text in told)


def test_a_long_list_is_cut() -> None:
    assert first_of([str(n) for n in range(10)]) == "0; 1; 2; 3; 4; 5; 6; 7; and 2 more"
    assert first_of(["a"]) == "a"


class CountedRanks(tuple):
    """Ranks that count how often one of them is looked at."""

    looked_at = 0

    def __iter__(self) -> Iterator[int]:
        for rank in super().__iter__():
            CountedRanks.looked_at += 1
            yield rank


COUNT = 4096
EVERYONE = CountedRanks(range(COUNT))


def in_barrier(rank: int) -> Answer:
    return Answer("barrier (all ranks)", EVERYONE, 7, "optimizer", 31.4)


def in_numbered(rank: int) -> Answer:
    return Answer(f"all_reduce {rank} (all ranks)", EVERYONE, 7, "optimizer", 31.4)


def in_pair(rank: int) -> Answer:
    pair = CountedRanks((rank - rank % 2, rank - rank % 2 + 1))
    return Answer(f"send {rank // 2}", pair, 7, "optimizer", 31.4)


@pytest.mark.parametrize(
    ("first", "second", "late"),
    [
        (COUNT // 2, in_pair, range(COUNT // 2, COUNT)),
        (COUNT - 1, in_pair, [COUNT - 1, COUNT - 2]),
        (1, in_numbered, [*range(1, COUNT), 0]),
    ],
)
def test_the_work_grows_with_the_ranks_and_not_with_their_square(
    first: int, second: Callable[[int], Answer], late: Sequence[int]
) -> None:
    answers = {rank: (in_barrier if rank < first else second)(rank) for rank in range(COUNT)}
    CountedRanks.looked_at = 0
    assert [rank for rank, _ in who_has_not_arrived(0, answers)] == list(late)
    assert CountedRanks.looked_at <= 4 * COUNT


def test_an_answer_arrives_as_it_was_sent_and_is_short_for_any_number_of_ranks() -> None:
    for ranks in ((), (5,), (0, 1, 3), range(2, 4096, 8), range(4096)):
        sent = answer("all_reduce", *ranks)
        arrived = Answer.from_json(sent.to_json())
        assert (arrived.what, tuple(arrived.ranks)) == (sent.what, sent.ranks)
        assert len(sent.to_json()) < 150
        assert json.loads(sent.to_json())["step"] == arrived.step == 7
