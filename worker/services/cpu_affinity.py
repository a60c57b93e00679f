"""CPU affinity: all threads of a worker stay on one core, and move to another core together.

Python runs one thread of a process at a time. On several cores, a thread that releases the GIL to read or write finds
it taken when it returns, because another thread was woken on an idle core meanwhile. With 64 threads this costs 40 % of
a worker's CPU. On one core, the thread has the GIL back before another one runs.
"""

import os
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from pathlib import Path

import structlog

from worker.services.service import Service

log = structlog.get_logger(__name__)

WINDOW = 0.5  # seconds of one measurement of the cores' load
# Seconds between measurements, drawn at random: workers that share a core must not leave it together.
MIN_INTERVAL, MAX_INTERVAL = 1.0, 4.0
FULL = 0.1  # a core that is idle for less of the time is full
OWN_CORE = 0.8  # of a core: a process that gets this much has the core nearly to itself
MIN_GAIN = 0.15  # of a core: a move must promise this much more idle time

Ticks = dict[int, tuple[int, int]]  # by core: ticks that it was idle, and ticks in total


def is_supported() -> bool:
    """Whether a process can choose its cores on this system: on Linux, but not on macOS."""
    return hasattr(os, "sched_setaffinity")


class CpuAffinity(Service):
    """Pins all threads of this process to one core, and moves them when other processes need that core."""

    name = "one-core"

    def __init__(self, dice: Callable[[], float], ticks: Callable[[], Ticks]) -> None:
        """dice: returns numbers in [0, 1); ticks: reads the ticks of all cores."""
        super().__init__()
        self._dice = dice
        self._ticks = ticks
        self._core = -1  # not pinned yet
        self._allowed: set[int] = set()

    def run_once(self) -> bool:
        self.interval = MIN_INTERVAL + (MAX_INTERVAL - MIN_INTERVAL) * self._dice()
        core, allowed = self._core, os.sched_getaffinity(0)
        if allowed != {core}:  # at the start, or after an operator or the container changed it
            core, self._allowed = _current_core(allowed), allowed
        elif (better := better_core(core, *self._measure(), self._dice())) is not None:
            log.debug("moved_to_another_core", core=better)
            core = better
        _pin_threads({core})  # new threads included
        self._core = core
        return False

    def close(self) -> None:
        """Gives the process all its cores back: an embedded worker ends before its process."""
        with suppress(OSError):  # the container has other cores now
            if self._allowed:
                _pin_threads(self._allowed)

    def _measure(self) -> tuple[dict[int, float], float]:
        """Measures during WINDOW: the share of time that each allowed core was idle, and the cores that we used."""
        began, used, before = time.monotonic(), time.process_time(), self._ticks()
        self._stopping.wait(WINDOW)
        took, used, after = time.monotonic() - began, time.process_time() - used, self._ticks()
        passed = {core: (after[core][0] - before[core][0], after[core][1] - before[core][1]) for core in self._allowed}
        return {core: idle / max(ticks, 1) for core, (idle, ticks) in passed.items()}, used / took

    def _log_failure(self, error: Exception) -> None:
        log.warning("not_on_one_core", error=type(error).__name__)


def better_core(core: int, idle: Mapping[int, float], used: float, dice: float) -> int | None:
    """A core to move to, if ``core`` is full, other processes use it too, and another core has more idle time.

    idle: share of time that each core was idle; used: share of a core that this process used; dice: in [0, 1), chooses
    among several.
    """
    if idle[core] >= FULL or used >= OWN_CORE:
        return None
    better = [other for other, share in idle.items() if share >= idle[core] + MIN_GAIN]
    return better[int(dice * len(better))] if better else None


def _current_core(allowed: Collection[int]) -> int:
    """The core on which the kernel runs the main thread. Source: proc(5), /proc/pid/stat, field 39."""
    core = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[36])
    return core if core in allowed else min(allowed)


def _pin_threads(cores: Collection[int]) -> None:
    for thread in os.listdir("/proc/self/task"):
        with suppress(ProcessLookupError):  # the thread has just ended
            os.sched_setaffinity(int(thread), cores)


def read_core_ticks() -> Ticks:
    """Ticks of all cores since the machine started. Source: proc(5), /proc/stat."""
    cores = {}
    for name, *fields in map(str.split, Path("/proc/stat").read_text().splitlines()):
        if name.startswith("cpu") and name != "cpu":
            ticks = [int(field) for field in fields[:8]]  # user, nice, system, idle, iowait, irq, softirq, steal
            cores[int(name.removeprefix("cpu"))] = ticks[3] + ticks[4], sum(ticks)
    return cores
