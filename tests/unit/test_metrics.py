"""Metrics: documented, bounded, counted only after begin, and removed with their process."""

import os
import re
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path

import pytest
from prometheus_client import generate_latest
from sqlalchemy import insert

from models.event import EventType
from models.states import BatchState, Outcome, State
from models.tables import Batch
from tests.support.stored import batch_row
from tests.support.system import PROJECT
from worker.observability import metrics
from worker.observability.metrics import Instruments
from worker.services.metrics_server import WorkerMetrics
from worker.storage import database, migrator


@pytest.fixture(autouse=True)
def _no_metrics_afterwards(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", "unused")  # restores what metrics sets
    yield
    metrics.end()


@pytest.fixture
def instruments() -> Instruments:
    return metrics.begin()


def shown(instruments: Instruments) -> dict[str, float]:
    """Values other than 0, by name with labels."""
    lines = generate_latest(instruments.collector()).decode().splitlines()  # type: ignore[arg-type]
    pairs = [line.rsplit(" ", 1) for line in lines if not line.startswith("#")]
    return {name.removeprefix("confirm_offer_"): float(value) for name, value in pairs if float(value)}


def test_the_document_lists_every_metric(tmp_path: Path) -> None:
    engine = database.connect(f"sqlite:///{tmp_path}/confirm-offer.db")
    migrator.upgrade(engine)
    with engine.begin() as connection:
        connection.execute(insert(Batch), batch_row(BatchState.RUNNING, 3))
    exposed = WorkerMetrics(metrics.begin(), engine, lambda: {"relay": 0.0})
    found = {
        (
            family.name + ("_total" if family.type == "counter" else ""),
            family.type,
            ", ".join(f"`{label}`" for label in sorted({*family.samples[0].labels} - {"le"})),
        )
        for family in exposed.collect()
        if not family.name.startswith("process_")
    }
    engine.dispose()

    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| (.*?)\s*\| .+ \|$", (PROJECT / "docs/metrics.md").read_text(), re.M)
    assert sorted(rows) == sorted(found)


def test_nothing_is_counted_before_begin() -> None:
    metrics.attempt_ended(Outcome.BOOKED, None, State.CONFIRMED)
    metrics.dead_lettered("poison")
    with metrics.calling("confirm"):
        pass

    assert shown(metrics.begin()) == {}


def test_each_fact_is_counted(instruments: Instruments) -> None:
    metrics.attempt_ended(Outcome.BOOKED, None, State.CONFIRMED)
    metrics.attempt_ended(Outcome.UNKNOWN, "timeout", State.RETRYING)
    metrics.attempt_ended(Outcome.UNKNOWN, "timeout", None)
    metrics.token_refreshed("failed")
    metrics.circuit_breaker_opened("credentials")
    metrics.slowed_down()
    metrics.dead_lettered("poison")
    metrics.event_published(EventType.BOOKING_CONFIRMED, None)
    metrics.events_refused(2)
    metrics.stored_together(7)

    assert shown(instruments) == {
        'jobs_total{outcome="confirmed"}': 1,
        'attempts_total{code="none",outcome="booked"}': 1,
        'attempts_total{code="timeout",outcome="unknown"}': 2,
        'token_refreshes_total{result="failed"}': 1,
        'circuit_breaker_openings_total{code="credentials"}': 1,
        "circuit_breaker_open": 1,
        "slowdowns_total": 1,
        'dead_letters_total{code="poison"}': 1,
        'events_published_total{type="booking.confirmed"}': 1,
        "events_refused_total": 2,
        'group_size_bucket{le="10.0"}': 1,
        'group_size_bucket{le="20.0"}': 1,
        'group_size_bucket{le="50.0"}': 1,
        'group_size_bucket{le="+Inf"}': 1,
        "group_size_count": 1,
        "group_size_sum": 7,
    }
    metrics.circuit_breaker_closed()
    assert "circuit_breaker_open" not in shown(instruments)


def test_a_call_is_in_flight_until_it_ends_and_its_duration_is_observed(instruments: Instruments) -> None:
    def broken_call() -> None:
        with metrics.calling("confirm"):
            assert shown(instruments) == {'calls_in_flight{call="confirm"}': 1}
            raise OSError

    with pytest.raises(OSError):  # noqa: PT011 - has no text
        broken_call()

    after = shown(instruments)
    assert 'calls_in_flight{call="confirm"}' not in after
    assert after['call_duration_seconds_count{call="confirm"}'] == 1


def test_the_time_to_the_event_is_never_negative(instruments: Instruments) -> None:
    """The clocks of a checkout and the database differ."""
    metrics.event_published(EventType.BOOKING_CONFIRMED, -0.5)
    metrics.event_published(EventType.BOOKING_CONFIRMED, 1.5)

    after = shown(instruments)
    assert after['job_to_event_seconds_sum{type="booking.confirmed"}'] == 1.5
    assert after['job_to_event_seconds_bucket{le="0.1",type="booking.confirmed"}'] == 1


def test_xone_s_answers_make_a_bounded_number_of_series(instruments: Instruments) -> None:
    for status in range(100, 1000):
        metrics.attempt_ended(Outcome.UNKNOWN, f"http-{status}", None)
        metrics.circuit_breaker_opened(f"http-{status}")

    codes = {name for name in shown(instruments) if name.startswith("attempts_total")}
    assert len(codes) == len(HTTPStatus) + 1
    assert shown(instruments)['attempts_total{code="other",outcome="unknown"}'] == 900 - len(HTTPStatus)


def test_processes_are_summed_and_gauges_of_a_dead_process_vanish(tmp_path: Path) -> None:
    instruments = metrics.begin(shared_folder=tmp_path)
    metrics.dead_lettered("poison")
    child = os.fork()
    if not child:
        metrics.dead_lettered("poison")
        metrics.circuit_breaker_opened("connect")
        os._exit(0)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)  # ended, but not yet reaped
    assert shown(instruments)["circuit_breaker_open"] == 1
    os.waitpid(child, 0)

    assert shown(instruments) == {
        'dead_letters_total{code="poison"}': 2,
        'circuit_breaker_openings_total{code="connect"}': 1,
    }
    metrics.end()
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_is_starting_is_no_error(tmp_path: Path) -> None:
    instruments = metrics.begin(shared_folder=tmp_path)
    assert instruments.folder is not None
    metrics.dead_lettered("poison")
    for kind in ("counter", "gauge_livesum"):  # created, but still empty
        (instruments.folder / f"{kind}_{os.getppid()}.db").touch()

    assert shown(instruments) == {'dead_letters_total{code="poison"}': 1}


def test_files_of_a_killed_worker_are_removed(tmp_path: Path) -> None:
    ended = os.fork()
    if not ended:
        os._exit(0)
    os.waitpid(ended, 0)
    (tmp_path / f"worker-{ended}").mkdir()
    (tmp_path / f"worker-{ended}" / "counter_1.db").touch()
    (tmp_path / f"worker-{os.getppid()}").mkdir()

    metrics.begin(shared_folder=tmp_path)

    assert {path.name for path in tmp_path.iterdir()} == {f"worker-{os.getpid()}", f"worker-{os.getppid()}"}
