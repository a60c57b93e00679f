"""Pending bookings are followed to their end, on both databases."""

import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from threading import Event
from typing import Any
from uuid import UUID

import pytest
from cryptography.fernet import Fernet
from sqlalchemy import insert, select, update
from uuid_utils.compat import uuid7

from models.event import EventType
from models.states import BookingStatuses, State
from models.tables import (
    Booking,
    Confirmation,
    EarlierBooking,
    FollowUp,
    OutboxEvent,
    Policy,
    Policyholder,
    RateLimit,
)
from tasks import confirm, follow_up
from tasks.follow_up import (
    Change,
    FollowUpLost,
    Statuses,
    decide_change,
    due_partners,
    interval_of,
    lease_list,
    release_list,
)
from tasks.operations import pauses
from tasks.operations.resolve import read_booking, resolve_booked
from tasks.privacy import purge, rekey
from tests.support.confirming import only, rows, run
from worker.runtime import Runtime
from worker.sandbox.answers import to_json
from worker.sandbox.server import Sandbox
from worker.services.follow_ups import FollowUps
from worker.settings import EncryptionSettings, read
from worker.storage.database import now, now_plus
from worker.storage.encryption import Encryption
from worker.storage.pause_cache import PauseCache
from worker.storage.rate_limiter import reserve_slot

INTERVAL, MAX_AGE = 300.0, 2592000.0


@pytest.fixture
def environment(environment: dict[str, str]) -> dict[str, str]:
    return {**environment, "XONE_TIMEOUT": "30"}


def look(runtime: Runtime, ago: float = 1000.0) -> None:
    """Follows up as if the pending bookings were so old, and the lists due."""
    age(runtime, ago)
    FollowUps(runtime, INTERVAL, MAX_AGE).run_once()


def age(runtime: Runtime, seconds: float) -> None:
    with runtime.engine.begin() as connection:
        connection.execute(
            update(Confirmation).where(Confirmation.state == State.PENDING).values(updated_at=now_plus(-seconds))
        )
        connection.execute(update(FollowUp).values(due_at=now_plus(-1.0)))


def set_status(sandbox: Sandbox, offer: str, status: Any, **changes: Any) -> None:
    with sandbox.lock:
        (key,) = [key for key in sandbox.bookings if key[1] == offer]
        booking = sandbox.bookings[key]
        policies = [policy | {"status": status} for policy in booking["policies"]]
        sandbox.bookings[key] = booking | {"status": status, "policies": policies} | changes


def states(runtime: Runtime) -> dict[str, State]:
    return {row.offer_id: row.state for row in rows(runtime, Confirmation)}


def events(runtime: Runtime, offer_id: str) -> list[str]:
    """The types of an offer's events, whose sequence has no gap."""
    with runtime.engine.connect() as connection:
        found = connection.execute(
            select(OutboxEvent.type, OutboxEvent.sequence, Confirmation.sequence.label("last"))
            .join(Confirmation, Confirmation.id == OutboxEvent.confirmation_id)
            .where(Confirmation.offer_id == offer_id)
            .order_by(OutboxEvent.sequence)
        ).all()
    assert [event.sequence for event in found] == list(range(1, found[0].last + 1))
    return [event.type for event in found]


PENDING, CONFIRMED, CANCELLED, UPDATED = (
    "booking.pending",
    "booking.confirmed",
    "booking.cancelled",
    "booking.updated",
)


@pytest.mark.parametrize(
    ("offer_id", "state", "types"),
    [
        ("o~failed-payment", State.CANCELLED, [CANCELLED]),
        ("o~pending", State.PENDING, [PENDING]),
        ("o~pending~1", State.CONFIRMED, [PENDING, CONFIRMED]),
        ("o~pending-cancelled~1", State.CANCELLED, [PENDING, CANCELLED]),
        ("o~pending-failed~1", State.CANCELLED, [PENDING, CANCELLED]),
    ],
)
def test_what_becomes_of_a_booking(runtime: Runtime, offer_id: str, state: State, types: list[str]) -> None:
    run(runtime, offer_id)
    for _ in range(3):
        look(runtime)

    assert states(runtime) == {offer_id: state}
    assert events(runtime, offer_id) == types


def test_each_booking_ends_once_and_is_explained(runtime: Runtime, sandbox: Sandbox) -> None:
    """The same with 200 bookings and a worker: tests/acceptance/test_follow_up.py."""
    offers = [f"o-{at}~pending" for at in range(10)]
    for offer in offers:
        run(runtime, offer)
    for offer in offers[:4]:
        set_status(sandbox, offer, "CONFIRMED")
    look(runtime)
    for offer in offers[4:6]:
        set_status(sandbox, offer, "ACTIVE")
    for offer in offers[6:8]:
        set_status(sandbox, offer, "FAILED")
    look(runtime)
    look(runtime, MAX_AGE + 10)

    reviewed = [row for row in rows(runtime, Confirmation) if row.state == State.NEEDS_REVIEW]
    assert {row.offer_id for row in reviewed} == set(offers[8:])
    assert {row.error_code for row in reviewed} == {"still-pending"}
    assert "has had the status PENDING for more than 30 days" in reviewed[0].error_detail
    ends = [CONFIRMED] * 6 + [CANCELLED] * 2 + ["confirmation.needs_review"] * 2
    assert [events(runtime, offer) for offer in offers] == [[PENDING, end] for end in ends]
    assert Counter((row.number, row.status) for row in rows(runtime, EarlierBooking)) == {(1, "PENDING"): 8}
    assert len(sandbox.calls) == len(offers)


def test_a_change_is_stored_with_what_was_before(runtime: Runtime, sandbox: Sandbox) -> None:
    run(runtime, "o~pending")
    before, person = only(runtime, Booking), only(runtime, Policyholder)
    set_status(sandbox, "o~pending", "CONFIRMED", price="12.50", security_token="new", hint="x")
    look(runtime)

    booking, earlier, row = only(runtime, Booking), only(runtime, EarlierBooking), only(runtime, Confirmation)
    assert (booking.status, str(booking.price), booking.recorded_at) == ("CONFIRMED", "12.50", before.recorded_at)
    assert {policy.status for policy in rows(runtime, Policy)} == {"CONFIRMED"}
    kept = json.loads(runtime.encryption.decrypt(row.id, "booking 1", earlier.sealed_booking))
    assert (earlier.status, kept["status"], kept["policies"][0]["status"]) == ("PENDING", "PENDING", "PENDING")
    assert all([kept["security_token"], kept["policyholder"]["email"], kept["coi"]["url"]])
    assert runtime.encryption.decrypt(row.id, "security_token", booking.sealed_security_token) == b"new"
    assert json.loads(runtime.encryption.decrypt(row.id, "rest", booking.sealed_rest)) == {
        "sandbox": True,
        "quote.uuid": "quote-o",
        "hint": "x",
    }
    assert only(runtime, Policyholder).id == person.id
    (event,) = [json.loads(event.payload) for event in rows(runtime, OutboxEvent) if event.sequence == 2]
    assert (event["data"]["booking"]["price"], event["data"]["policies"][0]["status"]) == ("12.50", "CONFIRMED")


def test_a_list_that_says_less_takes_nothing_away(runtime: Runtime, sandbox: Sandbox) -> None:
    run(runtime, "o~pending")
    with sandbox.lock:
        (key,) = sandbox.bookings
        sandbox.bookings[key] = {"id": sandbox.bookings[key]["id"], "offer_id": "o~pending", "status": "CONFIRMED"}
    look(runtime)

    booking = only(runtime, Booking)
    assert (booking.status, booking.currency) == ("CONFIRMED", "EUR")
    assert all([booking.sealed_security_token, only(runtime, Policyholder).sealed_person, rows(runtime, Policy)])


def test_a_status_that_goes_back_and_forth(runtime: Runtime, sandbox: Sandbox) -> None:
    """Between the end states each change is announced once; a confirmed booking does not become pending again."""
    run(runtime, "o~pending")
    run(runtime, "other~pending")  # for its sake the list is read
    for status in ("PENDING_PAYMENT", "PENDING", "CONFIRMED", "PENDING", "CONFIRMED", "CANCELLED", "CONFIRMED"):
        set_status(sandbox, "o~pending", status)
        look(runtime)

    assert events(runtime, "o~pending") == [PENDING, UPDATED, UPDATED, CONFIRMED, CANCELLED]
    assert states(runtime) == {"o~pending": State.CANCELLED, "other~pending": State.PENDING}
    assert [row.status for row in rows(runtime, EarlierBooking)] == [
        "PENDING",
        "PENDING_PAYMENT",
        "PENDING",
        "CONFIRMED",
    ]


def test_only_what_is_listed_as_ours_counts(runtime: Runtime, sandbox: Sandbox) -> None:
    """Not a booking under another offer, an older version of it, one without a status, or one that is not listed."""
    offers = ["a~pending", "b~pending", "c~pending", "d~pending", "e~pending"]
    for offer in offers:
        run(runtime, offer)
    set_status(sandbox, "a~pending", "CONFIRMED", offer_id="another")
    set_status(sandbox, "b~pending", "CONFIRMED", updated_at="2020-01-01T00:00:00Z")
    set_status(sandbox, "c~pending", ["CONFIRMED"])
    with sandbox.lock:
        del sandbox.bookings["P-100", "d~pending"]
    set_status(sandbox, "e~pending", "CONFIRMED", offer_id=None)
    look(runtime)

    assert states(runtime) == dict.fromkeys(offers[:4], State.PENDING) | {"e~pending": State.CONFIRMED}


@pytest.mark.parametrize("mode", ["forbidden", "unauthorized", "busy", "failing"])
def test_a_list_that_can_not_be_read_shows_nothing(runtime: Runtime, sandbox: Sandbox, mode: str) -> None:
    run(runtime, "o~pending")
    set_status(sandbox, "o~pending", "CONFIRMED")
    sandbox.bookings_mode = mode
    look(runtime)

    assert events(runtime, "o~pending") == [PENDING]
    assert runtime.xone.calls.wait() == 0, "it stops no confirm calls"
    with runtime.engine.connect() as connection:
        assert due_partners(connection, INTERVAL) == []


def test_a_crash_between_reading_and_recording_loses_nothing(
    runtime: Runtime, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def die(*_: Any, **__: Any) -> None:
        raise Killed

    run(runtime, "o~pending~1")
    look(runtime)
    with monkeypatch.context() as patched:
        patched.setattr(follow_up, "_record", die)
        patched.setattr("worker.services.follow_ups.release_list", lambda *_: None)  # nor does it end its lease
        with pytest.raises(Killed):
            look(runtime)
    assert events(runtime, "o~pending~1") == [PENDING]
    look(runtime)
    assert events(runtime, "o~pending~1") == [PENDING], "the dead worker's lease has not expired"
    with runtime.engine.begin() as connection:
        connection.execute(update(FollowUp).values(leased_until=now_plus(-1.0)))
    look(runtime)

    assert events(runtime, "o~pending~1") == [PENDING, CONFIRMED]


def test_two_workers_read_a_list_once(runtime: Runtime, sandbox: Sandbox) -> None:
    run(runtime, "o~pending")
    age(runtime, 1000)
    readings = []
    reading, may_go_on = Event(), Event()
    list_bookings = runtime.xone.list_bookings

    def slow(*args: Any) -> Any:
        readings.append(args[0])
        reading.set()
        assert may_go_on.wait(20)
        return list_bookings(*args)

    runtime.xone.list_bookings = slow  # type: ignore[method-assign]
    with ThreadPoolExecutor() as pool:
        first = pool.submit(FollowUps(runtime, INTERVAL, MAX_AGE).run_once)
        assert reading.wait(20)
        FollowUps(runtime, INTERVAL, MAX_AGE).run_once()
        may_go_on.set()
        first.result(20)

    assert readings == ["P-100"]


def test_a_reading_that_has_lost_its_lease_records_nothing(runtime: Runtime, sandbox: Sandbox) -> None:
    run(runtime, "o~pending")
    lost = lease_list(runtime, "P-100")
    assert lost is not None
    assert lease_list(runtime, "P-100") is None
    with runtime.engine.begin() as connection:
        connection.execute(update(FollowUp).values(leased_until=now_plus(-1.0)))
    assert lease_list(runtime, "P-100") is not None
    set_status(sandbox, "o~pending", "CONFIRMED")

    with pytest.raises(FollowUpLost):
        follow_up.read_list(runtime, lost, None, (State.PENDING,))
    with pytest.raises(FollowUpLost):
        release_list(lost, runtime, 10.0)
    assert events(runtime, "o~pending") == [PENDING]


def test_purged_rows_stay_blank(runtime: Runtime, sandbox: Sandbox) -> None:
    run(runtime, "o~pending")
    ids = [only(runtime, Confirmation).id]
    with runtime.engine.begin() as connection:
        purge.blank(connection, ids)
    set_status(sandbox, "o~pending", "CONFIRMED", hint="Ada")
    look(runtime)

    row, booking = only(runtime, Confirmation), only(runtime, Booking)
    assert (row.state, booking.status) == (State.CONFIRMED, "CONFIRMED")
    assert row.purged_at is not None
    assert row.email_hash is None
    assert only(runtime, Policyholder).sealed_person is None
    assert only(runtime, EarlierBooking).sealed_booking is None
    assert [value for name, value in booking._mapping.items() if name.startswith("sealed_") and value] == []


def test_a_purge_covers_what_was_before(runtime: Runtime, sandbox: Sandbox) -> None:
    run(runtime, "p~pending")
    set_status(sandbox, "p~pending", "CONFIRMED")
    look(runtime)
    assert only(runtime, EarlierBooking).sealed_booking is not None
    ids = [row.id for row in rows(runtime, Confirmation)]
    with runtime.engine.begin() as connection:
        purge.blank(connection, ids)

    assert only(runtime, EarlierBooking).sealed_booking is None


def test_paused_partners_are_not_looked_at(runtime: Runtime, sandbox: Sandbox) -> None:
    run(runtime, "o~pending")
    set_status(sandbox, "o~pending", "CONFIRMED")
    with runtime.engine.begin() as connection:
        pauses.pause(connection, "P-100", "a test", "tester@here")
    runtime.pauses = PauseCache()
    look(runtime)
    assert events(runtime, "o~pending") == [PENDING]


def test_a_look_gets_behind_confirm_calls(runtime: Runtime, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the slots of the rate limit are taken, it does not read; it takes one that nobody else wants."""
    run(runtime, "o~pending")
    set_status(sandbox, "o~pending", "CONFIRMED")
    monkeypatch.setenv("XONE_RATE_LIMIT", "0.1")
    with closing(Runtime()) as limited:
        with limited.engine.begin() as connection:
            assert reserve_slot(connection, 0.1) < 0.001  # SQLite rounds
        look(limited)
        assert events(runtime, "o~pending") == [PENDING]
        with limited.engine.begin() as connection:
            connection.execute(update(RateLimit).values(next_at=now()))
        look(limited)
    assert events(runtime, "o~pending") == [PENDING, CONFIRMED]


def reviewed(runtime: Runtime, offer_id: str) -> None:
    run(runtime, offer_id)
    look(runtime, MAX_AGE + 10)
    assert states(runtime)[offer_id] == State.NEEDS_REVIEW


def test_what_stayed_pending_may_be_resolved(runtime: Runtime, sandbox: Sandbox) -> None:
    """By a person, whose booking replaces the stored one."""
    reviewed(runtime, "o~pending")
    stored = sandbox.bookings["P-100", "o~pending"] | {"status": "CONFIRMED"}
    booking = read_booking(to_json({"data": stored}), "o~pending")
    with runtime.engine.begin() as connection:
        resolve_booked(connection, runtime.encryption, "P-100", booking, STATUSES, False, "ann@here", None)

    assert events(runtime, "o~pending") == [PENDING, "confirmation.needs_review", CONFIRMED]
    assert (only(runtime, Booking).status, only(runtime, EarlierBooking).status) == ("CONFIRMED", "PENDING")


def test_what_stayed_pending_is_not_sent_again_if_it_is_reprocessed(runtime: Runtime, sandbox: Sandbox) -> None:
    reviewed(runtime, "o~pending")
    set_status(sandbox, "o~pending", "CONFIRMED")
    with runtime.engine.begin() as connection:
        connection.execute(update(Confirmation).values(state=State.QUEUED, due_at=now()))
    lease = confirm.lease_due(only(runtime, Confirmation).id, runtime)
    assert lease is not None
    confirm.attempt(lease, runtime)

    assert events(runtime, "o~pending") == [PENDING, "confirmation.needs_review", CONFIRMED]
    assert len(sandbox.calls) == 1
    assert (only(runtime, Booking).status, only(runtime, EarlierBooking).status) == ("CONFIRMED", "PENDING")


def test_rekey_covers_what_was_before(runtime: Runtime, sandbox: Sandbox) -> None:
    run(runtime, "o~pending")
    set_status(sandbox, "o~pending", "CONFIRMED")
    look(runtime)
    new = Encryption([Fernet.generate_key().decode(), *read(EncryptionSettings).keys])
    done = sum(rekey.rekey(runtime.engine, new, 10), rekey.Rekeyed())

    row, earlier = only(runtime, Confirmation), only(runtime, EarlierBooking)
    assert done.unreadable == []
    assert new.is_current(earlier.sealed_booking)
    assert json.loads(new.decrypt(row.id, "booking 1", earlier.sealed_booking))["status"] == "PENDING"


STATUSES = BookingStatuses()


@pytest.mark.parametrize(
    ("state", "before", "seen", "follows"),
    [
        (State.PENDING, "PENDING", "pending_payment", (State.PENDING, UPDATED)),
        (State.PENDING, "PENDING", "PENDING", None),
        (State.PENDING, None, None, None),
        (State.PENDING, "PENDING", " active", (State.CONFIRMED, CONFIRMED)),
        (State.PENDING, "PENDING", "Void", (State.CANCELLED, CANCELLED)),
        (State.CONFIRMED, "CONFIRMED", "CONFIRMED", None),
        (State.CONFIRMED, "CONFIRMED", "ACTIVE", (State.CONFIRMED, UPDATED)),
        (State.CONFIRMED, "CONFIRMED", "RENEWED", (State.CONFIRMED, UPDATED)),
        (State.CONFIRMED, "CONFIRMED", "CANCELLED", (State.CANCELLED, CANCELLED)),
        (State.CANCELLED, "FAILED", "FAILED", None),
        (State.CANCELLED, "FAILED", "CANCELLED", (State.CANCELLED, UPDATED)),
        (State.CANCELLED, "FAILED", "CONFIRMED", (State.CONFIRMED, CONFIRMED)),
        (State.CANCELLED, "FAILED", "PENDING", (State.PENDING, PENDING)),
        (State.NEEDS_REVIEW, "PENDING", "PENDING", None),
        (State.NEEDS_REVIEW, "PENDING", "RECEIVED", (State.NEEDS_REVIEW, UPDATED)),
        (State.NEEDS_REVIEW, "PENDING", "CONFIRMED", (State.CONFIRMED, CONFIRMED)),
        (State.NEEDS_REVIEW, "PENDING", "DELETED", (State.CANCELLED, CANCELLED)),
    ],
)
def test_what_a_look_changes(state: State, before: str | None, seen: str | None, follows: Any) -> None:
    change = decide_change(state, Statuses(before, ()), Statuses(seen, None), STATUSES)

    assert (None if change is None else (change.state, change.event_type)) == follows


def test_a_policy_that_changes_is_an_update() -> None:
    one, other = (("p-1", "CONFIRMED"),), (("p-1", "CANCELLED"),)

    assert decide_change(State.CONFIRMED, Statuses("CONFIRMED", one), Statuses("CONFIRMED", other), STATUSES) == Change(
        State.CONFIRMED, EventType.BOOKING_UPDATED
    )
    assert decide_change(State.CONFIRMED, Statuses("CONFIRMED", one), Statuses("CONFIRMED", one), STATUSES) is None


@pytest.mark.parametrize(
    ("youngest", "interval", "seconds"),
    [(0, 300, 300), (3000, 300, 300), (6000, 300, 600), (36000, 300, 3600), (1e7, 300, 3600), (1e7, 7200, 7200)],
)
def test_the_interval_grows_to_an_hour_and_is_spread(youngest: float, interval: float, seconds: float) -> None:
    assert interval_of(youngest, interval, 0.5) == seconds
    assert interval_of(youngest, interval, 0.0) == pytest.approx(0.9 * seconds)
    assert interval_of(youngest, interval, 1.0) == pytest.approx(1.1 * seconds)


def test_what_becomes_pending_does_not_wait_for_what_has_been_so_for_long(runtime: Runtime) -> None:
    def is_due() -> bool:
        with runtime.engine.connect() as connection:
            return [partner.partner_id for partner in due_partners(connection, INTERVAL)] == ["P-100"]

    run(runtime, "old~pending")
    assert not is_due()
    look(runtime, 500_000)
    assert not is_due()
    run(runtime, "new~pending")
    assert not is_due()
    with runtime.engine.begin() as connection:
        connection.execute(update(FollowUp).values(read_at=now_plus(-1000.0)))
        is_new = Confirmation.offer_id == "new~pending"
        connection.execute(update(Confirmation).where(is_new).values(updated_at=now_plus(-INTERVAL - 1)))
    assert is_due()


def test_a_clock_that_was_set_back_stops_no_looks(runtime: Runtime, sandbox: Sandbox) -> None:
    run(runtime, "o~pending")
    look(runtime)
    set_status(sandbox, "o~pending", "CONFIRMED")
    with runtime.engine.begin() as connection:
        times = {"due_at": now_plus(86400.0), "leased_until": now_plus(86400.0), "lease_token": UUID(int=1)}
        connection.execute(update(FollowUp).values(times))
    FollowUps(runtime, INTERVAL, MAX_AGE).run_once()

    assert events(runtime, "o~pending") == [PENDING, CONFIRMED]


@pytest.mark.parametrize("number", [100, pytest.param(10_000, marks=pytest.mark.slow)])
def test_a_list_of_many_pending_bookings_is_read_once(runtime: Runtime, sandbox: Sandbox, number: int) -> None:
    """Many of one partner, of which the last one has changed."""
    run(runtime, "o-0~pending")
    copy_rows(runtime, number)
    with sandbox.lock:
        ((key, booking),) = sandbox.bookings.items()
        for at in range(1, number):
            sandbox.bookings[key[0], f"o-{at}"] = booking | {"id": f"INS-{at}", "offer_id": f"o-{at}"}
        sandbox.page_size = 1000
    set_status(sandbox, f"o-{number - 1}", "CONFIRMED")
    look(runtime)

    assert Counter(states(runtime).values()) == {State.PENDING: number - 1, State.CONFIRMED: 1}
    assert len(rows(runtime, EarlierBooking)) == 1


def copy_rows(runtime: Runtime, number: int) -> None:
    """So many copies of the only confirmation and its booking."""
    confirmation, booking = only(runtime, Confirmation), only(runtime, Booking)
    policies = [policy._mapping for policy in rows(runtime, Policy)]
    ids = dict(enumerate((uuid7() for _ in range(1, number)), start=1))

    def copy(at: int, id_: UUID) -> dict[str, Any]:
        return {**confirmation._mapping, "id": id_, "offer_id": f"o-{at}", "idempotency_key": id_, "sequence": 0}

    clear = {name: value for name, value in booking._mapping.items() if not name.startswith("sealed_")}
    copies = {
        Confirmation: [copy(at, id_) for at, id_ in ids.items()],
        Booking: [{**clear, "confirmation_id": id_, "id": f"INS-{at}"} for at, id_ in ids.items()],
        Policy: [{**policy, "confirmation_id": id_} for id_ in ids.values() for policy in policies],
    }
    with runtime.engine.begin() as connection:
        for table, copied in copies.items():
            connection.execute(insert(table.__table__), copied)
