"""The main job from outside: each job becomes one booking in the database and one event on the exchange."""

import json
import subprocess
import sys
from collections import Counter

import pytest
from alembic import command
from sqlalchemy import select

from models.states import State
from models.tables import Booking, Confirmation
from tests.support.system import PROJECT, System, job, until
from worker.messaging import topology
from worker.storage import migrator

WITHOUT_GEVENT = """
import sys
sys.modules["gevent"] = None
sys.argv = ["confirm-offer", "worker"]
from worker.__main__ import main
main()
"""


def assert_each_once(system: System, offers: list[str]) -> None:
    """Asserts one booking upstream, in the database and in an event for each offer, and no simultaneous calls."""
    assert {offer for _, offer in system.sandbox.bookings} == set(offers)
    assert system.sandbox.overlapping == set()
    assert system.states() == {State.CONFIRMED: len(offers)}
    with system.engine.connect() as connection:
        stored = connection.execute(
            select(Confirmation.offer_id, Booking.id).join(Booking, Booking.confirmation_id == Confirmation.id)
        ).all()
    upstream = {offer: booking["id"] for (_, offer), booking in system.sandbox.bookings.items()}
    assert dict(map(tuple, stored)) == upstream
    assert len(stored) == len(offers)
    published = Counter(event["data"]["offer_id"] for event in system.take_events())
    ids = {event["id"] for event in system.events}
    assert set(published) == set(offers)
    assert len(ids) == len(offers)


@pytest.mark.parametrize("pool", ["threads", pytest.param("gevent", marks=pytest.mark.slow)])
def test_a_thousand_jobs_become_a_thousand_bookings_and_events(pool: str, system: System) -> None:
    system.sandbox.latency = 0.05
    offers = [f"offer-{number}" for number in range(1000)]
    system.publish(map(job, offers))
    worker = system.start_worker(WORKER_POOL=pool)

    events = system.until_events(1000, seconds=120)

    assert_each_once(system, offers)
    assert Counter(event["type"] for event in events) == {"booking.confirmed": 1000}
    assert worker.stop() == 0
    assert system.queue_length(topology.JOBS) == 0


def test_a_killed_worker_loses_no_job_and_books_none_twice(system: System) -> None:
    system.sandbox.latency = 0.05
    offers = [f"offer-{number}" for number in range(400)]
    system.publish(map(job, offers))
    first = system.start_worker()
    until(lambda: system.states()[State.CONFIRMED] >= 150, seconds=60)
    first.kill()
    in_flight = system.states()[State.CONFIRMING]

    system.start_worker()
    system.until_events(400, seconds=120)

    assert in_flight > 0
    assert_each_once(system, offers)


def test_jobs_published_three_times_to_two_workers_are_booked_once(system: System) -> None:
    system.sandbox.latency = 0.02
    offers = [f"offer-{number}" for number in range(100)]
    system.publish(job(offer) for offer in offers * 3)
    system.start_worker()
    system.start_worker()

    system.until_events(100, seconds=60)

    until(lambda: system.queue_length(topology.JOBS) == 0)
    assert_each_once(system, offers)


def test_celery_starts_the_same_worker(system: System) -> None:
    worker = system.start_worker(command=("-m", "celery", "-A", "worker", "worker"))
    system.publish(
        [job("offer-1")], correlation_id="C-1", headers={"traceparent": "00-" + "a" * 32 + "-" + "b" * 16 + "-01"}
    )

    (event,) = system.until_events(1)

    (message,) = system.event_messages
    assert event["type"] == "booking.confirmed"
    assert message.properties["message_id"] == event["id"]
    assert message.properties["type"] == "booking.confirmed"
    assert message.properties["correlation_id"] == "C-1"
    assert message.properties["delivery_mode"] == 2
    assert message.headers["traceparent"] == "00-" + "a" * 32 + "-" + "b" * 16 + "-01"
    assert message.content_type == "application/cloudevents+json; charset=utf-8"
    assert worker.stop() == 0


def test_a_prefork_worker_confirms_jobs(system: System) -> None:
    system.start_worker(WORKER_POOL="prefork", WORKER_CONCURRENCY="2")
    offers = [f"offer-{number}" for number in range(20)]
    system.publish(map(job, offers))

    system.until_events(20)

    assert_each_once(system, offers)


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        ["-m", "worker", "worker", "--pool", "gevent"],
        ["-m", "celery", "-A", "worker", "worker", "-P", "gevent", "-c", "64"],
    ],
    ids=["worker", "celery"],
)
def test_a_gevent_worker_is_started_by_setting_or_option(command: list[str], system: System) -> None:
    worker = system.start_worker(command)
    offers = [f"offer-{number}" for number in range(20)]
    system.publish(map(job, offers))

    system.until_events(20)

    assert_each_once(system, offers)
    (started,) = [line for line in worker.logged() if line["event"] == "worker_started"]
    assert (started["pool"], started["concurrency"]) == ("gevent", 64)
    assert worker.stop() == 0


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            ["-m", "celery", "-A", "worker", "worker"],
            "for gevent, start 'confirm-offer worker', or give Celery '-P gevent'",
        ),
        pytest.param(
            ["-c", WITHOUT_GEVENT], "gevent is not installed; install confirm-offer[gevent]", marks=pytest.mark.slow
        ),
    ],
    ids=["not made ready", "not installed"],
)
def test_a_worker_that_cannot_use_gevent_ends_with_the_reason(command: list[str], message: str, system: System) -> None:
    worker = system.start_worker(command, WORKER_POOL="gevent")

    assert worker.process.wait(60) == 2
    assert f"confirm-offer: WORKER_POOL: {message}" in worker.log.read_text()


def test_parts_of_a_worker_run_alone(system: System) -> None:
    system.publish([job("offer-1~http-503~1")])
    tasks = system.start_worker(WORKER_PARTS="tasks")
    until(lambda: system.states()[State.RETRYING] == 1)
    system.start_worker(WORKER_PARTS="scheduler")
    until(lambda: system.states()[State.CONFIRMED] == 1)
    assert system.take_events() == []
    tasks.stop()
    system.start_worker(WORKER_PARTS="relay")

    (event,) = system.until_events(1)

    assert event["data"]["offer_id"] == "offer-1~http-503~1"


def test_the_demo_succeeds(tmp_path: object) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "worker", "demo", "--jobs", "12", "--json"],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["problems"] == []
    assert report["events"] == {"booking.confirmed": 10, "booking.pending": 1, "confirmation.failed": 1}
    assert report["dead_letters"] == ["invalid-job"]


def test_a_worker_started_before_the_tables_waits_for_them(system: System) -> None:
    with system.engine.begin() as connection:
        command.downgrade(migrator.config(connection), "base")
    worker = system.start_worker()
    system.publish([job("offer-1")])
    until(lambda: "run 'confirm-offer db upgrade'" in worker.log.read_text())

    migrator.upgrade(system.engine)

    (event,) = system.until_events(1)
    assert event["type"] == "booking.confirmed"
    assert system.queue_length(topology.DEAD_LETTERS) == 0
