"""Asking thousands of ranks through a real store; one connection answers for all of them."""

import os
import socket
from collections import Counter
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from parallel.inquiry import ANSWER_POLLS, Inquiry, Verdict
from parallel.verdict import Answer

SIZE = 2000
ASKER = 7
OTHERS = [rank for rank in range(SIZE) if rank != ASKER]
IN_BARRIER = Answer("barrier (all ranks)", range(SIZE), 3, "optimizer", 300.0)
READING = Answer("read (stream.py:212)", (), 3, "data", 301.0)

Answering = tuple[Iterable[int], Answer]


@pytest.fixture
def store() -> dist.Store:
    master = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    return dist.PrefixStore("lost_rank", master)


class AskersStore:
    """The asker's connection, which counts requests; before some of its polls, ranks answer."""

    def __init__(self, store: Any, answers: dict[int, list[Answering]]) -> None:
        self.requests: Counter[str] = Counter()
        self._store = store
        self._ranks = store.clone()
        self._answers = answers

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._store, name)

        def counted(*arguments: Any) -> Any:
            self.requests[name] += 1
            if name == "add":
                for ranks, answer in self._answers.get(self.requests[name], []):
                    self._let_answer(list(ranks), answer)
            return call(*arguments)

        return counted

    def _let_answer(self, ranks: list[int], answer: Answer) -> None:
        self._ranks.wait([f"call/{rank}" for rank in ranks], timedelta(minutes=5))
        keys = [f"answer/{rank}" for rank in ranks]
        self._ranks.multi_set(keys, [answer.to_json()] * len(ranks))
        self._ranks.add("answers", len(ranks))


def introduce(store: Any, ranks: Iterable[int], host: str = "node", pid: int = 1) -> None:
    keys = [f"process/{rank}" for rank in ranks]
    store.multi_set(keys, [f"{host} {pid}"] * len(keys))


def ask(
    store: Any, answers: dict[int, list[Answering]], poll_s: float = 0.001
) -> tuple[Verdict, Counter[str]]:
    """The verdict, and how often what was asked of the store.

    Args:
        answers: who answers what before which poll.
    """
    askers = AskersStore(store, answers)
    return Inquiry(askers, ASKER, SIZE, poll_s).ask(IN_BARRIER, "noticed"), askers.requests


def all_but(*ranks: int) -> list[int]:
    return [rank for rank in OTHERS if rank not in ranks]


def test_of_two_thousand_ranks_the_one_that_has_not_arrived_is_named(store: Any) -> None:
    introduce(store, range(SIZE))
    verdict, _ = ask(store, {1: [([1234], READING), (all_but(1234), IN_BARRIER)]})
    assert verdict == Verdict(
        "rank 1234 (process 1 on node) has not arrived: it is in read (stream.py:212) at step 3 "
        "(data, for 301 s); noticed",
        SIZE - 1,
    )
    assert Inquiry(store, 0, SIZE).wait_for_verdict() == verdict


def test_those_that_do_not_answer_are_named_whether_or_not_they_have_introduced_themselves(
    store: Any,
) -> None:
    introduce(store, [rank for rank in range(SIZE) if rank != 300])
    verdict, _ = ask(store, {1: [(all_but(0, 300, 1999), IN_BARRIER)]})
    stopped = "does not answer (stopped, or cut off)"
    assert verdict == Verdict(
        f"rank 0 (process 1 on node) {stopped}; rank 300 {stopped}; "
        f"rank 1999 (process 1 on node) {stopped}; noticed",
        SIZE - 4,
    )


def test_ranks_that_are_dead_or_failed_are_not_waited_for(store: Any) -> None:
    introduce(store, range(SIZE))
    done = os.fork()
    if done == 0:
        os._exit(0)
    os.waitpid(done, 0)
    introduce(store, [5], socket.gethostname(), done)
    Inquiry(store, 9, SIZE).report_failure("ValueError: no such shard")
    verdict, requests = ask(store, {1: [(all_but(5, 9), IN_BARRIER)]})
    assert verdict.text == (
        "rank 9 (process 1 on node) failed: ValueError: no such shard; "
        f"rank 5 (process {done} on {socket.gethostname()}) is dead; noticed"
    )
    assert requests["add"] < ANSWER_POLLS


@pytest.mark.parametrize("silent", [(), (0, 300, 1999)])
def test_the_requests_do_not_grow_with_the_ranks(store: Any, silent: tuple[int, ...]) -> None:
    introduce(store, range(SIZE))
    _, requests = ask(store, {1: [(all_but(*silent), IN_BARRIER)]})
    polls = requests.pop("add")
    assert polls <= ANSWER_POLLS + 1
    # Between polls it looks now and then whether those that are silent are dead.
    assert requests.total() < 20 + polls


def test_answers_that_come_slowly_are_waited_for(store: Any) -> None:
    introduce(store, range(SIZE))
    # Each just before the asker would give up.
    polls = [ANSWER_POLLS - 1, 2 * ANSWER_POLLS - 2]
    slow = {poll: [(OTHERS[n::2], IN_BARRIER)] for n, poll in enumerate(polls)}
    verdict, _ = ask(store, slow)
    assert verdict.answered == SIZE - 1
    assert verdict.text.startswith("all ranks answer, and none is elsewhere")


def test_a_rank_on_its_own_waits_for_nobody(store: Any) -> None:
    verdict = Inquiry(store, 0, 1).ask(READING, "noticed")
    assert verdict.answered == 0
    assert verdict.text.startswith("rank 0 waits for no other rank: it is in read")


def test_one_rank_asks_and_a_store_that_answers_is_heard(store: Any) -> None:
    first, second = (Inquiry(store, rank, SIZE) for rank in (4, 3))
    assert [first.asker(), second.asker(), first.asker()] == [4, 4, 4]
    assert (first.heard, second.heard) == (2, 1)
