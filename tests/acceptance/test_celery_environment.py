"""What Celery reads from the environment, or raises outside its own handling, stops no worker."""

from collections.abc import Sequence

import pytest

from tests.support.certificates import Authority
from tests.support.servers import RabbitMQ, over_tls
from tests.support.system import System, job, until
from worker.messaging import topology

OURS = ("-m", "worker", "worker")
CELERYS = ("-m", "celery", "-A", "worker", "worker")

# Left over from another service: each beats the settings that a program gives to Celery, or is an option of its worker.
LEFT_OVER = {
    "CELERY_RESULT_BACKEND": "redis://127.0.0.1:1/0",
    "CELERY_BROKER_URL": "amqp://nobody:nothing@127.0.0.1:1//",
    "CELERY_BROKER_READ_URL": "amqp://nobody:nothing@127.0.0.1:1//",
    "CELERY_BROKER_WRITE_URL": "amqp://nobody:nothing@127.0.0.1:1//",
    "CELERY_CONFIG_MODULE": "no_such_module",
    "CELERY_LOADER": "default",
    "CELERY_WORKER_PURGE": "1",
    "CELERY_WORKER_QUEUES": "another",
    "CELERY_WORKER_EXCLUDE_QUEUES": "confirm-offer.jobs",
    "CELERY_WORKER_MAX_TASKS_PER_CHILD": "1",
    "CELERY_RDBSIG": "1",
    "KOMBU_LOG_DEBUG": "1",
    "RESULT_BACKEND": "redis://127.0.0.1:1/0",
    "LOADER": "default",
    "CONFIG_MODULE": "no_such_module",
    "DJANGO_SETTINGS_MODULE": "another.settings",
}
# Celery obeys these from its import on: its own command has done so before it loads our application.
READ_AT_IMPORT = {
    "REMAP_SIGTERM": "SIGQUIT",  # a cold shutdown
    "USE_FAST_LOCALS": "1",  # no task starts
    "C_BENCH": "1",  # no slot comes back
    "C_STRICT_APP": "1",  # the tracer raises
    "PICKLE_PROTOCOL": "none",
}

# The tracer raises for the first messages. In prefork, SystemExit would end each new child in the same way.
BROKEN_TRACER = """
import sys
from celery.app import trace
from worker.celery import app

build, runs = trace.build_tracer, []

def build_broken(name, task, *args, **kwargs):
    real = build(name, task, *args, **kwargs)
    def broken(*arguments):
        runs.append(name)
        if len(runs) < 3:
            raise RuntimeError("no result back end")
        if len(runs) == 3 and sys.argv[1] == "threads":
            raise SystemExit(1)
        if len(runs) == 4:
            raise MemoryError
        return real(*arguments)
    return broken

trace.build_tracer = build_broken
running = app.Worker(concurrency=1, pool_cls=sys.argv[1], quiet=True)
running.start()
"""

RAISING_TASK = """
import sys
from tasks import celery_tasks
from worker.celery import app

runs = []

def _published_at(timestamp):
    runs.append(timestamp)
    if len(runs) < 3:
        raise RuntimeError("a defect before the task decides")
    return real(timestamp)

real, celery_tasks._published_at = celery_tasks._published_at, _published_at
running = app.Worker(concurrency=1, pool_cls=sys.argv[1], quiet=True)
running.start()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "left_over"),
    [(OURS, LEFT_OVER | READ_AT_IMPORT), (CELERYS, LEFT_OVER)],
    ids=["confirm-offer", "celery"],
)
def test_variables_of_celery_have_no_effect(command: Sequence[str], left_over: dict[str, str], system: System) -> None:
    system.publish(job(f"before-{number}") for number in range(3))
    worker = system.start_worker(command, WORKER_CONCURRENCY="2", **left_over)
    system.publish([job("wrong", quotes=[])])
    system.publish(job(f"offer-{number}") for number in range(12))

    system.until_events(15)
    until(lambda: system.queue_length(topology.DEAD_LETTERS) == 1)

    assert system.states() == {"confirmed": 15}
    [told] = [set(line["names"]) for line in worker.logged() if line["event"] == "celery_variables_ignored"]
    celerys = {name for name in left_over if name.startswith(("CELERY_", "KOMBU_")) or name in READ_AT_IMPORT}
    assert celerys <= told | {"CELERY_BROKER_URL"}  # which Celery's command overwrites with BROKER_URL
    system.sandbox.latency = 1.0
    system.publish([job("in-flight")])
    until(lambda: len(system.sandbox.bookings) == 16)
    assert worker.stop() == 0
    assert system.states() == {"confirmed": 16}
    assert "Lovelace" not in worker.log.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["REMAP_SIGTERM", "USE_FAST_LOCALS", "C_BENCH", "C_STRICT_APP"])
def test_what_celerys_command_obeys_already_is_refused(name: str, system: System) -> None:
    worker = system.start_worker(CELERYS, **{name: READ_AT_IMPORT[name]})

    assert worker.process.wait(30) == 2

    [line] = worker.log.read_text().splitlines()
    assert line.startswith(f"confirm-offer: {name}: Celery's command obeys it")


def test_nothing_is_told_where_only_our_own_broker_url_is_set(system: System) -> None:
    worker = system.start_worker(CELERYS)
    system.publish([job("offer")])

    system.until_events(1)

    assert "celery_variables_ignored" not in worker.log.read_text()


@pytest.mark.slow
def test_celerys_command_takes_a_broker_url_with_options_of_tls(
    rabbitmq: RabbitMQ, authority: Authority, system: System
) -> None:
    worker = system.start_worker(CELERYS, BROKER_URL=over_tls(rabbitmq, system.broker_url, trust=authority))
    system.publish([job("offer")])

    system.until_events(1)

    assert worker.process.poll() is None


@pytest.mark.parametrize("script", [BROKEN_TRACER, RAISING_TASK], ids=["tracer raises", "task raises"])
@pytest.mark.parametrize("pool", ["threads", pytest.param("prefork", marks=pytest.mark.slow)])
def test_a_message_that_celery_could_not_run_goes_back(script: str, pool: str, system: System) -> None:
    """The only slot is free again, and no job is lost."""
    system.start_worker(("-c", script, pool), WORKER_CONCURRENCY="1", WORKER_POOL=pool)
    system.publish(job(f"offer-{number}") for number in range(5))

    system.until_events(5)

    assert system.states() == {"confirmed": 5}
    assert system.queue_length(topology.DEAD_LETTERS) == 0

    def nothing_is_held() -> bool:
        return system.queue_length(topology.JOBS) == 0

    until(nothing_is_held)
