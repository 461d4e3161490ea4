"""Who keeps whom waiting."""

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
    assert [rank for rank, _ in who_has_not_arrived(0, answers)] == [1, 2]


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
