"""A meeting of all ranks before weights are gathered, which tells a call that rank 0 makes alone from a slow rank.

Gathering under ZeRO 3 takes every rank. Where rank 0 alone calls a function that gathers, it would wait for the process
group's time-out, half an hour or more. Here ranks first meet in the process group's store, which costs milliseconds.
"""

import time

import torch.distributed as dist

from utils.distributed.ranks import global_rank, world_size
from utils.errors import UserError

# Seconds that rank 0 waits for the first of the others. All ranks leave a step or an evaluation together, by its
# collectives, so what lies between is what a rank does by itself before a save: far less, and the process that reports
# is rank 0. As soon as one other rank is here the call is evidently everyone's, and the rest may take as long as any
# collective may. The others wait that long for rank 0 from the start: it may be busy, and can't be missing.
PATIENCE = 45.0
PAUSE = 0.02

_met = 0  # meetings that this rank has been at, which number the next one


def meet(place: str, elsewhere: str | None = None, patience: float = PATIENCE) -> bool:
    """Wait until every rank has come to `place`, the name of the function that calls this.

    Args:
        elsewhere: another place; rank 0 does not wait for ranks that are all there.
        patience: seconds that rank 0 waits for the first of the others.

    Returns:
        True where all ranks are here; False on rank 0 where the others have met at `elsewhere` and wait for it there.

    Raises:
        UserError: rank 0 is here alone.
    """
    global _met
    if world_size() == 1:
        return True
    store, meeting = dist.distributed_c10d._get_default_store(), f"meeting/{_met}"
    here, there, complete = f"{meeting}/{place}", f"{meeting}/{elsewhere}", f"{meeting}/{place}/complete"
    if store.add(here, 1) == world_size():
        store.set(complete, "")
    if global_rank() > 0:
        store.wait([complete])
    elif not _wait_on_rank_0(store, here, there, complete, patience):
        store.add(here, -1)
        if not store.check([complete]):  # nobody came in that moment
            if store.add(there, 0) == world_size() - 1:
                return False
            raise UserError(_alone(place, elsewhere, patience))
    _met += 1
    return True


def _wait_on_rank_0(store: dist.Store, here: str, there: str, complete: str, patience: float) -> bool:
    """Return whether all have come here; False where the others are there, or none has come in time."""
    start = time.monotonic()
    while not store.check([complete]):
        if store.add(there, 0) == world_size() - 1:
            return False
        is_alone = store.add(here, 0) == 1
        if time.monotonic() - start > (patience if is_alone else store.timeout.total_seconds()):
            return False
        time.sleep(PAUSE)
    return True


def _alone(place: str, elsewhere: str | None, patience: float) -> str:
    either = f", or call {elsewhere} on every rank after it" if elsewhere else ""
    return (
        f"{place} was called on rank 0, and in {patience:.0f} s on no other of the {world_size()} ranks. Under ZeRO 3 "
        f"each rank holds a part of every weight: call {place} on every rank (rank 0 alone writes files)"
        f"{either}."
    )
