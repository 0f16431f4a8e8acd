"""Stop a run on a signal: signals are noted, and all ranks agree on the step after which they stop."""

import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from types import FrameType

import torch
import torch.distributed as dist

from utils.distributed.ranks import is_rank_0

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


class StopRequest:
    """Signals ask the run to stop; a second SIGINT stops it at once.

    They are SIGTERM, SIGINT (Ctrl-C), SIGUSR1 (SLURM's warning), and SIGHUP (the terminal is gone), but where `nohup`
    has that ignored.
    """

    def __init__(self, timeout_seconds: int, is_busy: Callable[[], bool] = lambda: False) -> None:
        """Begin to note signals.

        Args:
            timeout_seconds: how long ranks wait for each other.
            is_busy: asked along with each answer, see `all_idle`.
        """
        self.all_idle = True  # whether no rank was busy when the answer of `agreed` was asked for; the same on all
        self._is_busy = is_busy
        self.received: str | None = None  # the signal this rank got
        self._interrupts = 0
        self._process = os.getpid()
        self._over = False
        self._pending: tuple[dist.Work, torch.Tensor] | None = None
        # The flag travels over the hosts: on the device, reading it would make every step wait for the GPU.
        several = dist.is_initialized() and dist.get_world_size() > 1
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_seconds)) if several else None
        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # Ctrl-C reaches the reader of data too, which was forked from the run and ends with it
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        if self.received is None:
            self.received = signal.Signals(number).name
            if is_rank_0():
                # Not print: the signal may have come in the middle of one.
                what = "the training is done, saving goes on" if self._over else "stopping after this step"
                with suppress(OSError):  # a terminal that is gone
                    os.write(sys.stdout.fileno(), f"\n{self.received}: {what} ...\n".encode())

    def agreed(self) -> bool:
        """Whether to stop here; the same answer on all ranks, each of which must call it equally often.

        Each call sends this rank's flag on its way and answers with those of the call before, so none waits for
        a message in flight.
        """
        if self._group is None:
            self.all_idle = not self._is_busy()
            return self.received is not None
        answer = self._collect()
        flags = torch.tensor([int(self.received is not None), int(self._is_busy())])
        self._pending = dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self._group, async_op=True), flags
        return answer

    def _collect(self) -> bool:
        if self._pending is None:
            return False
        work, flags = self._pending
        work.wait()
        self._pending = None
        stops, busy = flags.tolist()
        self.all_idle = not busy
        return bool(stops)

    def close(self) -> None:
        """End the requests: a signal that arrives after the training does not interrupt saving."""
        self._collect()
        self._over = True
