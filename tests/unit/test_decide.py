"""The decision on a confirmation: each kind of answer, after each kind of history, under each retry policy."""

from dataclasses import replace
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.booking import Booking
from models.states import BookingStatuses, Outcome, State
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
from worker.errors import (
    AlreadyBooked,
    BadCredentials,
    Busy,
    NotSent,
    OrderEnded,
    Oversized,
    Poison,
    Refused,
    Unknown,
    XoneError,
)
from worker.settings import RetrySettings, XoneSettings
from worker.xone.answers import BookingReceived

CONFIRMED, PENDING, RETRYING = State.CONFIRMED, State.PENDING, State.RETRYING
FAILED, REVIEW = State.FAILED, State.NEEDS_REVIEW
BOOKED, REFUSED, NOT_BOOKED, UNKNOWN = Outcome.BOOKED, Outcome.REFUSED, Outcome.NOT_BOOKED, Outcome.UNKNOWN
NOT_LISTED, DOWN, IMPOSSIBLE, SUSPENDED = (
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

REFUSED_422 = refused(422)
TIMEOUT = Unknown("timeout", "no whole answer within XONE_TIMEOUT")
EXISTS = already_booked()
OVERSIZED = Oversized("too-large", "XONE's answer (200) is larger than 512 KiB", 200, b"{}")
POISON = Poison("poison", "5 workers in a row did not come back from this confirmation")

AFTER_SEVEN_LOOKUPS = replace(AFTER_BOOKED, read_backs=READ_BACK_TRIES - 1)
EXPIRED = OrderEnded("expired")
UNLISTED_SO_FAR = replace(AFTER_UNKNOWN, read_backs=READ_BACK_TRIES - 1)


class Expected(NamedTuple):
    state: State
    outcome: Outcome
    delay: tuple[float, float] | None = None  # seconds, with a dice of 0 and of nearly 1
    uses_attempt: bool = True
    marked_unknown: bool = False
    not_listed: bool = False


SOON, LATER, LONG = (2, 4), (2, 32), (2, 300)  # after no attempt, after three, after eleven


def retried(outcome: Outcome, delay: tuple[float, float], **others: Any) -> Expected:
    return Expected(RETRYING, outcome, delay, **others)


def still_unknown(outcome: Outcome, delay: tuple[float, float] | None = None, **others: Any) -> Expected:
    """Retried and marked as unknown; without a delay, needs review and marked as unknown."""
    return Expected(RETRYING if delay else REVIEW, outcome, delay, marked_unknown=True, **others)


absent = BookingNotFound  # a short name for the table

# One representative of each class of answer, after each kind of history that makes a difference. The properties at the
# end of this file hold that nothing else does. test_xone_client.py holds which status belongs to which class.
TABLE: list[tuple[str, AttemptResult, History, Expected]] = [
    # Booked: whatever the history.
    ("booked", BookingReceived(booking(), 201), FIRST, Expected(CONFIRMED, BOOKED)),
    ("booked, pending", BookingReceived(booking("PENDING"), 200), FIRST, Expected(PENDING, BOOKED)),
    ("booked at last after unknown", BookingReceived(booking(), 201), LAST_AFTER_UNKNOWN, Expected(CONFIRMED, BOOKED)),
    ("booked when too old", BookingReceived(booking(), 201), OLD_AFTER_UNKNOWN, Expected(CONFIRMED, BOOKED)),
    ("409 with the booking", already_booked(booking()), AFTER_BOOKED, Expected(CONFIRMED, BOOKED)),
    ("409 with a pending booking", already_booked(booking("PENDING")), LAST, Expected(PENDING, BOOKED)),
    # Refused: for good, unless an earlier answer is unknown.
    ("refused", REFUSED_422, FIRST, Expected(FAILED, REFUSED)),
    ("refused, after it was not sent", REFUSED_422, AFTER_NOT_SENT, Expected(FAILED, REFUSED)),
    ("refused at last", REFUSED_422, LAST, Expected(FAILED, REFUSED)),
    ("refused when too old", REFUSED_422, OLD, Expected(FAILED, REFUSED)),
    ("redirect", REDIRECT, FIRST, Expected(FAILED, REFUSED)),
    ("refused after unknown", REFUSED_422, AFTER_UNKNOWN, still_unknown(REFUSED, LATER)),
    ("refused after unknown, not listed", absent(NOT_LISTED, REFUSED_422), AFTER_UNKNOWN, still_unknown(REFUSED)),
    ("refused after unknown, no list", absent(IMPOSSIBLE, REFUSED_422), AFTER_UNKNOWN, still_unknown(REFUSED)),
    ("refused after unknown, list down", absent(DOWN, REFUSED_422), AFTER_UNKNOWN, still_unknown(REFUSED, LATER)),
    ("refused after unknown, then down", absent(DOWN, REFUSED_422), LAST_AFTER_UNKNOWN, still_unknown(REFUSED, LONG)),
    ("refused after unknown, down, too old", absent(DOWN, REFUSED_422), OLD_AFTER_UNKNOWN, still_unknown(REFUSED)),
    # Unknown: retried; needs review if no further retry can help.
    ("unknown", TIMEOUT, FIRST, still_unknown(UNKNOWN, SOON)),
    ("500", unknown(500), FIRST, still_unknown(UNKNOWN, SOON)),
    ("unknown again", TIMEOUT, AFTER_UNKNOWN, still_unknown(UNKNOWN, LATER)),
    ("unknown, not listed", absent(NOT_LISTED, TIMEOUT), FIRST, still_unknown(UNKNOWN, SOON, not_listed=True)),
    ("again not listed", absent(NOT_LISTED, TIMEOUT), AFTER_UNKNOWN, still_unknown(UNKNOWN, LATER, not_listed=True)),
    ("unknown, list down", absent(DOWN, TIMEOUT), AFTER_UNKNOWN, still_unknown(UNKNOWN, LATER)),
    ("unknown, no list", absent(IMPOSSIBLE, TIMEOUT), FIRST, still_unknown(UNKNOWN)),
    ("unknown at last, not listed", absent(NOT_LISTED, TIMEOUT), LAST, still_unknown(UNKNOWN)),
    ("unknown at last, list down", absent(DOWN, TIMEOUT), LAST_AFTER_UNKNOWN, still_unknown(UNKNOWN, LONG)),
    ("unknown when too old, not listed", absent(NOT_LISTED, TIMEOUT), OLD, still_unknown(UNKNOWN)),
    ("unknown when too old, list down", absent(DOWN, TIMEOUT), OLD_AFTER_UNKNOWN, still_unknown(UNKNOWN)),
    # The last lookup is made when calls resume.
    ("at last, calls suspended", absent(SUSPENDED, TIMEOUT), LAST, still_unknown(UNKNOWN, LONG)),
    ("too old, calls suspended", absent(SUSPENDED, TIMEOUT), OLD, still_unknown(UNKNOWN, LATER)),
    # Not booked: retried; an earlier unknown answer stays unknown.
    ("not sent", NOT_SENT, FIRST, retried(NOT_BOOKED, SOON)),
    ("not sent after unknown", NOT_SENT, AFTER_UNKNOWN, still_unknown(NOT_BOOKED, LATER)),
    ("not sent at last", NOT_SENT, LAST, Expected(FAILED, NOT_BOOKED)),
    ("not sent when too old", NOT_SENT, OLD, Expected(FAILED, NOT_BOOKED)),
    ("not sent at last after unknown", absent(NOT_LISTED, NOT_SENT), LAST_AFTER_UNKNOWN, still_unknown(UNKNOWN)),
    ("503", busy(503, 1.0), FIRST, retried(NOT_BOOKED, SOON)),
    ("503 at last", busy(503), LAST, Expected(FAILED, NOT_BOOKED)),
    # Throttling and wrong credentials use up no attempt, and end only at the maximum age.
    ("429", busy(429, 1.0), FIRST, retried(NOT_BOOKED, SOON, uses_attempt=False)),
    ("429 after unknown", busy(429, 1.0), AFTER_UNKNOWN, still_unknown(NOT_BOOKED, LATER, uses_attempt=False)),
    ("429 at last", busy(429, 1.0), LAST, retried(NOT_BOOKED, LONG, uses_attempt=False)),
    ("429 at the very last", busy(429, 1.0), LAST_AFTER_UNKNOWN, still_unknown(NOT_BOOKED, LONG, uses_attempt=False)),
    ("429 when too old", busy(429, 1.0), OLD, Expected(FAILED, NOT_BOOKED)),
    ("429 when too old after unknown", absent(NOT_LISTED, busy(429)), OLD_AFTER_UNKNOWN, still_unknown(UNKNOWN)),
    ("423 at last", busy(423), LAST, retried(NOT_BOOKED, LONG, uses_attempt=False)),
    ("credentials at last", BAD_CREDENTIALS, LAST, retried(NOT_BOOKED, LONG, uses_attempt=False)),
    ("credentials when too old", BAD_CREDENTIALS, OLD, Expected(FAILED, NOT_BOOKED)),
    # Workers die on the confirmation: needs review.
    ("poison", POISON, FIRST, still_unknown(UNKNOWN)),
    ("poison at last", POISON, LAST, still_unknown(UNKNOWN)),
    # The booking is too large to be stored: needs review.
    ("too large", OVERSIZED, FIRST, still_unknown(UNKNOWN)),
    ("too large after unknown", OVERSIZED, AFTER_UNKNOWN, still_unknown(UNKNOWN)),
    # XONE says that a booking exists, but does not show it.
    ("exists", EXISTS, FIRST, retried(UNKNOWN, SOON)),
    ("exists, not listed", absent(NOT_LISTED, EXISTS), FIRST, retried(UNKNOWN, SOON, not_listed=True)),
    ("exists, again not listed", absent(NOT_LISTED, EXISTS), AFTER_BOOKED, retried(UNKNOWN, LATER, not_listed=True)),
    ("exists, not listed 8 times", absent(NOT_LISTED, EXISTS), AFTER_SEVEN_LOOKUPS, Expected(REVIEW, UNKNOWN)),
    ("exists, list down after 7 lookups", absent(DOWN, EXISTS), AFTER_SEVEN_LOOKUPS, retried(UNKNOWN, LATER)),
    ("exists, list down", absent(DOWN, EXISTS), FIRST, retried(UNKNOWN, SOON)),
    ("exists, list down at last", absent(DOWN, EXISTS), LAST, retried(UNKNOWN, LONG)),
    ("exists when too old, list down", absent(DOWN, EXISTS), OLD, Expected(REVIEW, UNKNOWN)),
    ("exists when too old, not listed", absent(NOT_LISTED, EXISTS), OLD, Expected(REVIEW, UNKNOWN)),
    ("exists, no list", absent(IMPOSSIBLE, EXISTS), FIRST, Expected(REVIEW, UNKNOWN)),
    ("exists after unknown", absent(NOT_LISTED, EXISTS), AFTER_UNKNOWN, still_unknown(UNKNOWN, LATER, not_listed=True)),
    # The order has ended: no call any more. Where XONE may have booked, the list decides once it had its time.
    ("expired", EXPIRED, FIRST, Expected(FAILED, NOT_BOOKED)),
    ("expired at last", EXPIRED, LAST, Expected(FAILED, NOT_BOOKED)),
    ("expired after it was not sent", EXPIRED, AFTER_NOT_SENT, Expected(FAILED, NOT_BOOKED)),
    ("expired, not listed", absent(NOT_LISTED, EXPIRED), AFTER_UNKNOWN,
     still_unknown(NOT_BOOKED, (4, 4), uses_attempt=False, not_listed=True)),
    ("expired at last, not listed", absent(NOT_LISTED, EXPIRED), replace(LAST_AFTER_UNKNOWN, read_backs=6, age=1e9),
     still_unknown(NOT_BOOKED, (256, 256), uses_attempt=False, not_listed=True)),
    ("expired, not listed 8 times", absent(NOT_LISTED, EXPIRED), UNLISTED_SO_FAR, Expected(FAILED, NOT_BOOKED)),
    ("expired, no list", absent(IMPOSSIBLE, TIMEOUT), UNLISTED_SO_FAR, still_unknown(UNKNOWN)),
    ("expired, XONE says that a booking exists", absent(NOT_LISTED, EXISTS), AFTER_SEVEN_LOOKUPS,
     Expected(REVIEW, UNKNOWN)),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "history", "expected"), [row[1:] for row in TABLE], ids=[row[0] for row in TABLE])
def test_each_answer_has_its_outcome(answer: AttemptResult, history: History, expected: Expected) -> None:
    lowest, highest = (decide(answer, history, RESEND, dice) for dice in (0.0, 0.999999))

    for decision in (lowest, highest):
        assert (decision.state, decision.outcome, decision.uses_attempt) == (
            expected.state,
            expected.outcome,
            expected.uses_attempt,
        )
        assert (decision.answer_unknown, decision.not_listed) == (expected.marked_unknown, expected.not_listed)
    if expected.delay is None:
        assert (lowest.delay, highest.delay) == (None, None)
    else:
        assert (lowest.delay, highest.delay) == pytest.approx(expected.delay, rel=1e-3)


def test_a_decision_holds_what_is_recorded() -> None:
    booked = decide(BookingReceived(booking(), 201), FIRST, RESEND, 0.5)
    shown_by_409 = decide(already_booked(booking()), FIRST, RESEND, 0.5)
    failed = decide(refused(422), FIRST, RESEND, 0.5)
    not_found_answer = decide(BookingNotFound(IMPOSSIBLE, unknown(500)), FIRST, NO_RESEND, 0.5)

    assert (booked.booking, booked.http_status, booked.error) == (booking(), 201, None)
    assert (shown_by_409.booking, shown_by_409.http_status, shown_by_409.error) == (booking(), 409, None)
    assert failed.error is not None
    assert (failed.error.code, failed.http_status) == ("http-422", 422)
    assert not_found_answer.error is not None
    assert (not_found_answer.error.code, not_found_answer.http_status) == ("http-500", 500)


@pytest.mark.parametrize(
    ("status", "statuses", "state"),
    [
        ("CONFIRMED", {"CONFIRMED", "ACTIVE"}, CONFIRMED),
        ("confirmed", {"CONFIRMED", "ACTIVE"}, CONFIRMED),
        ("Active", {"CONFIRMED", "ACTIVE"}, CONFIRMED),
        ("PENDING", {"CONFIRMED", "ACTIVE"}, PENDING),
        ("CONFIRMED", {"ISSUED"}, PENDING),
        (" issued ", {"ISSUED"}, CONFIRMED),
        ("PENDING_PAYMENT", {"CONFIRMED"}, PENDING),
        ("FAILED", {"CONFIRMED"}, State.CANCELLED),
        ("cancelled", {"CONFIRMED"}, State.CANCELLED),
        ("RENEWED", {"CONFIRMED"}, PENDING),
        ("", {"CONFIRMED"}, PENDING),
        (None, {"CONFIRMED"}, PENDING),
        ("anything new", set(), PENDING),
    ],
)
def test_the_status_decides_on_the_state(status: str | None, statuses: set[str], state: State) -> None:
    retry_policy = RetryPolicy(statuses=BookingStatuses(confirmed=frozenset(statuses)))

    assert decide(BookingReceived(booking(status), 200), FIRST, retry_policy, 0.5).state is state
    assert decide(already_booked(booking(status)), FIRST, retry_policy, 0.5).state is state


# --- When to look up, when to send ---


@pytest.mark.parametrize(
    ("history", "retry_policy", "is_looked_up", "is_sent"),
    [
        (FIRST, RESEND, False, True),
        (FIRST, NO_RESEND, False, True),
        (AFTER_NOT_SENT, RESEND, False, True),
        (AFTER_NOT_SENT, NO_RESEND, False, True),
        (AFTER_UNKNOWN, RESEND, True, True),
        (replace(AFTER_UNKNOWN, attempts_used=12), RESEND, True, False),  # only the last look is still to come
        (AFTER_UNKNOWN, NO_RESEND, True, False),
        (OLD, RESEND, False, True),
        (OLD_AFTER_UNKNOWN, RESEND, True, False),
        (AFTER_BOOKED, RESEND, True, False),
        (AFTER_BOOKED, NO_RESEND, True, False),
        (replace(AFTER_BOOKED, answer_unknown=True), RESEND, True, False),
    ],
)
def test_a_lookup_comes_before_a_call_that_may_book_twice(
    history: History, retry_policy: RetryPolicy, is_looked_up: bool, is_sent: bool
) -> None:
    assert (must_look_up_first(history), may_send(history, retry_policy)) == (is_looked_up, is_sent)


@pytest.mark.parametrize(
    ("error", "history", "retry_policy", "is_looked_up"),
    [
        (EXISTS, FIRST, RESEND, True),
        (EXISTS, LAST, NO_RESEND, True),
        (already_booked(booking()), AFTER_UNKNOWN, RESEND, False),
        (REFUSED_422, FIRST, RESEND, False),
        (REFUSED_422, LAST, NO_RESEND, False),
        (REFUSED_422, AFTER_UNKNOWN, RESEND, True),
        (TIMEOUT, FIRST, RESEND, False),
        (TIMEOUT, AFTER_UNKNOWN, RESEND, False),
        (TIMEOUT, LAST, RESEND, True),
        (TIMEOUT, OLD, RESEND, True),
        (TIMEOUT, FIRST, NO_RESEND, True),
        (NOT_SENT, FIRST, NO_RESEND, False),
        (NOT_SENT, OLD, RESEND, False),
        (NOT_SENT, AFTER_UNKNOWN, RESEND, False),
        (NOT_SENT, LAST_AFTER_UNKNOWN, RESEND, True),
        (busy(503), LAST_AFTER_UNKNOWN, RESEND, True),
        (busy(429), LAST_AFTER_UNKNOWN, RESEND, False),
        (busy(429), OLD_AFTER_UNKNOWN, RESEND, True),
        (BAD_CREDENTIALS, LAST_AFTER_UNKNOWN, RESEND, False),
        (BAD_CREDENTIALS, OLD_AFTER_UNKNOWN, RESEND, True),
    ],
)
def test_a_lookup_follows_an_answer_that_only_the_list_can_explain(
    error: XoneError, history: History, retry_policy: RetryPolicy, is_looked_up: bool
) -> None:
    assert must_look_up_after(error, history, retry_policy) is is_looked_up


@pytest.mark.parametrize(
    ("history", "kind", "code", "detail"),
    [
        (AFTER_UNKNOWN, Unknown, "timeout", "no answer"),
        (AFTER_BOOKED, AlreadyBooked, "already-booked", "exists as INS-1"),
        (History(answer_unknown=True), Unknown, "connection-lost", "the worker stopped during this attempt"),
    ],
)
def test_an_attempt_without_an_answer_keeps_the_earlier_error(
    history: History, kind: type[XoneError], code: str, detail: str
) -> None:
    error = earlier_error(history)

    assert type(error) is kind
    assert (error.code, error.detail, error.http_status) == (code, detail, history.http_status)


# --- Delays ---


@pytest.mark.parametrize(
    ("attempts_used", "maximum", "middle"),
    [
        (0, 4, 3),
        (1, 8, 5),
        (2, 16, 9),
        (3, 32, 17),
        (6, 256, 129),
        (7, 300, 151),
        (5_000, 300, 151),
    ],
)
def test_delays_double_up_to_the_maximum_with_full_jitter(attempts_used: int, maximum: float, middle: float) -> None:
    history, retry_policy = History(attempts_used=attempts_used), RetryPolicy(max_attempts=10_000)

    def delay(dice: float) -> float | None:
        return decide(NOT_SENT, history, retry_policy, dice).delay

    assert delay(0.0) == 2
    assert delay(0.5) == middle
    assert delay(0.9999) == pytest.approx(maximum, rel=1e-3)


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
def test_retry_after_is_the_minimum_delay(error: Busy, dice: float, delay: float) -> None:
    assert decide(error, FIRST, RESEND, dice).delay == delay


# --- What holds for all answers and all histories ---

REFUSALS = st.sampled_from([400, 402, 403, 404, 405, 406, 410, 413, 414, 415, 422]).map(refused) | st.just(REDIRECT)
UNKNOWNS = st.sampled_from([408, 425, 500, 501, 502, 504, 520, 599]).map(unknown) | st.just(TIMEOUT)
THROTTLED = st.builds(busy, st.sampled_from([423, 429]), st.none() | st.floats(0, 3600))
NOT_BOOKEDS = st.builds(busy, st.just(503), st.none() | st.floats(0, 3600)) | st.just(NOT_SENT)
FREE = THROTTLED | st.just(BAD_CREDENTIALS)  # no attempt is used up
ERRORS = REFUSALS | UNKNOWNS | NOT_BOOKEDS | FREE | st.just(EXISTS)
MISSING = st.builds(BookingNotFound, st.sampled_from(LookupResult), ERRORS)
ANSWERS = (
    ERRORS
    | MISSING
    | st.just(POISON)
    | st.builds(BookingReceived, st.builds(booking, st.sampled_from(["CONFIRMED", "PENDING", None])), st.just(200))
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
MANY = settings(max_examples=200, deadline=None, derandomize=True)


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
def test_only_a_retry_has_a_delay(
    answer: AttemptResult, history: History, retry_policy: RetryPolicy, dice: float
) -> None:
    decision = decide(answer, history, retry_policy, dice)

    assert (decision.state is RETRYING) == (decision.delay is not None)
    assert (decision.outcome is BOOKED) == (decision.booking is not None) == (decision.error is None)
    assert decision.state in {CONFIRMED, PENDING, RETRYING, FAILED, REVIEW}


@MANY
@given(ANSWERS, HISTORIES.map(lambda history: replace(history, answer_unknown=True)), POLICIES, DICE)
def test_a_confirmation_with_an_unknown_answer_never_fails(
    answer: AttemptResult, history: History, retry_policy: RetryPolicy, dice: float
) -> None:
    decision = decide(answer, history, retry_policy, dice)

    assert decision.state is not FAILED
    assert decision.answer_unknown or decision.state in {CONFIRMED, PENDING}


@MANY
@given(MISSING, HISTORIES, POLICIES, DICE)
def test_a_missing_booking_is_never_a_failure(
    not_found_answer: BookingNotFound, history: History, retry_policy: RetryPolicy, dice: float
) -> None:
    assert decide(not_found_answer, history, retry_policy, dice).state in {RETRYING, REVIEW}


@MANY
@given(REFUSALS, HISTORIES.map(lambda history: replace(history, answer_unknown=False)), POLICIES, DICE)
def test_a_refusal_is_final_where_no_answer_is_unknown(
    error: Refused, history: History, retry_policy: RetryPolicy, dice: float
) -> None:
    decision = decide(error, history, retry_policy, dice)

    assert (decision.state, decision.outcome, decision.error) == (FAILED, REFUSED, error)


@MANY
@given(UNKNOWNS, HISTORIES, POLICIES, DICE)
def test_an_unknown_answer_is_marked(error: Unknown, history: History, retry_policy: RetryPolicy, dice: float) -> None:
    decision = decide(error, history, retry_policy, dice)

    assert decision.answer_unknown
    assert decision.state in {RETRYING, REVIEW}


@MANY
@given(ANSWERS, HISTORIES, POLICIES, DICE)
def test_only_errors_that_do_not_concern_the_offer_use_up_no_attempt(
    answer: AttemptResult, history: History, retry_policy: RetryPolicy, dice: float
) -> None:
    decision = decide(answer, history, retry_policy, dice)

    error = answer.error if isinstance(answer, BookingNotFound) else answer
    is_free = isinstance(error, BadCredentials) or (isinstance(error, Busy) and error.http_status in (423, 429))
    assert decision.uses_attempt is not (decision.state is RETRYING and is_free)


@MANY
@given(FREE, HISTORIES, POLICIES, DICE)
def test_an_error_that_uses_up_no_attempt_is_retried_until_the_maximum_age(
    error: XoneError, history: History, retry_policy: RetryPolicy, dice: float
) -> None:
    assert (decide(error, history, retry_policy, dice).state is RETRYING) is (history.age < retry_policy.max_age)


@MANY
@given(ANSWERS, HISTORIES, POLICIES, DICE)
def test_permission_to_send_again_changes_no_decision(
    answer: AttemptResult, history: History, retry_policy: RetryPolicy, dice: float
) -> None:
    other = replace(retry_policy, resend_after_unknown=not retry_policy.resend_after_unknown)

    assert decide(answer, history, retry_policy, dice) == decide(answer, history, other, dice)


@MANY
@given(UNKNOWNS, HISTORIES, POLICIES.map(lambda retry_policy: replace(retry_policy, resend_after_unknown=False)), DICE)
def test_under_review_no_second_call_follows_an_unknown_answer(
    error: Unknown, history: History, retry_policy: RetryPolicy, dice: float
) -> None:
    assert must_look_up_after(error, history, retry_policy)
    after = replace(history, answer_unknown=decide(error, history, retry_policy, dice).answer_unknown)
    assert must_look_up_first(after)
    assert not may_send(after, retry_policy)


@MANY
@given(HISTORIES, POLICIES)
def test_no_call_is_made_after_xone_said_that_a_booking_exists(history: History, retry_policy: RetryPolicy) -> None:
    history = replace(history, code="already-booked")

    assert must_look_up_first(history)
    assert not may_send(history, retry_policy)


@MANY
@given(ERRORS, POLICIES, DICE)
def test_every_confirmation_ends(error: XoneError, retry_policy: RetryPolicy, dice: float) -> None:
    old = History(age=retry_policy.max_age, answer_unknown=must_look_up_first(AFTER_UNKNOWN))

    assert decide(error, old, retry_policy, dice).state is not RETRYING


def test_the_retry_policy_is_made_from_the_settings() -> None:
    retry = RetrySettings(RETRY_MAX_ATTEMPTS=3, RETRY_MAX_AGE=10, RETRY_BASE_DELAY=1, RETRY_MAX_DELAY=5)
    xone = XoneSettings(
        XONE_CLIENT_ID="i",
        XONE_CLIENT_SECRET="s",
        XONE_AFTER_UNKNOWN="review",
        XONE_CONFIRMED_STATUSES="issued, Done",
        XONE_CANCELLED_STATUSES="gone",
    )

    statuses = BookingStatuses(frozenset({"ISSUED", "DONE"}), frozenset({"GONE"}))
    assert RetryPolicy.of(retry, xone) == RetryPolicy(3, 10, 1, 5, False, statuses)


def test_a_decision_is_a_value() -> None:
    assert decide(NOT_SENT, FIRST, RESEND, 0.5) == Decision(
        RETRYING, NOT_BOOKED, error=NOT_SENT, delay=3.0, uses_attempt=True
    )
