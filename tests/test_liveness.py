"""Which ranks count as lost, at any time that one likes to tell."""

import os

import pytest

from hvd_lars.health.heartbeats import Heartbeats, Position, describe


def heartbeats_of(ranks=3, rank_timeout=10.0, stall_timeout=60.0):
    heartbeats = Heartbeats(rank_timeout, stall_timeout, now=0.0)
    for rank in range(ranks):
        heartbeats.received(rank, "here", 100 + rank, Position(0, "", 0), 0.0)
    return heartbeats


def tell(heartbeats, ranks, now, ticks=0):
    for rank in ranks:
        heartbeats.received(rank, "here", 100 + rank, Position(ticks, "data", ticks), now)


def test_a_silent_rank_is_named_after_its_time_and_not_before():
    heartbeats = heartbeats_of()
    for second in range(1, 11):
        tell(heartbeats, [0, 2], second, ticks=second)
        assert heartbeats.check(second) == ([], False)
    tell(heartbeats, [0, 2], 11, ticks=11)
    assert heartbeats.check(11) == ([1], False)


def test_ranks_that_all_wait_stand_still_and_one_that_works_does_not():
    heartbeats = heartbeats_of(stall_timeout=20.0)
    for second in range(1, 20):
        tell(heartbeats, [0, 1], second)
        tell(heartbeats, [2], second, ticks=second)
        assert heartbeats.check(second) == ([], False)
    for second in range(20, 41):
        tell(heartbeats, [0, 1], second)
        tell(heartbeats, [2], second, ticks=19)
        assert heartbeats.check(second) == ([], second == 40)


def test_who_was_suspended_with_the_others_blames_nobody():
    heartbeats = heartbeats_of(stall_timeout=60.0)
    assert heartbeats.check(1.0) == ([], False)
    assert heartbeats.check(5000.0) == ([], False)
    tell(heartbeats, [0, 1], 5001.0, ticks=1)
    assert heartbeats.check(5004.0) == ([], False)


@pytest.mark.parametrize(("alive", "state"), [(True, "in state R"), (False, "is gone")])
def test_a_process_here_is_looked_at(alive, state, monkeypatch):
    pid = os.getpid() if alive else 2**22 + 1  # the second is above what Linux gives
    monkeypatch.setattr("socket.gethostname", lambda: "here")
    heartbeats = heartbeats_of(0)
    known = heartbeats.received(0, "here", pid, Position(7, "backward", 1), 1.0)
    known.stack = "a.py:1 f\nb.py:2 g"
    text = describe(3, known)
    assert f"rank 3 (host here, pid {pid}): 7 steps done, then in backward" in text
    assert state in text
    assert text.splitlines()[1:] == ["    a.py:1 f", "    b.py:2 g"]
    known.host = "elsewhere"
    assert "the process" not in describe(3, known)
