"""The threads of a worker stay on one core, and move together."""

import os
from collections.abc import Iterator, Mapping
from threading import Event, Thread

import pytest

from tests.support.system import cores_of
from worker.services.cpu_affinity import CpuAffinity, Ticks, better_core, read_core_ticks

CORES = os.sched_getaffinity(0)


def cores_of_threads() -> set[frozenset[int]]:
    return cores_of(os.getpid())


def pin(cores: set[int]) -> None:
    """Pins all threads, as an operator does with ``taskset -a``."""
    for thread in os.listdir("/proc/self/task"):
        os.sched_setaffinity(int(thread), cores)


class Kernel:
    """Counts ticks as the kernel does. Between two readings all cores are idle, except the busy ones."""

    def __init__(self) -> None:
        self.busy: frozenset[int] = frozenset()
        self.readings = 0

    def __call__(self) -> Ticks:
        self.readings += 1
        return {core: (0 if core in self.busy else 50 * self.readings, 50 * self.readings) for core in CORES}


@pytest.fixture
def kernel() -> Kernel:
    return Kernel()


@pytest.fixture
def cpu_affinity(kernel: Kernel) -> Iterator[CpuAffinity]:
    """The service, run by the test. One more thread waits until the end."""
    ended = Event()
    Thread(target=ended.wait).start()
    affinity = CpuAffinity(lambda: 0.0, kernel)
    yield affinity
    affinity.close()
    ended.set()


@pytest.mark.parametrize(
    ("idle", "ours", "found"),
    [
        ({0: 0.0, 1: 1.0}, 0.5, 1),
        ({0: 0.05, 1: 0.0, 2: 0.5, 3: 0.9}, 0.1, 2),
        ({0: 0.0, 1: 1.0}, 0.95, None),  # nobody else uses our core
        ({0: 0.3, 1: 1.0}, 0.5, None),  # our core has idle time
        ({0: 0.05, 1: 0.1}, 0.5, None),  # no other core has more idle time
        ({0: 0.0}, 0.5, None),
    ],
)
def test_a_better_core_has_idle_time_when_others_use_ours(
    idle: Mapping[int, float], ours: float, found: int | None
) -> None:
    assert better_core(0, idle, ours, 0.0) == found


def test_workers_that_share_a_core_move_to_different_cores() -> None:
    assert {better_core(0, {0: 0.0, 1: 1.0, 2: 1.0}, 0.3, dice) for dice in (0.0, 0.49, 0.5, 0.99)} == {1, 2}


def test_all_threads_are_pinned_to_one_core_until_the_end(cpu_affinity: CpuAffinity) -> None:
    cpu_affinity.run_once()
    (cores,) = cores_of_threads()
    ended = Event()
    Thread(target=ended.wait).start()
    cpu_affinity.run_once()

    assert len(cores) == 1
    assert cores_of_threads() == {cores}

    cpu_affinity.close()
    ended.set()
    assert cores_of_threads() == {frozenset(CORES)}


@pytest.mark.skipif(len(CORES) < 2, reason="needs two cores")
def test_threads_that_an_operator_pinned_stay_pinned(cpu_affinity: CpuAffinity) -> None:
    cpu_affinity.run_once()
    (first,) = cores_of_threads()
    other = min(CORES - first)
    pin({other})

    cpu_affinity.run_once()
    cpu_affinity.run_once()

    assert cores_of_threads() == {frozenset({other})}
    pin(CORES)
    cpu_affinity.run_once()  # lets the threads run on all cores again


@pytest.mark.skipif(len(CORES) < 2, reason="needs two cores")
def test_all_threads_move_together_when_others_need_their_core(cpu_affinity: CpuAffinity, kernel: Kernel) -> None:
    cpu_affinity.run_once()
    (first,) = cores_of_threads()
    cpu_affinity.run_once()
    assert cores_of_threads() == {first}

    kernel.busy = first
    cpu_affinity.run_once()
    (second,) = cores_of_threads()

    assert len(second) == 1
    assert not first & second


def test_idle_ticks_of_each_core_are_read_from_the_kernel() -> None:
    ticks = read_core_ticks()

    assert ticks.keys() >= CORES
    assert all(0 < idle < total for idle, total in ticks.values())


def test_the_interval_is_one_to_four_seconds() -> None:
    intervals = []
    for dice in (0.0, 1.0):
        cpu_affinity = CpuAffinity(lambda dice=dice: dice, Kernel())
        cpu_affinity.run_once()
        cpu_affinity.close()
        intervals.append(cpu_affinity.interval)

    assert intervals == [1.0, 4.0]
