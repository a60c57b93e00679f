"""What becomes of a confirmation: each kind of answer, after each kind of past, under each policy."""

from dataclasses import replace
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.booking import Booking
from models.states import Outcome, State
from tasks.decide import (
    READ_BACK_TRIES,
    AttemptResult,
    BookingNotFound,
    Decision,
    LookupResult,
    RetryPolicy,
    decide,
    earlier_error,
    may_send,
    must_look_up_after,
    must_look_up_first,
)
from tasks.lease import History
from worker.errors import AlreadyBooked, BadCredentials, Busy, NotSent, Poison, Refused, Unknown, XoneError
from worker.settings import RetrySettings, XoneSettings
from worker.xone.answers import BookingReceived

CONFIRMED, PENDING, RETRYING = State.CONFIRMED, State.PENDING, State.RETRYING
FAILED, REVIEW = State.FAILED, State.NEEDS_REVIEW
BOOKED, REFUSED, NOT_BOOKED, UNKNOWN = Outcome.BOOKED, Outcome.REFUSED, Outcome.NOT_BOOKED, Outcome.UNKNOWN
NOT_LISTED, AWAY, IMPOSSIBLE, SUSPENDED = (
    LookupResult.NOT_LISTED,
    LookupResult.UNAVAILABLE,
    LookupResult.IMPOSSIBLE,
    LookupResult.SUSPENDED,
)

RESEND = RetryPolicy()
NO_RESEND = RetryPolicy(resend_after_unknown=False)

FIRST = History()
AFTER_UNKNOWN = History(attempts_used=3, age=60, answer_unknown=True, code="timeout", detail="no answer")
AFTER_NOT_SENT = History(attempts_used=3, age=60, code="connect", detail="XONE can't be reached")
AFTER_BOOKED = History(attempts_used=3, age=60, code="already-booked", http_status=409, detail="exists as INS-1")
LAST = History(attempts_used=11, age=60)
LAST_AFTER_UNKNOWN = replace(AFTER_UNKNOWN, attempts_used=11)
OLD = History(attempts_used=3, age=86400)
OLD_AFTER_UNKNOWN = replace(AFTER_UNKNOWN, age=86400)


def booking(status: str | None = "CONFIRMED") -> Booking:
    return Booking(id="INS-1", offer_id="o-1", status=status)


def already_booked(with_booking: Booking | None = None) -> AlreadyBooked:
    error = AlreadyBooked("already-booked", "XONE says that a booking exists as INS-1", 409)
    error.booking = with_booking
    return error


def refused(status: int) -> Refused:
    return Refused(f"http-{status}", f"XONE answered {status}", status)


def unknown(status: int) -> Unknown:
    return Unknown(f"http-{status}", f"XONE answered {status}", status)


def busy(status: int, retry_after: float | None = None) -> Busy:
    return Busy(f"http-{status}", f"XONE answered {status}", status, retry_after=retry_after)


BAD_CREDENTIALS = BadCredentials("credentials", "XONE does not accept the token it gave (401)", 401)
NOT_SENT = NotSent("connect", "XONE can't be reached")
REDIRECT = Refused("redirect", "XONE answered with a redirect (307)", 307)

ALL_REFUSALS = [*(refused(status) for status in (400, 402, 403, 404, 405, 406, 410, 413, 414, 415, 422)), REDIRECT]
ALL_UNKNOWNS = [
    *(unknown(status) for status in (408, 425, 500, 501, 502, 504, 520, 599)),
    Unknown("timeout", "no whole answer within XONE_TIMEOUT"),
    Unknown("connection-lost", "the connection broke"),
    Unknown("too-large", "the answer is larger than 5 MiB"),
    Unknown("bad-answer", "no JSON", 200, b"<html>"),
    Unknown("wrong-offer", "the booking of another offer", 200, b"{}"),
]
UNCOUNTED = [busy(423), busy(429, 1.0), BAD_CREDENTIALS]
COUNTED_NOT_BOOKED = [busy(503, 1.0), busy(503), NOT_SENT]


class Row(NamedTuple):
    answer: AttemptResult
    history: History
    retry_policy: RetryPolicy
    state: State
    outcome: Outcome
    delay: tuple[float, float] | None = None  # with a dice of 0 and of nearly 1
    uses_attempt: bool = True
    marked_unknown: bool = False
    in_vain: bool = False


def rows() -> list[Row]:
    early, later = (2, 4), (2, 32)  # after no attempt and after three
    table: list[Row] = []

    # Booked, whatever was before.
    for history in (FIRST, AFTER_UNKNOWN, AFTER_BOOKED, LAST, LAST_AFTER_UNKNOWN, OLD_AFTER_UNKNOWN):
        for retry_policy in (RESEND, NO_RESEND):
            table += [
                Row(BookingReceived(booking(), 201), history, retry_policy, CONFIRMED, BOOKED),
                Row(BookingReceived(booking("PENDING"), 200), history, retry_policy, PENDING, BOOKED),
                Row(already_booked(booking()), history, retry_policy, CONFIRMED, BOOKED),
                Row(already_booked(booking("PENDING")), history, retry_policy, PENDING, BOOKED),
            ]

    # Refused: for good, unless an earlier answer is unknown.
    for error in ALL_REFUSALS:
        for history in (FIRST, AFTER_NOT_SENT, LAST, OLD):
            table += [Row(error, history, retry_policy, FAILED, REFUSED) for retry_policy in (RESEND, NO_RESEND)]
        for retry_policy in (RESEND, NO_RESEND):
            table += [
                Row(
                    BookingNotFound(NOT_LISTED, error),
                    AFTER_UNKNOWN,
                    retry_policy,
                    REVIEW,
                    REFUSED,
                    marked_unknown=True,
                ),
                Row(
                    BookingNotFound(IMPOSSIBLE, error),
                    AFTER_UNKNOWN,
                    retry_policy,
                    REVIEW,
                    REFUSED,
                    marked_unknown=True,
                ),
                Row(
                    BookingNotFound(AWAY, error),
                    AFTER_UNKNOWN,
                    retry_policy,
                    RETRYING,
                    REFUSED,
                    later,
                    marked_unknown=True,
                ),
                Row(
                    BookingNotFound(AWAY, error), LAST_AFTER_UNKNOWN, retry_policy, REVIEW, REFUSED, marked_unknown=True
                ),
                Row(
                    BookingNotFound(AWAY, error), OLD_AFTER_UNKNOWN, retry_policy, REVIEW, REFUSED, marked_unknown=True
                ),
                Row(error, AFTER_UNKNOWN, retry_policy, RETRYING, REFUSED, later, marked_unknown=True),
            ]

    # Unknown: sent again, and to a person where that leads to nothing.
    for error in ALL_UNKNOWNS:
        table += [
            Row(error, FIRST, RESEND, RETRYING, UNKNOWN, early, marked_unknown=True),
            Row(error, AFTER_UNKNOWN, RESEND, RETRYING, UNKNOWN, later, marked_unknown=True),
        ]
        for history in (LAST, LAST_AFTER_UNKNOWN, OLD, OLD_AFTER_UNKNOWN):
            delay = (2, 300) if history.attempts_used > 3 else later
            for retry_policy in (RESEND, NO_RESEND):
                table += [
                    Row(BookingNotFound(lookup, error), history, retry_policy, REVIEW, UNKNOWN, marked_unknown=True)
                    for lookup in (NOT_LISTED, AWAY, IMPOSSIBLE)
                ]
                # the last look is still to be made, when calls go on
                table += [
                    Row(BookingNotFound(SUSPENDED, error), history, retry_policy, RETRYING, UNKNOWN, delay, False, True)
                ]
        for history, delay in ((FIRST, early), (AFTER_UNKNOWN, later)):
            table += [
                Row(
                    BookingNotFound(NOT_LISTED, error), history, NO_RESEND, RETRYING, UNKNOWN, delay,
                    marked_unknown=True, in_vain=True,
                ),
                Row(BookingNotFound(AWAY, error), history, NO_RESEND, RETRYING, UNKNOWN, delay, marked_unknown=True),
                Row(BookingNotFound(IMPOSSIBLE, error), history, NO_RESEND, REVIEW, UNKNOWN, marked_unknown=True),
            ]  # fmt: skip

    # Not booked: tried again; an earlier unknown answer stays unknown.
    for error in (*UNCOUNTED, *COUNTED_NOT_BOOKED):
        uses_attempt = error in COUNTED_NOT_BOOKED
        for retry_policy in (RESEND, NO_RESEND):
            table += [
                Row(error, FIRST, retry_policy, RETRYING, NOT_BOOKED, early, uses_attempt),
                Row(error, AFTER_UNKNOWN, retry_policy, RETRYING, NOT_BOOKED, later, uses_attempt, marked_unknown=True),
                Row(error, OLD, retry_policy, FAILED, NOT_BOOKED),
                Row(
                    BookingNotFound(NOT_LISTED, error),
                    OLD_AFTER_UNKNOWN,
                    retry_policy,
                    REVIEW,
                    UNKNOWN,
                    marked_unknown=True,
                ),
            ]
    for error in COUNTED_NOT_BOOKED:
        table += [
            Row(error, LAST, RESEND, FAILED, NOT_BOOKED),
            Row(BookingNotFound(NOT_LISTED, error), LAST_AFTER_UNKNOWN, RESEND, REVIEW, UNKNOWN, marked_unknown=True),
        ]
    for error in UNCOUNTED:
        table += [
            Row(error, LAST, RESEND, RETRYING, NOT_BOOKED, (2, 300), uses_attempt=False),
            Row(
                error,
                LAST_AFTER_UNKNOWN,
                RESEND,
                RETRYING,
                NOT_BOOKED,
                (2, 300),
                uses_attempt=False,
                marked_unknown=True,
            ),
        ]

    # Workers die on it: for a person.
    poison = Poison("poison", "5 workers in a row did not come back from this confirmation")
    for history in (FIRST, AFTER_UNKNOWN, AFTER_BOOKED, LAST, OLD):
        table += [
            Row(poison, history, retry_policy, REVIEW, UNKNOWN, marked_unknown=True)
            for retry_policy in (RESEND, NO_RESEND)
        ]

    # A booking exists, says XONE, and does not show it.
    error = already_booked()
    tries_used_up = replace(AFTER_BOOKED, read_backs=READ_BACK_TRIES - 1)
    for retry_policy in (RESEND, NO_RESEND):
        table += [
            Row(BookingNotFound(NOT_LISTED, error), FIRST, retry_policy, RETRYING, UNKNOWN, early, in_vain=True),
            Row(BookingNotFound(NOT_LISTED, error), AFTER_BOOKED, retry_policy, RETRYING, UNKNOWN, later, in_vain=True),
            Row(BookingNotFound(NOT_LISTED, error), tries_used_up, retry_policy, REVIEW, UNKNOWN),
            Row(BookingNotFound(AWAY, error), tries_used_up, retry_policy, RETRYING, UNKNOWN, later),
            Row(BookingNotFound(AWAY, error), FIRST, retry_policy, RETRYING, UNKNOWN, early),
            Row(BookingNotFound(AWAY, error), LAST, retry_policy, REVIEW, UNKNOWN),
            Row(BookingNotFound(NOT_LISTED, error), OLD, retry_policy, REVIEW, UNKNOWN),
            Row(BookingNotFound(IMPOSSIBLE, error), FIRST, retry_policy, REVIEW, UNKNOWN),
            Row(
                BookingNotFound(NOT_LISTED, error),
                AFTER_UNKNOWN,
                retry_policy,
                RETRYING,
                UNKNOWN,
                later,
                True,
                True,
                True,
            ),
            Row(error, FIRST, retry_policy, RETRYING, UNKNOWN, early),
        ]
    return table


def name_of(value: Any) -> str | None:
    if isinstance(value, Row):
        answer = value.answer
        lookup, answer = (answer.lookup.name, answer.error) if isinstance(answer, BookingNotFound) else ("", answer)
        what = answer.code if isinstance(answer, XoneError) else answer.booking.status
        past = f"{value.history.attempts_used}-{value.history.code}-{value.history.age:.0f}"
        return f"{what}-{lookup}-{past}-{'resend' if value.retry_policy.resend_after_unknown else 'review'}"
    return None


@pytest.mark.parametrize("row", rows(), ids=name_of)
def test_the_table_of_answers(row: Row) -> None:
    lowest, highest = (decide(row.answer, row.history, row.retry_policy, dice) for dice in (0.0, 0.999999))

    for decision in (lowest, highest):
        assert (decision.state, decision.outcome, decision.uses_attempt) == (row.state, row.outcome, row.uses_attempt)
        assert (decision.answer_unknown, decision.not_listed) == (row.marked_unknown, row.in_vain)
    if row.delay is None:
        assert lowest.delay is None
        assert highest.delay is None
    else:
        assert (lowest.delay, highest.delay) == pytest.approx(row.delay, rel=1e-3)


def test_a_decision_bears_what_is_recorded() -> None:
    booked = decide(BookingReceived(booking(), 201), FIRST, RESEND, 0.5)
    shown_by_409 = decide(already_booked(booking()), FIRST, RESEND, 0.5)
    failed = decide(refused(422), FIRST, RESEND, 0.5)
    missing = decide(BookingNotFound(IMPOSSIBLE, unknown(500)), FIRST, NO_RESEND, 0.5)

    assert (booked.booking, booked.http_status, booked.error) == (booking(), 201, None)
    assert (shown_by_409.booking, shown_by_409.http_status, shown_by_409.error) == (booking(), 409, None)
    assert failed.error is not None
    assert (failed.error.code, failed.http_status) == ("http-422", 422)
    assert missing.error is not None
    assert (missing.error.code, missing.http_status) == ("http-500", 500)


@pytest.mark.parametrize(
    ("status", "statuses", "state"),
    [
        ("CONFIRMED", {"CONFIRMED", "ACTIVE"}, CONFIRMED),
        ("confirmed", {"CONFIRMED", "ACTIVE"}, CONFIRMED),
        ("Active", {"CONFIRMED", "ACTIVE"}, CONFIRMED),
        ("PENDING", {"CONFIRMED", "ACTIVE"}, PENDING),
        ("CONFIRMED", {"ISSUED"}, PENDING),
        ("", {"CONFIRMED"}, PENDING),
        (None, {"CONFIRMED"}, PENDING),
        ("anything new", set(), PENDING),
    ],
)
def test_the_status_makes_a_booking_confirmed_or_pending(status: str | None, statuses: set[str], state: State) -> None:
    retry_policy = RetryPolicy(confirmed_statuses=frozenset(statuses))

    assert decide(BookingReceived(booking(status), 200), FIRST, retry_policy, 0.5).state is state


# --- When to look, when to send ---


@pytest.mark.parametrize(
    ("history", "retry_policy", "looks_first", "sends"),
    [
        (FIRST, RESEND, False, True),
        (FIRST, NO_RESEND, False, True),
        (AFTER_NOT_SENT, RESEND, False, True),
        (AFTER_NOT_SENT, NO_RESEND, False, True),
        (AFTER_UNKNOWN, RESEND, True, True),
        (AFTER_UNKNOWN, NO_RESEND, True, False),
        (OLD, RESEND, False, True),
        (OLD_AFTER_UNKNOWN, RESEND, True, False),
        (AFTER_BOOKED, RESEND, True, False),
        (AFTER_BOOKED, NO_RESEND, True, False),
        (replace(AFTER_BOOKED, answer_unknown=True), RESEND, True, False),
    ],
)
def test_what_comes_before_sending(history: History, retry_policy: RetryPolicy, looks_first: bool, sends: bool) -> None:
    assert (must_look_up_first(history), may_send(history, retry_policy)) == (looks_first, sends)


@pytest.mark.parametrize(
    ("error", "history", "retry_policy", "looks"),
    [
        (already_booked(), FIRST, RESEND, True),
        (already_booked(), LAST, NO_RESEND, True),
        (already_booked(booking()), AFTER_UNKNOWN, RESEND, False),
        *((error, FIRST, RESEND, False) for error in ALL_REFUSALS),
        *((error, LAST, NO_RESEND, False) for error in ALL_REFUSALS),
        *((error, AFTER_UNKNOWN, RESEND, True) for error in ALL_REFUSALS),
        *((error, FIRST, RESEND, False) for error in ALL_UNKNOWNS),
        *((error, AFTER_UNKNOWN, RESEND, False) for error in ALL_UNKNOWNS),
        *((error, LAST, RESEND, True) for error in ALL_UNKNOWNS),
        *((error, OLD, RESEND, True) for error in ALL_UNKNOWNS),
        *((error, FIRST, NO_RESEND, True) for error in ALL_UNKNOWNS),
        *((error, FIRST, NO_RESEND, False) for error in (*UNCOUNTED, *COUNTED_NOT_BOOKED)),
        *((error, OLD, RESEND, False) for error in (*UNCOUNTED, *COUNTED_NOT_BOOKED)),
        *((error, AFTER_UNKNOWN, RESEND, False) for error in (*UNCOUNTED, *COUNTED_NOT_BOOKED)),
        *((error, OLD_AFTER_UNKNOWN, RESEND, True) for error in (*UNCOUNTED, *COUNTED_NOT_BOOKED)),
        *((error, LAST_AFTER_UNKNOWN, RESEND, True) for error in COUNTED_NOT_BOOKED),
        *((error, LAST_AFTER_UNKNOWN, RESEND, False) for error in UNCOUNTED),
    ],
)
def test_which_answers_only_the_list_of_bookings_can_explain(
    error: XoneError, history: History, retry_policy: RetryPolicy, looks: bool
) -> None:
    assert must_look_up_after(error, history, retry_policy) is looks


@pytest.mark.parametrize(
    ("history", "kind", "code", "detail"),
    [
        (AFTER_UNKNOWN, Unknown, "timeout", "no answer"),
        (AFTER_BOOKED, AlreadyBooked, "already-booked", "exists as INS-1"),
        (History(answer_unknown=True), Unknown, "connection-lost", "the worker stopped during this attempt"),
    ],
)
def test_an_attempt_without_an_answer_goes_on_with_the_earlier_one(
    history: History, kind: type[XoneError], code: str, detail: str
) -> None:
    error = earlier_error(history)

    assert type(error) is kind
    assert (error.code, error.detail, error.http_status) == (code, detail, history.http_status)


# --- Delays ---


@pytest.mark.parametrize(
    ("attempts_used", "longest", "middle"),
    [
        (0, 4, 3),
        (1, 8, 5),
        (2, 16, 9),
        (3, 32, 17),
        (4, 64, 33),
        (5, 128, 65),
        (6, 256, 129),
        (7, 300, 151),
        (8, 300, 151),
        (9, 300, 151),
        (10, 300, 151),
        (5_000, 300, 151),
    ],
)
def test_pauses_double_up_to_the_longest_with_full_jitter(attempts_used: int, longest: float, middle: float) -> None:
    history, retry_policy = History(attempts_used=attempts_used), RetryPolicy(max_attempts=10_000)

    def delay(dice: float) -> float | None:
        return decide(NOT_SENT, history, retry_policy, dice).delay

    assert delay(0.0) == 2
    assert delay(0.5) == middle
    assert delay(0.9999) == pytest.approx(longest, rel=1e-3)


@pytest.mark.parametrize(
    ("error", "dice", "delay"),
    [
        (busy(429, 0.0), 0.0, 2),
        (busy(429, 1.0), 0.0, 2),
        (busy(429, 10.0), 0.0, 10),
        (busy(429, 10.0), 0.5, 11),
        (busy(503, 3600.0), 0.5, 3601),
        (busy(503, None), 0.5, 3),
    ],
)
def test_what_xone_asks_for_is_the_least_pause(error: Busy, dice: float, delay: float) -> None:
    assert decide(error, FIRST, RESEND, dice).delay == delay


ERRORS = st.sampled_from([*ALL_REFUSALS, *ALL_UNKNOWNS, *UNCOUNTED, *COUNTED_NOT_BOOKED, already_booked()]) | st.builds(
    busy, st.sampled_from([423, 429, 503]), st.floats(0, 3600)
)
ANSWERS = st.one_of(
    ERRORS,
    st.builds(BookingNotFound, st.sampled_from(LookupResult), ERRORS),
    st.builds(BookingReceived, st.builds(booking, st.sampled_from(["CONFIRMED", "PENDING", None])), st.just(200)),
)
HISTORIES = st.builds(
    History,
    attempts_used=st.integers(0, 10_000),
    age=st.floats(0, 200_000),
    answer_unknown=st.booleans(),
    read_backs=st.integers(0, 20),
    code=st.sampled_from([None, "timeout", "already-booked", "connect"]),
)
POLICIES = st.builds(
    RetryPolicy,
    max_attempts=st.integers(1, 20_000),
    max_age=st.floats(1, 400_000),
    base_delay=st.floats(0.01, 10),
    max_delay=st.floats(10, 10_000),
    resend_after_unknown=st.booleans(),
)
DICE = st.floats(0, 1, exclude_max=True)
MANY = settings(max_examples=400, deadline=None, derandomize=True)


@MANY
@given(ANSWERS, HISTORIES, POLICIES, DICE)
def test_a_delay_is_within_its_bounds(
    answer: AttemptResult, history: History, retry_policy: RetryPolicy, dice: float
) -> None:
    delay = decide(answer, history, retry_policy, dice).delay

    if delay is not None:
        error = answer.error if isinstance(answer, BookingNotFound) else answer
        asked_for = (error.retry_after if isinstance(error, XoneError) else None) or 0.0
        assert delay >= max(retry_policy.base_delay, asked_for)
        assert delay <= max(retry_policy.max_delay, asked_for + retry_policy.base_delay)


@MANY
@given(ANSWERS, HISTORIES, POLICIES, DICE)
def test_who_retries_has_a_delay_and_who_has_ended_has_none(
    answer: AttemptResult, history: History, retry_policy: RetryPolicy, dice: float
) -> None:
    decision = decide(answer, history, retry_policy, dice)

    assert (decision.state is RETRYING) == (decision.delay is not None)
    assert (decision.outcome is BOOKED) == (decision.booking is not None) == (decision.error is None)
    assert decision.state in {CONFIRMED, PENDING, RETRYING, FAILED, REVIEW}


@MANY
@given(ANSWERS, HISTORIES.map(lambda history: replace(history, answer_unknown=True)), POLICIES, DICE)
def test_after_an_unknown_answer_nothing_fails_and_nothing_is_forgotten(
    answer: AttemptResult, history: History, retry_policy: RetryPolicy, dice: float
) -> None:
    decision = decide(answer, history, retry_policy, dice)

    assert decision.state is not FAILED
    assert decision.answer_unknown or decision.state in {CONFIRMED, PENDING}


@MANY
@given(st.builds(BookingNotFound, st.sampled_from(LookupResult), ERRORS), HISTORIES, POLICIES, DICE)
def test_a_missing_booking_is_never_a_failure(
    missing: BookingNotFound, history: History, retry_policy: RetryPolicy, dice: float
) -> None:
    assert decide(missing, history, retry_policy, dice).state in {RETRYING, REVIEW}


@MANY
@given(ERRORS, POLICIES, DICE)
def test_every_confirmation_comes_to_an_end(error: XoneError, retry_policy: RetryPolicy, dice: float) -> None:
    old = History(age=retry_policy.max_age, answer_unknown=must_look_up_first(AFTER_UNKNOWN))

    assert decide(error, old, retry_policy, dice).state is not RETRYING


def test_the_policy_is_made_of_the_settings() -> None:
    retry = RetrySettings(RETRY_MAX_ATTEMPTS=3, RETRY_MAX_AGE=10, RETRY_BASE_DELAY=1, RETRY_MAX_DELAY=5)
    xone = XoneSettings(
        XONE_CLIENT_ID="i", XONE_CLIENT_SECRET="s", XONE_AFTER_UNKNOWN="review", XONE_CONFIRMED_STATUSES="issued, Done"
    )

    assert RetryPolicy.of(retry, xone) == RetryPolicy(3, 10, 1, 5, False, frozenset({"ISSUED", "DONE"}))


def test_a_decision_is_a_value() -> None:
    assert decide(NOT_SENT, FIRST, RESEND, 0.5) == Decision(
        RETRYING, NOT_BOOKED, error=NOT_SENT, delay=3.0, uses_attempt=True
    )
