"""Invariants of confirmations under any order of jobs, leases, answers, deaths of workers and delays.

A state machine of Hypothesis takes the steps of an attempt one by one, so any number of workers can be in the middle
of an attempt. Each step is the program's own, on a real database; only XONE is a model (see Upstream). Time does not
pass by itself: ``pass_time`` moves every stored time, and the clock of every worker, into the past.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from itertools import count
from typing import Any, NamedTuple
from uuid import UUID

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import Row, bindparam, delete, select, update

from models import booking as xone
from models.event import EventType
from models.job import JobRejected, read_job
from models.states import Outcome, State
from models.tables import Attempt, Base, Booking, Confirmation, OutboxEvent
from tasks import confirm
from tasks.accept import Delivery, NewJob, accept
from tasks.decide import AttemptResult, RetryPolicy, decide
from tasks.lease import Lease, LeaseLost, acquire, release
from tasks.operations.withdraw import withdraw
from tasks.order_end import expire
from tasks.record import EVENT_OF, RecordedAttempt, record
from tests.support.system import job
from worker.errors import ORDER_ENDED, AlreadyBooked, BadCredentials, Busy, NotSent, Refused, Unknown, XoneError
from worker.runtime import Runtime
from worker.settings import RetrySettings, XoneSettings
from worker.storage.database import now_plus
from worker.xone.answers import BookingReceived
from worker.xone.call_control import CallControl
from worker.xone.circuit_breaker import FAILURE_THRESHOLD, CallsSuspended

EXAMPLES = {"postgresql": 20, "sqlite": 60}  # a step on PostgreSQL takes more than twice as long
SETTINGS = settings(
    stateful_step_count=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)

STATUS_OF = {"offer-1": "CONFIRMED", "offer-2": "PENDING"}  # status of the booking that XONE makes for the offer
CONTENTS = {"first": {}, "other": {"quotes": [{"id": "quote-other"}]}}
TIMEOUT = 600.0  # seconds; so long that no lease expires by itself while the machine runs
LEASE = 1.5 * TIMEOUT
HOUR, DAY = 3600.0, 86400.0
MAX_LAG = 500.0  # seconds until a booking is listed, where the list lags
BOOKED = {State.CONFIRMED, State.PENDING}
ENDED = {*BOOKED, State.FAILED, State.NEEDS_REVIEW}
BOOKING_EVENTS = {EventType.BOOKING_CONFIRMED, EventType.BOOKING_PENDING}
MAX_ROUNDS = 20  # in which every confirmation must end once XONE works again


def body_of(offer_id: str, content: str, confirm_by: datetime | None = None) -> bytes:
    times = {"confirm_by": confirm_by.isoformat()} if confirm_by is not None else {}
    return json.dumps(job(offer_id, **CONTENTS[content], **times)).encode()


class Fate(NamedTuple):
    """Whether a confirm call books, and the error that the caller gets instead of the booking."""

    books: bool
    error: Callable[[], XoneError] | None = None


BOOKS = Fate(True)
FATES = {
    "books": BOOKS,
    "shows the booking in a 409": BOOKS,
    "books, answer lost": Fate(True, lambda: Unknown("timeout", "no answer")),
    "books, answer broken": Fate(True, lambda: Unknown("bad-answer", "no booking", 200)),
    "books, 502": Fate(True, lambda: Unknown("http-502", "bad gateway", 502)),
    "lost before": Fate(False, lambda: Unknown("connection-lost", "reset")),
    "500": Fate(False, lambda: Unknown("http-500", "defect", 500)),
    "not sent": Fate(False, lambda: NotSent("connect", "refused")),
    "429": Fate(False, lambda: Busy("http-429", "busy", 429, retry_after=30.0)),
    "503": Fate(False, lambda: Busy("http-503", "busy", 503)),
    "wrong credentials": Fate(False, lambda: BadCredentials("credentials", "no token", 401)),
    "refuses": Fate(False, lambda: Refused("http-422", "no", 422)),
    "says that it was booked": Fate(False, lambda: AlreadyBooked("already-booked", "exists", 422)),
}


class Upstream:
    """A model of XONE, the only part that is not real: thousands of steps over HTTP would take too long.

    It is deterministic and has the methods of ``worker.xone.client.Xone`` that the tasks use. It books an offer once,
    and refuses a second call as XONE does, without the booking. ``fate`` and ``listing`` decide how the next calls
    end. ``on_call`` is called when a call is sent, and may do what happens meanwhile.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.calls = CallControl(clock)
        self.can_list_bookings = True
        self.fate = "books"
        self.listing = "shows"
        self.before_each: Callable[[], None] = lambda: None
        self.on_call: Callable[[str, tuple[UUID, bytes] | None], None] = lambda offer_id, sent: None
        self.bookings: dict[str, list[xone.Booking]] = defaultdict(list)
        self.under_way: dict[str, int] = defaultdict(int)
        self.max_simultaneous = 0
        self.clock = clock
        self.booked_at: dict[str, float] = {}
        self.last_lookups: dict[str, str] = {}  # how the list answered, or that the call was suspended
        self._ids = count(1)

    def confirm(
        self,
        partner_id: str,
        offer_id: str,
        body: bytes,
        idempotency_key: UUID,
        before_call: Callable[[], None],
        before_send: Callable[[], None],
    ) -> BookingReceived:
        self.before_each()
        with self.calls.guard():
            before_call()
            before_send()
            with self._call(offer_id, (idempotency_key, body)):
                return self._confirm(offer_id)

    def find_booking(
        self,
        partner_id: str,
        offer_id: str,
        quote_ids: frozenset[str],
        before_call: Callable[[], None],
        before_send: Callable[[], None],
        while_waiting: Callable[[], None],
        may_be_anothers: Callable[[str], bool],
    ) -> xone.Booking | None:
        self.before_each()
        try:
            with self.calls.guard_lookup(partner_id):
                before_call()
                before_send()
                with self._call(offer_id, None):
                    return self._find(offer_id)
        except CallsSuspended:
            self.last_lookups[offer_id] = "suspended"
            raise

    def _find(self, offer_id: str) -> xone.Booking | None:
        self.last_lookups[offer_id] = self.listing
        if self.listing == "forbidden":
            raise Refused("http-403", "forbidden", 403)
        if self.listing == "fails":
            raise Unknown("http-500", "defect", 500)
        if self.listing == "lags" and self.clock() < self.booked_at.get(offer_id, 0.0) + MAX_LAG:
            return None
        return next(iter(self.bookings[offer_id]), None)

    def _confirm(self, offer_id: str) -> BookingReceived:
        fate = FATES[self.fate]
        existing = next(iter(self.bookings[offer_id]), None)
        if fate.books and existing is None:
            self.bookings[offer_id].append(self._booking(offer_id))
            self.booked_at[offer_id] = self.clock()
        if fate.error is not None:
            raise fate.error()
        if existing is not None:
            error = AlreadyBooked("already-booked", "XONE says that a booking exists", 409)
            error.booking = existing if "409" in self.fate else None
            raise error
        return BookingReceived(self.bookings[offer_id][0], 201)

    def _booking(self, offer_id: str) -> xone.Booking:
        price = Decimal("19.90")
        return xone.Booking(
            id=f"INS-{next(self._ids)}",
            offer_id=offer_id,
            status=STATUS_OF[offer_id],
            price=price,
            policies=[xone.Policy(id=f"policy-{offer_id}", price=price)],
        )

    @contextmanager
    def _call(self, offer_id: str, sent: tuple[UUID, bytes] | None) -> Any:
        self.under_way[offer_id] += 1
        self.max_simultaneous = max(self.max_simultaneous, self.under_way[offer_id])
        try:
            self.on_call(offer_id, sent)
            yield
        finally:
            self.under_way[offer_id] -= 1


class Confirmations(RuleBasedStateMachine):
    """Two offers, and workers that lease them, ask XONE, record answers, put back leases, and come late.

    A lease that is never used again, or an answer that is never recorded, belongs to a worker that died.
    """

    leases = Bundle("leases")
    answers = Bundle("answers")
    offers = st.sampled_from(["offer-1"] * 3 + ["offer-2"])
    fates = st.sampled_from([*FATES, *["books, answer lost", "refuses"] * 4])  # this pair must not end as failed
    listings = st.sampled_from(["shows", "shows", "lags", "fails"])
    waits = st.sampled_from([*[LEASE + 1] * 4, 5.0, 301.0, TIMEOUT, HOUR, DAY])  # seconds

    def __init__(self, runtime: Runtime) -> None:
        super().__init__()
        self.clock = 0.0
        self.runtime = runtime
        self.xone = Upstream(lambda: self.clock)
        self.xone.on_call = self.check_call
        runtime.xone = self.xone  # type: ignore[assignment]
        with runtime.engine.begin() as connection:
            kept = {"audit", "servers"}
            for table in reversed([table for table in Base.metadata.sorted_tables if table.name not in kept]):
                connection.execute(delete(table))
        self.all_leases: list[Lease] = []  # all leases, for their clocks
        self.confirm_by: datetime | None = None  # of all jobs
        self.unwanted: set[UUID] = set()  # tokens of leases that were given when their offer was withdrawn
        self.settled: dict[str, int] = {}  # how many attempts an offer had when the list showed no booking at last
        self.content: dict[str, str] = {}  # the name of each offer's content
        self.rows: dict[str, Row[Any]] = {}  # the confirmations after the last step
        self.final_states: dict[str, State] = {}  # final states
        self.bodies: dict[UUID, bytes] = {}  # by idempotency key
        self.during_call: Callable[[], object] | None = None

    @initialize(
        target=leases,
        lists=st.sampled_from(["shows", "shows", "forbidden", "off"]),
        after_unknown=st.sampled_from(["resend", "resend", "review"]),
        max_attempts=st.sampled_from([1, 3, 12]),
        confirm_within=st.sampled_from([None, None, LEASE, DAY]),
    )
    def choose_settings(self, lists: str, after_unknown: str, max_attempts: int, confirm_within: float | None) -> Any:
        changes = {"XONE_TIMEOUT": TIMEOUT, "XONE_AFTER_UNKNOWN": after_unknown}
        self.lists = "forbidden" if lists == "forbidden" else "shows"
        self.xone.listing = self.lists
        self.xone.can_list_bookings = lists != "off"
        self.runtime.xone_settings = XoneSettings().model_copy(update=changes)
        self.runtime.retry_settings = RetrySettings(RETRY_MAX_ATTEMPTS=max_attempts)
        self.retry_policy = RetryPolicy.of(self.runtime.retry_settings, self.runtime.xone_settings)
        assert self.runtime.xone_settings.lease_seconds == LEASE
        if confirm_within is not None:
            self.confirm_by = datetime.now(UTC) + timedelta(seconds=confirm_within)
        for offer_id in STATUS_OF:
            self.content[offer_id] = "first"
            body = body_of(offer_id, "first", self.confirm_by)
            self.leased(confirm.accept_job(body, Delivery(), self.runtime))
        return multiple(*self.all_leases)

    # --- Steps ---

    @rule(target=leases, offer_id=offers, content=st.sampled_from(list(CONTENTS)), after=waits, twice=st.booleans())
    def publish(self, offer_id: str, content: str, after: float, twice: bool) -> Any:
        """A job arrives: new, the same again, or with other content. twice: the answer of the first commit was lost."""
        self.pass_time(after)
        body, is_other = body_of(offer_id, content, self.confirm_by), content != self.content[offer_id]
        if is_other and self.rows[offer_id].state != State.FAILED:
            with pytest.raises(JobRejected, match="conflicting-job"):
                confirm.accept_job(body, Delivery(), self.runtime)
            return multiple()
        self.content[offer_id] = content
        if is_other:
            del self.final_states[offer_id]
        lease = confirm.accept_job(body, Delivery(), self.runtime)
        if lease is not None and twice:
            with self.runtime.engine.begin() as connection:
                new = NewJob.of(read_job(body), Delivery(), self.runtime.encryption)
                again = accept(connection, self.runtime.encryption, new, lease.token, LEASE)
            lease = self.assert_same(lease, again)
        return self.leased(lease)

    @rule(target=leases, offer_id=offers, after=waits, twice=st.booleans())
    def resume(self, offer_id: str, after: float, twice: bool) -> Any:
        """A message of the Scheduler arrives, at any time. twice: the answer of the first commit was lost."""
        self.pass_time(after)
        lease = confirm.lease_due(self.rows[offer_id].id, self.runtime)
        if lease is not None and twice:
            with self.runtime.engine.begin() as connection:
                again = acquire(connection, self.runtime.encryption, [lease.id], lease.token, LEASE)
            lease = self.assert_same(lease, again.get(lease.id))
        return self.leased(lease)

    @rule(target=answers, lease=consumes(leases), fate=fates, listing=listings)
    def ask(self, lease: Lease, fate: str, listing: str) -> Any:
        """A worker asks XONE."""
        self.xone.fate, self.xone.listing = fate, self.listing_as(listing)
        try:
            result = confirm.ask_or_put_back(lease, self.retry_policy, self.runtime)
        except LeaseLost:
            return multiple()
        return multiple() if result is None else (lease, result)

    @rule(target=answers, lease=consumes(leases), fate=fates, listing=listings)
    def ask_slowly(self, lease: Lease, fate: str, listing: str) -> Any:
        """As ``ask``, but the first call is as slow as possible, and another worker tries to lease the offer."""
        self.during_call = lambda: (self.pass_time(TIMEOUT), self.work(lease.offer_id))
        try:
            return self.ask(lease, fate, listing)
        finally:
            self.during_call = None

    @rule(target=answers, lease=consumes(leases), fate=fates, listing=listings, other_fate=st.none() | fates)
    def ask_with_a_break(self, lease: Lease, fate: str, listing: str, other_fate: str | None) -> Any:
        """As ``ask``, but the lease expires between first and second call. Another worker may lease the offer."""
        calls = count(1)

        def before_each() -> None:
            if next(calls) == 2:
                self.pass_time(LEASE + 1)
                if other_fate is not None:
                    self.xone.fate = other_fate
                    self.work(lease.offer_id)
                    self.xone.fate = fate

        self.xone.before_each = before_each
        try:
            return self.ask(lease, fate, listing)
        finally:
            self.xone.before_each = lambda: None

    @rule(offer_id=offers, after=waits, fate=fates, listing=listings)
    def attempt(self, offer_id: str, after: float, fate: str, listing: str) -> None:
        """A worker makes a whole attempt without interruption."""
        self.pass_time(after)
        self.xone.fate, self.xone.listing = fate, self.listing_as(listing)
        self.work(offer_id)

    @rule(answered=consumes(answers))
    def record(self, answered: tuple[Lease, AttemptResult]) -> None:
        """A worker records its answer, in time or late."""
        self.record_answer(*answered)

    @rule(answered=consumes(answers))
    def record_twice(self, answered: tuple[Lease, AttemptResult]) -> None:
        """As ``record``, but the answer of the first commit was lost."""
        self.record_answer(*answered)
        self.record_answer(*answered)

    @rule(target=leases, answered=consumes(answers))
    def record_late(self, answered: tuple[Lease, AttemptResult]) -> Any:
        """As ``record``, but the lease has expired and another worker has leased the offer."""
        lease, answer = answered
        self.pass_time(LEASE + 1)
        current = confirm.lease_due(lease.id, self.runtime)
        self.record_answer(lease, answer)
        return self.leased(current)

    @rule(lease=consumes(leases), wait=st.sampled_from([0.0, 30.0]), twice=st.booleans())
    def put_back(self, lease: Lease, wait: float, twice: bool) -> None:
        """A worker may not call now: another worker has opened the breaker, or its process stops."""
        with suppress(LeaseLost):
            confirm.put_back(lease, wait, self.runtime)
            if twice:
                with self.runtime.engine.begin() as connection:
                    release(connection, lease, wait)

    @rule(offer_id=offers, after=waits)
    def withdraw(self, offer_id: str, after: float) -> None:
        """A person withdraws an offer, in whatever state it is."""
        self.pass_time(after)
        self.withdraw_now(offer_id)

    @rule(target=answers, lease=consumes(leases), fate=fates, listing=listings)
    def withdraw_during_a_call(self, lease: Lease, fate: str, listing: str) -> Any:
        """As ``ask``, but a person withdraws the offer during the first call."""
        self.during_call = lambda: self.withdraw_now(lease.offer_id)
        try:
            return self.ask(lease, fate, listing)
        finally:
            self.during_call = None

    @rule()
    def expire(self) -> None:
        """The Scheduler ends what was not booked by its confirm_by."""
        failed: dict[UUID, Exception] = {}
        with self.runtime.engine.begin() as connection:
            expire(connection, failed)
        assert not failed

    # --- Shared by steps ---

    def withdraw_now(self, offer_id: str) -> None:
        with self.runtime.engine.begin() as connection:
            withdraw(connection, "P-100", offer_id, "me", "a test")
        if self.final_states.get(offer_id) == State.NEEDS_REVIEW:
            del self.final_states[offer_id]

    def pass_time(self, seconds: float) -> None:
        """Moves all stored times and the clocks of the workers into the past."""
        passed = timedelta(seconds=seconds)
        with self.runtime.engine.begin() as connection:
            rows = connection.execute(select(Confirmation.__table__)).all()
            connection.execute(
                update(Confirmation)
                .where(Confirmation.id == bindparam("which"))
                .values(due_at=bindparam("due"), queued_at=bindparam("queued"), confirm_by=bindparam("by")),
                [
                    {
                        "which": row.id,
                        "due": row.due_at and row.due_at - passed,
                        "queued": row.queued_at - passed,
                        "by": row.confirm_by and row.confirm_by - passed,
                    }
                    for row in rows
                ],
            )
        for lease in self.all_leases:
            lease.leased_at -= seconds
            lease.call_until -= seconds
        self.confirm_by = self.confirm_by and self.confirm_by - passed
        self.clock += seconds

    def leased(self, lease: Lease | None) -> Any:
        if lease is None:
            return multiple()
        self.all_leases.append(lease)
        if lease.is_withdrawn:
            self.unwanted.add(lease.token)
        return lease

    @staticmethod
    def assert_same(lease: Lease, again: Lease | None) -> Lease:
        assert again is not None
        assert (again.number, again.token, again.history.answer_unknown) == (
            lease.number,
            lease.token,
            lease.history.answer_unknown,
        )
        return again

    def record_answer(self, lease: Lease, answer: AttemptResult) -> None:
        decision = decide(answer, lease.history, self.retry_policy, 0.0)
        with self.runtime.engine.begin() as connection:
            record(connection, self.runtime.encryption, [RecordedAttempt(lease, decision, 0.1)], False)
        if decision.booking is not None:  # a booking is always stored, whatever the state was
            self.final_states[lease.offer_id] = decision.state

    def listing_as(self, listing: str) -> str:
        """How the list answers: as asked for, unless it is always forbidden."""
        return listing if self.lists == "shows" else self.lists

    def work(self, offer_id: str) -> None:
        """A worker gets the Scheduler's message for this offer, and makes an attempt if it gets the lease."""
        lease = confirm.lease_due(self.rows[offer_id].id, self.runtime)
        if lease is not None:
            self.all_leases.append(lease)
            confirm.attempt(lease, self.runtime)

    def check_call(self, offer_id: str, sent: tuple[UUID, bytes] | None) -> None:
        """Checks that a call may be made, and does what happens during it."""
        row = self.rows[offer_id]
        if sent is not None:
            key, body = sent
            assert self.bodies.setdefault(key, body) == body, "another body under the same idempotency key"
            assert key == row.idempotency_key, "a repeat has the key of the first call"
            # BOOKED is allowed: a late booking ends the lease of a worker that is about to call and can't know
            assert row.state not in ENDED - BOOKED, "a call after the end"
            assert self.confirm_by is None or datetime.now(UTC) < self.confirm_by, "a call after confirm_by"
            assert row.lease_token not in self.unwanted, "a call for an offer that was withdrawn before"
            assert row.error_code != "already-booked", "a call after XONE said that a booking exists"
            assert self.retry_policy.resend_after_unknown or not row.answer_unknown, (
                "review: no call after an unknown answer"
            )
        if (during_call := self.during_call) is not None:
            self.during_call = None
            during_call()

    # --- Invariants ---

    @invariant()
    def check_all(self) -> None:
        with self.runtime.engine.begin() as connection:
            rows = connection.execute(select(Confirmation.__table__)).all()
            attempts = connection.execute(select(Attempt.__table__).order_by(Attempt.number)).all()
            bookings = connection.execute(select(Booking.__table__)).all()
            events = connection.execute(select(OutboxEvent.__table__).order_by(OutboxEvent.sequence)).all()
        before, self.rows = self.rows, {row.offer_id: row for row in rows}
        assert len(self.rows) == len(rows)
        assert self.xone.max_simultaneous <= 1, "two calls for one offer at the same time"
        for row in rows:
            stored = [booking for booking in bookings if booking.confirmation_id == row.id]
            self.check_state(row, before.get(row.offer_id, row))
            self.check_booking(row, stored)
            self.check_attempts(row, [attempt for attempt in attempts if attempt.confirmation_id == row.id])
            self.check_events(row, [event for event in events if event.confirmation_id == row.id])

    def check_state(self, row: Row[Any], before: Row[Any]) -> None:
        assert (row.lease_token is not None) == (row.state == State.CONFIRMING)
        assert (row.due_at is not None) == (row.state not in ENDED)
        assert row.state == self.final_states.get(row.offer_id, row.state), "a final state has changed"
        if before.answer_unknown and row.idempotency_key == before.idempotency_key and row.state not in BOOKED:
            is_settled = row.state == State.FAILED and row.error_code in ORDER_ENDED and row.read_backs >= 7
            assert row.answer_unknown or is_settled, "only a booking, or the list at last, resolves an unknown answer"
            if is_settled:
                self.settled[row.offer_id] = row.attempts
        if row.state in ENDED:
            self.final_states[row.offer_id] = row.state

    def check_booking(self, row: Row[Any], stored: Sequence[Row[Any]]) -> None:
        upstream = self.xone.bookings[row.offer_id]
        assert len(upstream) <= 1, "booked twice"
        assert len(stored) == (row.state in BOOKED)
        assert row.state != State.FAILED or not upstream, "failed, yet XONE has the booking"
        if stored:
            (booking,), (upstream_booking,) = stored, upstream
            assert (booking.id, booking.offer_id, booking.status, booking.price) == (
                upstream_booking.id,
                upstream_booking.offer_id,
                upstream_booking.status,
                upstream_booking.price,
            )
            assert row.state == (State.CONFIRMED if upstream_booking.status == "CONFIRMED" else State.PENDING)

    def check_attempts(self, row: Row[Any], attempts: Sequence[Row[Any]]) -> None:
        assert [attempt.number for attempt in attempts] == list(range(1, row.attempts + 1))
        assert row.attempts_used <= row.attempts
        open_tokens = [attempt.lease_token for attempt in attempts if attempt.outcome is None]
        assert open_tokens in ([], [row.lease_token])
        unknown = [
            attempt
            for attempt in attempts[self.settled.get(row.offer_id, 0) :]
            if attempt.outcome == Outcome.UNKNOWN and attempt.code != "already-booked"
        ]
        assert row.answer_unknown or not unknown or row.state in BOOKED
        if row.state in BOOKED:
            assert Outcome.BOOKED in [attempt.outcome for attempt in attempts]

    def check_events(self, row: Row[Any], events: Sequence[Row[Any]]) -> None:
        assert [event.sequence for event in events] == list(range(1, row.sequence + 1))
        payloads = [json.loads(event.payload) for event in events]
        assert [payload["data"]["sequence"] for payload in payloads] == [event.sequence for event in events]
        assert [payload["type"] for payload in payloads] == [event.type for event in events]
        booking_events = [payload for payload in payloads if payload["type"] in BOOKING_EVENTS]
        assert len(booking_events) == (row.state in BOOKED)
        assert all(
            payload["data"]["booking"]["id"] == self.xone.bookings[row.offer_id][0].id for payload in booking_events
        )
        if row.state in ENDED:
            assert events[-1].type == EVENT_OF[row.state]

    # --- The end ---

    def teardown(self) -> None:
        """All workers have died, XONE works from now on, and time passes. Every confirmation must end."""
        self.check_all()
        self.xone.fate, self.xone.listing = "books", self.lists
        for _ in range(MAX_ROUNDS):
            open_offers = [row.offer_id for row in self.rows.values() if row.state not in ENDED]
            if not open_offers:
                break
            self.pass_time(HOUR)
            for offer_id in open_offers:
                self.work(offer_id)
            self.check_all()
        for offer_id, row in self.rows.items():
            assert row.state in ENDED, "it has not ended"
            if self.xone.bookings[offer_id] and row.state not in BOOKED:
                assert row.state == State.NEEDS_REVIEW
                last_lookup = self.xone.last_lookups.get(offer_id)
                is_unlisted = not self.xone.can_list_bookings or last_lookup in ("lags", "fails", "forbidden")
                is_poison = row.error_code == "poison"
                assert is_unlisted or is_poison, "a booking that XONE lists was left to a person"


def test_any_order_of_steps_keeps_the_invariants(runtime: Runtime) -> None:
    examples = EXAMPLES[runtime.engine.dialect.name]
    run_state_machine_as_test(lambda: Confirmations(runtime), settings=settings(SETTINGS, max_examples=examples))


@pytest.mark.parametrize(("max_attempts", "age"), [(1, 0.0), (12, DAY)])
def test_the_last_read_back_is_made_although_the_answer_opens_the_breaker(
    runtime: Runtime, max_attempts: int, age: float
) -> None:
    upstream = Upstream(lambda: 0.0)
    upstream.fate = "books, 502"
    runtime.xone = upstream  # type: ignore[assignment]
    runtime.retry_settings = RetrySettings(RETRY_MAX_ATTEMPTS=max_attempts)
    first = confirm.accept_job(body_of("offer-1", "first"), Delivery(), runtime)
    assert first is not None
    confirm.put_back(first, 0.0, runtime)
    with runtime.engine.begin() as connection:
        connection.execute(update(Confirmation).values(due_at=now_plus(-1.0), queued_at=now_plus(-age)))
    for _ in range(FAILURE_THRESHOLD - 1):
        with pytest.raises(NotSent), upstream.calls.guard():
            raise NotSent("connect", "refused")
    lease = confirm.lease_due(first.id, runtime)
    assert lease is not None

    confirm.attempt(lease, runtime)

    with runtime.engine.connect() as connection:
        assert connection.execute(select(Confirmation.state)).scalar_one() == State.RETRYING
