"""Standard output and error that nobody reads: their pipe is full, and each thread that logs waits.

A process that is to end does not wait with them. What it still writes is dropped.
"""

import os
import select
import signal
import sys
import time
from collections.abc import Sequence

from worker import gevent_support

STANDARD_OUTPUTS = (1, 2)  # file descriptors
PATIENCE = 5.0  # seconds in which a reader may take something
INTERVAL = 0.5
_WAKE = signal.SIGURG  # ignored by default, and used by nobody else
_WRITERS = ("logging", "worker.celery")  # modules whose functions write to these outputs


def allow_interruption() -> None:
    """Makes it possible to interrupt a write: signals do so only if they have a handler. For the main thread."""
    signal.signal(_WAKE, lambda *_: None)


def is_full(descriptor: int) -> bool:
    """Whether a write would wait for a reader."""
    poll = gevent_support.unpatched("select", "poll")()
    poll.register(descriptor, select.POLLOUT)
    return not poll.poll(0)


def drop_when_full(descriptors: Sequence[int] = STANDARD_OUTPUTS, patience: float = PATIENCE) -> None:
    """Begins to watch outputs. One that stays full for ``patience`` seconds leads nowhere from then on.

    The watch is a thread of the system, also under gevent, where a write stops all greenlets.
    """
    gevent_support.unpatched("_thread", "start_new_thread")(_watch, (list(descriptors), patience))


def _watch(descriptors: list[int], patience: float) -> None:
    sleep = gevent_support.unpatched("time", "sleep")
    writable_at = dict.fromkeys(descriptors, time.monotonic())
    while writable_at:
        for descriptor, at in list(writable_at.items()):
            if not is_full(descriptor):
                writable_at[descriptor] = time.monotonic()
            elif time.monotonic() - at >= patience:
                _lead_nowhere(descriptor)
                del writable_at[descriptor]
        sleep(INTERVAL)


def _lead_nowhere(descriptor: int) -> None:
    """Points a file descriptor to /dev/null. Python repeats a write that a signal interrupts, then to there."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)
    for thread, frame in sys._current_frames().items():
        if frame.f_globals.get("__name__") in _WRITERS:
            signal.pthread_kill(thread, _WAKE)
