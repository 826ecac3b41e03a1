"""The guard: which processes count as gone, what it asks the store, and that it ends its process."""

import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT

from synco import exits, guard
from synco.distributed import Process


class Counting:
    """A store that counts the requests made to it."""

    def __init__(self, store):
        self.store, self.requests = store, []

    def __getattr__(self, name):
        self.requests.append(name)
        return getattr(self.store, name)


class Ended(Exception):
    pass


@pytest.fixture
def guards(monkeypatch):
    """guards(n, seconds) → n guards of one store that look when told to; each raises Ended(its line) at its end."""

    def ended(line):
        raise Ended(line)

    monkeypatch.setattr(guard, "_end", ended)
    monkeypatch.setattr(guard.Guard, "_watch_others", lambda self: None)
    store = dist.HashStore()
    return lambda n, seconds=8: [
        (guard.Guard(Process(rank, n, rank, n), False, seconds), Counting(store)) for rank in range(n)
    ]


def look(guards, ranks, beats, seen):
    for beat in beats:
        for rank in ranks:
            guards[rank][0]._look(seen[rank], beat)


def test_a_process_counts_as_gone_after_its_first_sign_of_life_alone(guards):
    three, seen = guards(3), [{}, {}, {}]
    for one, store in three[:2]:
        one.watch(store)
    look(three, [0, 1], range(1, 30), seen)  # rank 2 comes late
    three[2][0].watch(three[2][1])
    look(three, [0, 1, 2], range(30, 50), seen)
    look(three, [0, 2], range(50, 57), seen)  # rank 1 is silent, and is back in time
    look(three, [1, 0, 2], range(57, 60), seen)
    with pytest.raises(Ended, match="^lost rank 1: no sign of life for 8 s$"):
        look(three, [0, 2], range(60, 70), seen)
    with pytest.raises(Ended, match="None"):  # which rank 0 says
        look(three, [2], range(70, 72), seen)


def test_a_process_that_never_comes_ends_the_others_at_last(guards):
    two, seen = guards(2), [{}, {}]
    two[0][0].watch(two[0][1])
    with pytest.raises(Ended, match="^lost rank 1: never came$"):
        look(two, [0], range(1, 10**4), seen)
    assert two[0][1].requests.count("set") in range(1750, 1850)  # one a second, for half an hour


def test_a_look_takes_as_many_requests_however_many_processes_there_are(guards):
    found = []
    for n in (2, 50):
        many, seen = guards(n), [{} for _ in range(n)]
        for one, store in many:
            one.watch(store)
        look(many, range(n), [1], seen)
        many[0][1].requests.clear()
        look(many, range(n), [2], seen)
        found.append(many[0][1].requests)
    assert found == [["set", "multi_get"]] * 2


def test_the_first_that_fails_speaks(guards):
    two = guards(2)
    assert two[1][0].claim(2) == 2 and two[0][0].claim(2) is None  # before they have met: the first of the node
    for one, store in two:
        one.watch(store)
    assert [two[1][0].claim(1), two[0][0].claim(2), two[1][0].claim(1)] == [None, 1, None]


def test_a_store_that_goes_with_its_launcher_is_not_what_is_said(monkeypatch):
    """The launcher has the store: that it has gone says who sees that, whatever is seen first."""

    class Gone:
        def check(self, keys):
            raise RuntimeError("Connection reset by peer")

    def ended(line):
        raise Ended(line)

    monkeypatch.setattr(guard, "_end", ended)
    monkeypatch.setattr(guard.Guard, "INTERVAL", 0.01)
    monkeypatch.setattr(guard.Guard, "NOTICE", 0.0)
    one = guard.Guard(Process(), True, 8)
    one.store = Gone()
    with pytest.raises(Ended, match="^lost the process that holds the others together$"):
        one._watch_others()
    one.parent = -1  # another one than it has now
    assert one._watch_others() is None
    with pytest.raises(Ended, match="^the launcher has gone$"):
        one.run()


ORPHANED = """
import time
from synco import distributed, exits
from synco.guard import Guard
guard = Guard(distributed.Process(), True, 40)
guard.parent = -1  # another one than it has now
exits.open_output()
print("waiting", flush=True)
guard.start()
time.sleep(20)
"""


def test_a_process_ends_that_cannot_even_say_that_its_launcher_has_gone():
    """Who read its output has gone as well."""
    words = [sys.executable, "-c", ORPHANED]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "waiting\n"
    process.stderr.close()
    process.stdout.close()
    assert process.wait(60) == 1


def test_ranks_are_told_in_words():
    assert guard.ranks([1]) == "rank 1" and guard.ranks([1, 3]) == "ranks 1, 3"


@pytest.mark.parametrize(
    "error, status, line",
    [
        (SystemExit(0), 0, ""),
        (SystemExit(), 0, ""),
        (SystemExit("why"), 1, "why"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (MemoryError(), 1, None),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 "
         "GiB of which 1.75 GiB is free. Including non-PyTorch\nmemory, this"), 1, "CUDA out of memory. Tried to "
         "allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1.75 GiB is free: lower --batch-size or "
         "--img-size; --amp bf16 takes about half"),
        (RuntimeError("DataLoader worker 3 died.\nmore"), 1, "DataLoader worker 3 died. The run can go on from its "
         "last checkpoint."),
    ],
)  # fmt: skip
def test_what_ends_a_program_has_a_status_and_a_line(error, status, line):
    assert exits.outcome(error) == (status, line)
