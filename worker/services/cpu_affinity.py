"""One core: the threads of a worker stay on one, and move together.

Python runs one thread of a process at a time. Spread over several cores, a thread that gives Python's lock away to read
or write finds it taken when it comes back, for another one was woken on an idle core meanwhile; with 64 threads, that
takes four tenths of a worker's CPU. On one core, it has the lock back before another one runs.
"""

import os
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from pathlib import Path

import structlog

from worker.services.service import Service

log = structlog.get_logger(__name__)

WINDOW = 0.5  # seconds in which the cores are watched
MIN_INTERVAL, MAX_INTERVAL = (
    1.0,
    4.0,
)  # seconds between looks, by the dice: those who share a core must not leave it together
FULL = 0.1  # idle for less of the time
OURS = 0.8  # of a core: who gets as much has it nearly alone
GAIN = 0.15  # of a core: what a move must promise

Ticks = dict[int, tuple[int, int]]  # by core: how long it has been idle, and how long it has been at all


def is_supported() -> bool:
    """Whether this system lets a process choose its cores: Linux does, macOS does not."""
    return hasattr(os, "sched_setaffinity")


class CpuAffinity(Service):
    """Holds all threads of this process on one core; on a better one where others need this one too."""

    name = "one-core"

    def __init__(self, dice: Callable[[], float], ticks: Callable[[], Ticks]) -> None:
        super().__init__()
        self._dice = dice
        self._ticks = ticks
        self._core = -1  # none yet
        self._allowed: set[int] = set()

    def run_once(self) -> bool:
        self.interval = MIN_INTERVAL + (MAX_INTERVAL - MIN_INTERVAL) * self._dice()
        core, allowed = self._core, os.sched_getaffinity(0)
        if allowed != {core}:  # at the start, and where an operator or the container has changed it
            core, self._allowed = _current_core(allowed), allowed
        elif (found := better_core(core, *self._watch(), self._dice())) is not None:
            log.debug("moved_to_another_core", core=found)
            core = found
        _pin_threads({core})  # also those threads that have come since
        self._core = core
        return False

    def close(self) -> None:
        """Where this process goes on without a worker, it may use all cores again."""
        with suppress(OSError):  # the container has other cores by now
            if self._allowed:
                _pin_threads(self._allowed)

    def _watch(self) -> tuple[dict[int, float], float]:
        """What part of the time each core that we may use was idle, and how much of a core we used."""
        began, used, before = time.monotonic(), time.process_time(), self._ticks()
        self._stopping.wait(WINDOW)
        took, used, after = time.monotonic() - began, time.process_time() - used, self._ticks()
        passed = {core: (after[core][0] - before[core][0], after[core][1] - before[core][1]) for core in self._allowed}
        return {core: idle / max(ticks, 1) for core, (idle, ticks) in passed.items()}, used / took

    def _log_failure(self, error: Exception) -> None:
        log.warning("not_on_one_core", error=type(error).__name__)


def better_core(core: int, idle: Mapping[int, float], ours: float, dice: float) -> int | None:
    """A core to move to: where this one has no time left, others use it too, and that one has time.

    ``idle``: by core, what part of the time it was; ``ours``: what part of a core this process used.
    """
    if idle[core] >= FULL or ours >= OURS:
        return None
    found = [other for other, free in idle.items() if free >= idle[core] + GAIN]
    return found[int(dice * len(found))] if found else None


def _current_core(allowed: Collection[int]) -> int:
    """The core on which the kernel has put the main thread."""
    core = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[36])
    return core if core in allowed else min(allowed)


def _pin_threads(cores: Collection[int]) -> None:
    for thread in os.listdir("/proc/self/task"):
        with suppress(ProcessLookupError):  # it has just ended
            os.sched_setaffinity(int(thread), cores)


def read_core_ticks() -> Ticks:
    """Since the machine has started. Source: proc(5), /proc/stat."""
    found = {}
    for name, *fields in map(str.split, Path("/proc/stat").read_text().splitlines()):
        if name.startswith("cpu") and name != "cpu":
            ticks = [int(field) for field in fields[:8]]  # user, nice, system, idle, iowait, irq, softirq, steal
            found[int(name.removeprefix("cpu"))] = ticks[3] + ticks[4], sum(ticks)
    return found
