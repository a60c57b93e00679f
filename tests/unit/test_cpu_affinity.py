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


def put_on(cores: set[int]) -> None:
    """What an operator does with ``taskset -a``."""
    for thread in os.listdir("/proc/self/task"):
        os.sched_setaffinity(int(thread), cores)


class Kernel:
    """Counts ticks as the kernel does. Between two looks, all cores are idle but the busy ones."""

    def __init__(self) -> None:
        self.busy: frozenset[int] = frozenset()
        self.looks = 0

    def __call__(self) -> Ticks:
        self.looks += 1
        return {core: (0 if core in self.busy else 50 * self.looks, 50 * self.looks) for core in CORES}


@pytest.fixture
def kernel() -> Kernel:
    return Kernel()


@pytest.fixture
def one_core(kernel: Kernel) -> Iterator[CpuAffinity]:
    """Its turns are called by the test. One more thread waits until the end."""
    ended = Event()
    Thread(target=ended.wait).start()
    made = CpuAffinity(lambda: 0.0, kernel)
    yield made
    made.close()
    ended.set()


@pytest.mark.parametrize(
    ("idle", "ours", "found"),
    [
        ({0: 0.0, 1: 1.0}, 0.5, 1),
        ({0: 0.05, 1: 0.0, 2: 0.5, 3: 0.9}, 0.1, 2),
        ({0: 0.0, 1: 1.0}, 0.95, None),  # we have it alone
        ({0: 0.3, 1: 1.0}, 0.5, None),  # there is time left
        ({0: 0.05, 1: 0.1}, 0.5, None),  # no other has more
        ({0: 0.0}, 0.5, None),
    ],
)
def test_a_better_core_is_one_with_time_where_others_take_that_of_ours(
    idle: Mapping[int, float], ours: float, found: int | None
) -> None:
    assert better_core(0, idle, ours, 0.0) == found


def test_workers_that_share_a_core_do_not_all_choose_the_same_other_one() -> None:
    assert {better_core(0, {0: 0.0, 1: 1.0, 2: 1.0}, 0.3, dice) for dice in (0.0, 0.49, 0.5, 0.99)} == {1, 2}


def test_all_threads_stay_on_one_core_and_are_let_go_at_the_end(one_core: CpuAffinity) -> None:
    one_core.run_once()
    (cores,) = cores_of_threads()
    ended = Event()
    Thread(target=ended.wait).start()
    one_core.run_once()

    assert len(cores) == 1
    assert cores_of_threads() == {cores}

    one_core.close()
    ended.set()
    assert cores_of_threads() == {frozenset(CORES)}


@pytest.mark.skipif(len(CORES) < 2, reason="needs two cores")
def test_where_somebody_else_has_chosen_a_core_they_stay_there(one_core: CpuAffinity) -> None:
    one_core.run_once()
    (first,) = cores_of_threads()
    other = min(CORES - first)
    put_on({other})

    one_core.run_once()
    one_core.run_once()

    assert cores_of_threads() == {frozenset({other})}
    put_on(CORES)
    one_core.run_once()  # so that it lets them go to all again


@pytest.mark.skipif(len(CORES) < 2, reason="needs two cores")
def test_they_move_together_where_others_need_their_core(one_core: CpuAffinity, kernel: Kernel) -> None:
    one_core.run_once()
    (first,) = cores_of_threads()
    one_core.run_once()
    assert cores_of_threads() == {first}

    kernel.busy = first
    one_core.run_once()
    (second,) = cores_of_threads()

    assert len(second) == 1
    assert not first & second


def test_the_kernel_tells_how_long_each_core_has_been_idle() -> None:
    ticks = read_core_ticks()

    assert ticks.keys() >= CORES
    assert all(0 < idle < total for idle, total in ticks.values())


def test_between_two_looks_pass_one_to_four_seconds() -> None:
    pauses = []
    for dice in (0.0, 1.0):
        one_core = CpuAffinity(lambda dice=dice: dice, Kernel())
        one_core.run_once()
        one_core.close()
        pauses.append(one_core.interval)

    assert pauses == [1.0, 4.0]
