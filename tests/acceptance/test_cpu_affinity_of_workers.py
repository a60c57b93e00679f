"""The cores on which a worker runs, seen from outside."""

import os

import pytest

from tests.support.system import System, cores_of, job, until

pytestmark = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")

ALL = frozenset(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    "command",
    [["-m", "worker", "worker"], pytest.param(["-m", "celery", "-A", "worker", "worker"], marks=pytest.mark.slow)],
    ids=["worker", "celery"],
)
def test_all_threads_stay_on_one_core(command: list[str], system: System) -> None:
    worker = system.start_worker(command)

    until(lambda: {len(allowed) for allowed in cores_of(worker.process.pid)} == {1})

    (started,) = [line for line in worker.logged() if line["event"] == "worker_started"]
    assert started["one_core"] is True
    assert worker.stop() == 0


@pytest.mark.parametrize(
    "settings",
    [
        {"WORKER_ONE_CORE": "off"},
        pytest.param({"WORKER_POOL": "prefork"}, marks=pytest.mark.slow),
        pytest.param({"WORKER_POOL": "gevent"}, marks=pytest.mark.slow),
    ],
    ids=["off", "prefork", "gevent"],
)
def test_threads_are_not_pinned_if_it_is_off_or_of_no_use(settings: dict[str, str], system: System) -> None:
    worker = system.start_worker(WORKER_CONCURRENCY="2", **settings)
    system.publish([job("offer-1")])

    system.until_events(1)

    (started,) = [line for line in worker.logged() if line["event"] == "worker_started"]
    assert started["one_core"] is False
    assert cores_of(worker.process.pid) == {ALL}
