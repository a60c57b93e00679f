"""The database's clock was set back: stored times are ahead of it, and are not believed further than they can be."""

from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import select, update

from models.states import BatchState, State
from models.tables import Batch, Confirmation, OutboxEvent, RateLimit
from tasks import confirm
from tasks.due_times import DISPATCH_LEASE, MAX_DEFECT_DELAY, MAX_LEASE, clamp_times
from tasks.lease import postpone, renew
from tasks.operations import batches
from tasks.operations.failures import Selection
from tests.support.confirming import accepted, only, rows, run
from worker.doctor import work
from worker.runtime import Runtime
from worker.services.outbox_relay import _TAKE, LEASE, MAX_REFUSED_BACKOFF
from worker.services.scheduler import _DISPATCHED, _TAKE_LIVE, Scheduler, _find_partners, _take_due
from worker.storage.database import now_plus, seconds_since
from worker.storage.rate_limiter import MAX_WAIT, reserve_slot

LONG_AGO = datetime(2000, 1, 1, tzinfo=UTC)
AHEAD = 600.0  # seconds that the clock was set back
MAX_DELAY = 3900.0


def change(runtime: Runtime, table: type, **values: object) -> None:
    with runtime.engine.begin() as connection:
        connection.execute(update(table).values(**values))


def due_in(runtime: Runtime) -> float:
    with runtime.engine.connect() as connection:
        return -float(connection.execute(select(seconds_since(Confirmation.due_at))).scalar_one())


def clamped(runtime: Runtime) -> int:
    with runtime.engine.begin() as connection:
        return clamp_times(connection, MAX_DELAY)


@pytest.mark.parametrize("rate", [0.05, 2.0, 100.0])
def test_a_rate_limit_begins_anew(rate: float, runtime: Runtime) -> None:
    with runtime.engine.begin() as connection:
        reserve_slot(connection, rate)
    change(runtime, RateLimit, next_at=now_plus(AHEAD))

    with runtime.engine.begin() as connection:
        waits = [reserve_slot(connection, rate) for _ in range(2)]

    assert waits[0] == pytest.approx(0.0, abs=0.5)
    assert waits[1] == (pytest.approx(1 / rate, abs=0.5) if 1 / rate <= MAX_WAIT else None)


@pytest.mark.parametrize("delay", [0.0, 5.0, 300.0])
def test_a_retry_keeps_its_distance(delay: float, runtime: Runtime) -> None:
    accepted(runtime)
    ahead = {"updated_at": now_plus(AHEAD), "due_at": now_plus(AHEAD + delay), "dispatched_until": now_plus(AHEAD)}
    change(runtime, Confirmation, state=State.RETRYING, lease_token=None, **ahead)

    assert clamped(runtime) == 1

    assert due_in(runtime) == pytest.approx(delay, abs=2.0)
    assert clamped(runtime) == 0


@pytest.mark.parametrize("back", [postpone, renew])
def test_what_was_put_back_long_after_its_last_attempt_keeps_its_distance(
    back: Callable[..., object], runtime: Runtime
) -> None:
    lease = accepted(runtime)
    change(runtime, Confirmation, updated_at=now_plus(-3600.0), due_at=now_plus(-1.0))
    with runtime.engine.begin() as connection:
        back(connection, lease if back is renew else lease.id, 5.0)
    row = only(runtime, Confirmation)
    set_back = timedelta(seconds=AHEAD)
    change(runtime, Confirmation, updated_at=row.updated_at + set_back, due_at=row.due_at + set_back)

    assert clamped(runtime) == 1

    assert due_in(runtime) == pytest.approx(5.0, abs=2.0)


def test_a_due_time_that_no_delay_explains_is_now(runtime: Runtime) -> None:
    accepted(runtime)
    change(runtime, Confirmation, state=State.RETRYING, lease_token=None, due_at=now_plus(30 * 86400.0))

    assert clamped(runtime) == 1

    assert due_in(runtime) == pytest.approx(0.0, abs=2.0)


def test_a_lease_does_not_become_shorter_than_it_was_given_out_for(runtime: Runtime) -> None:
    accepted(runtime)
    full = runtime.xone_settings.lease_seconds
    change(runtime, Confirmation, updated_at=now_plus(AHEAD), due_at=now_plus(AHEAD + full))
    assert clamped(runtime) == 1
    assert due_in(runtime) == pytest.approx(full, abs=2.0)

    change(runtime, Confirmation, due_at=now_plus(30 * 86400.0))
    assert clamped(runtime) == 1
    assert due_in(runtime) == pytest.approx(MAX_LEASE, abs=2.0)


def test_the_scheduler_clamps_and_dispatches(
    broker_url: str, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    accepted(runtime)
    ahead = {"updated_at": now_plus(AHEAD), "due_at": now_plus(AHEAD), "dispatched_until": now_plus(AHEAD)}
    change(runtime, Confirmation, state=State.RETRYING, lease_token=None, **ahead)
    monkeypatch.setenv("BROKER_URL", broker_url)

    with closing(Scheduler(runtime)) as scheduler:
        scheduler.run_once()

    assert only(runtime, Confirmation).dispatched_until is not None


def test_times_that_can_be_are_left_alone(runtime: Runtime) -> None:
    accepted(runtime)
    change(runtime, Confirmation, state=State.RETRYING, lease_token=None, due_at=now_plus(3600.0))

    assert clamped(runtime) == 0
    assert due_in(runtime) == pytest.approx(3600.0, abs=5.0)


def test_a_confirmation_that_was_put_off_waits_on(runtime: Runtime) -> None:
    accepted(runtime)
    change(runtime, Confirmation, updated_at=now_plus(-86400.0), due_at=now_plus(-1.0))
    confirm.put_off(only(runtime, Confirmation).id, runtime)

    assert clamped(runtime) == 0
    assert due_in(runtime) == pytest.approx(MAX_DEFECT_DELAY, abs=5.0)


@pytest.mark.parametrize(("ahead", "taken"), [(DISPATCH_LEASE - 1, False), (AHEAD, True)])
def test_a_mark_of_a_message_under_way_counts_for_its_time_only(ahead: float, taken: bool, runtime: Runtime) -> None:
    accepted(runtime)
    change(runtime, Confirmation, due_at=now_plus(-1.0), dispatched_until=now_plus(ahead))

    with runtime.engine.begin() as connection:
        assert connection.execute(_DISPATCHED).scalar_one() == (0 if taken else 1)
        assert len(_take_due(connection, _TAKE_LIVE, 10, LONG_AGO, _find_partners(connection, LONG_AGO))) == int(taken)


@pytest.mark.parametrize(
    ("age", "ahead", "taken"),
    [
        (0.0, LEASE - 1, False),
        (0.0, AHEAD, True),
        (-AHEAD, AHEAD + LEASE, True),  # the clock was set back
        (500.0, 400.0, False),  # the broker refused it
        (500.0, AHEAD, True),
        (5000.0, MAX_REFUSED_BACKOFF, False),
        (5000.0, MAX_REFUSED_BACKOFF + AHEAD, True),
    ],
)
def test_a_relays_claim_is_believed_for_as_long_as_it_can_be(
    age: float, ahead: float, taken: bool, runtime: Runtime
) -> None:
    run(runtime)
    change(runtime, OutboxEvent, created_at=now_plus(-age), claimed_until=now_plus(ahead))

    with runtime.engine.begin() as connection:
        assert len(connection.execute(_TAKE, {"since": LONG_AGO}).all()) == int(taken)


def test_a_batch_goes_on_at_its_rate(runtime: Runtime) -> None:
    run(runtime, "offer-1~http-422")
    failed = [row.id for row in rows(runtime, Confirmation)]
    with runtime.engine.begin() as connection:
        batch_id = batches.create(connection, failed, Selection(), None, "me", rate=1.0)
    change(runtime, Batch, fed_until=now_plus(AHEAD))

    with runtime.engine.begin() as connection:
        assert batches.feed(connection, batch_id, 10, [], 30.0) == [], "its rate counts from now on"
    with runtime.engine.connect() as connection:
        unused = connection.execute(select(seconds_since(Batch.fed_until))).scalar_one()
    assert unused == pytest.approx(0.0, abs=2.0)
    change(runtime, Batch, fed_until=now_plus(-1.5))
    with runtime.engine.begin() as connection:
        assert len(batches.feed(connection, batch_id, 10, [], DISPATCH_LEASE)) == 1
    assert only(runtime, Batch).state == BatchState.RUNNING


def test_doctor_names_a_clock_that_was_set_back(runtime: Runtime) -> None:
    accepted(runtime)
    with runtime.engine.connect() as connection:
        assert "stored times" not in " ".join(finding.check for finding in work.check(connection, None))
    change(runtime, Confirmation, created_at=now_plus(AHEAD), updated_at=now_plus(AHEAD))

    with runtime.engine.connect() as connection:
        (finding,) = [each for each in work.check(connection, None) if each.check == "stored times"]

    assert "10:00" in finding.message
