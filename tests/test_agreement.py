"""One decision in all processes: when a run saves, and when it stops."""

import os
import signal
import time

from conftest import processes

from synco import signals
from synco.run import Agreement


def _agree(rank, moments):
    """Rank 1 hears a warning before a step → for each such step, what each process is told after its steps."""
    found = []
    for moment in moments:
        agreement = Agreement(every=5)
        found.append([])
        with signals.listening():
            for step in range(1, 12):
                if rank == 1 and step == moment:
                    os.kill(os.getpid(), signal.SIGTERM)
                due = agreement.after(step, at_once=step == 11)
                found[-1].append((due.save, due.stop))
                if due.stop:
                    break
        agreement.meet()
    return found


def test_all_processes_stop_at_one_step():
    moments = (1, 4, 11)
    one, other = processes(2, _agree, moments)
    assert one == other
    for moment, (*before, last) in zip(moments, one, strict=True):
        assert last == (True, True) and len(before) + 1 == min(moment + 1, 11)
        assert before == [(step % 5 == 0, False) for step in range(1, len(before) + 1)]


def test_one_process_decides_by_itself():
    agreement = Agreement(every=2, minutes=0)
    assert [agreement.after(step).save for step in (1, 2, 3, 4)] == [False, True, False, True]
    due = agreement.after(5, share=True)
    assert (due.save, due.stop, due.share) == (False, False, True)
    agreement = Agreement(minutes=0.001)
    time.sleep(0.1)
    assert agreement.after(1).save
    agreement.saved()
    assert not agreement.after(2).save
