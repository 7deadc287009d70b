"""What holds of a scheduler between steps, whatever has come to it."""

from collections.abc import Iterable
from itertools import pairwise

from moe_nvfp4.engine.scheduler import Scheduler, Sequence


def check(scheduler: Scheduler, sequences: Iterable[Sequence] = ()) -> None:
    """Raises AssertionError. `sequences`: also, that none of these is lost."""
    memory, running, waiting = scheduler.memory, scheduler.running, scheduler.waiting
    memory.check()
    slots = [s.slot for s in running] + list(scheduler._lent) + scheduler._free_slots
    assert sorted(slots) == list(range(scheduler.limits.slots)), "a slot is lost, or in two hands"
    for queue in (running, waiting):
        assert all(a.order < b.order for a, b in pairwise(queue)), "sequences are out of order"
    holders = [[0] * pool.count for pool in memory.pools]
    for holder in (*(s.memory for s in running), *scheduler._lent.values()):
        assert holder is not None
        for counts, table in zip(holders, holder.tables, strict=True):
            for page in table:
                if page >= 0:
                    counts[page] += 1
    for counts, pool in zip(holders, memory.pools, strict=True):
        assert pool._holders == counts, "a page is held by nobody that runs, or not by somebody who does"
    places = {id(s) for s in running}, {id(s) for s in waiting}
    for sequence in sequences:
        found = sum(id(sequence) in place for place in places) + sequence.done
        assert found == 1, f"sequence {sequence.ident} is in {found} places"
