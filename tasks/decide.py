"""What follows an answer: one pure function, (answer, history, policy, dice) → Decision.

The n-th attempt that is used up is followed by a delay with exponential backoff and full jitter (worker/backoff.py):

    delay(n) = base + dice · (min(maximum, base · 2ⁿ) - base)          dice in [0, 1)

With base 2 and maximum 300 the delays are up to 4, 8, 16, 32, 64, 128, 256, 300, 300, 300, 300 seconds; a dice of 0.5
gives 3, 5, 9, 17, 33, 65, 129, 151, 151, 151, 151.
"""

from dataclasses import dataclass, field
from enum import Enum

from models.booking import Booking
from models.states import BookingStatuses, Outcome, State
from tasks.lease import STOPPED, History
from worker.backoff import exponential, full_jitter
from worker.errors import (
    AlreadyBooked,
    BadCredentials,
    Busy,
    OrderEnded,
    Oversized,
    Poison,
    Refused,
    Unknown,
    XoneError,
)
from worker.settings import RetrySettings, XoneSettings
from worker.xone.answers import BookingReceived

READ_BACK_TRIES = 8  # a booking that must exist may be listed minutes later
STATUSES_WITHOUT_ATTEMPT = frozenset({423, 429})  # pressure uses up no attempt


@dataclass(frozen=True)
class RetryPolicy:
    """The operator's settings. Delays and ages in seconds; statuses in capitals."""

    max_attempts: int = 12
    max_age: float = 86400.0
    base_delay: float = 2.0
    max_delay: float = 300.0
    resend_after_unknown: bool = True
    statuses: BookingStatuses = field(default_factory=BookingStatuses)

    @classmethod
    def of(cls, retry: RetrySettings, xone: XoneSettings) -> "RetryPolicy":
        return cls(
            max_attempts=retry.RETRY_MAX_ATTEMPTS,
            max_age=retry.RETRY_MAX_AGE,
            base_delay=retry.RETRY_BASE_DELAY,
            max_delay=retry.RETRY_MAX_DELAY,
            resend_after_unknown=xone.XONE_AFTER_UNKNOWN == "resend",
            statuses=xone.booking_statuses,
        )


class LookupResult(Enum):
    """Why a look at the list of bookings did not show the booking."""

    NOT_LISTED = "the list of bookings does not hold it"
    UNAVAILABLE = "the list of bookings could not be read now"
    IMPOSSIBLE = "the list of bookings can't be read"
    SUSPENDED = "calls to XONE are suspended, so the list of bookings was not read after the call"


@dataclass(frozen=True)
class BookingNotFound:
    """The list of bookings did not show the booking. ``error``: the answer that made the look necessary."""

    lookup: LookupResult
    error: XoneError


AttemptResult = BookingReceived | XoneError | BookingNotFound


@dataclass(frozen=True)
class Decision:
    """What is recorded. delay: seconds until the next attempt; None if the confirmation has ended."""

    state: State
    outcome: Outcome
    booking: Booking | None = None
    error: XoneError | None = None
    http_status: int | None = None
    delay: float | None = None
    uses_attempt: bool = True
    answer_unknown: bool = False
    not_listed: bool = False


def must_look_up_first(history: History) -> bool:
    """Whether a booking may exist already. The list of bookings is then read before anything is sent."""
    return history.answer_unknown or history.already_booked


def may_send(history: History, retry_policy: RetryPolicy) -> bool:
    """Whether the request may be sent again after the list of bookings did not show the booking."""
    if history.already_booked:
        return False
    has_tries_left = history.attempts_used < retry_policy.max_attempts and history.age < retry_policy.max_age
    return not history.answer_unknown or (retry_policy.resend_after_unknown and has_tries_left)


def look_again_after(history: History, retry_policy: RetryPolicy) -> float:
    """Seconds until the list of bookings is read again that could not be read now. They grow with the age.

    What only waits for the list makes no call, and so uses up no attempt.
    """
    return min(max(history.age, retry_policy.base_delay), retry_policy.max_delay)


def earlier_error(history: History) -> XoneError:
    """The answer to an earlier attempt, for a decision without a new answer."""
    code, detail = history.code or STOPPED[0], history.detail or STOPPED[1]
    kind = AlreadyBooked if history.already_booked else Unknown
    return kind(code, detail, history.http_status)


def must_look_up_after(error: XoneError, history: History, retry_policy: RetryPolicy) -> bool:
    """Whether only the list of bookings can show what an answer means."""
    match error:
        case AlreadyBooked():
            return error.booking is None
        case Oversized():
            return False  # the list holds the same booking
        case Refused():
            return history.answer_unknown
        case Unknown():
            return not retry_policy.resend_after_unknown or _is_used_up(error, history, retry_policy)
        case _:
            return history.answer_unknown and _is_used_up(error, history, retry_policy)


def decide(result: AttemptResult, history: History, retry_policy: RetryPolicy, dice: float) -> Decision:
    """What follows the result of an attempt. history: before this attempt; dice: in [0, 1), for jitter."""
    match result:
        case BookingReceived(booking, http_status):
            return booked(booking, http_status, retry_policy.statuses)
        case AlreadyBooked(booking=Booking() as booking):
            return booked(booking, result.http_status, retry_policy.statuses)
        case BookingNotFound(lookup, error):
            return _not_found(lookup, error, history, retry_policy, dice)
        case Poison() | Oversized():
            return _ended(State.NEEDS_REVIEW, Outcome.UNKNOWN, result, unknown=True)
        case Refused() if not history.answer_unknown:
            return _ended(State.FAILED, Outcome.REFUSED, result)
        case OrderEnded() if not must_look_up_first(history):
            return _ended(State.FAILED, Outcome.NOT_BOOKED, result)
        case AlreadyBooked() | Refused() | OrderEnded():
            return _not_found(LookupResult.UNAVAILABLE, result, history, retry_policy, dice)
        case _:
            return _retried(result, history, retry_policy, dice)


def booked(booking: Booking, http_status: int | None, statuses: BookingStatuses) -> Decision:
    """The state is ``confirmed``, ``cancelled`` or ``pending``, by the booking's status."""
    return Decision(statuses.state_of(booking.status), Outcome.BOOKED, booking, http_status=http_status)


def _retried(error: XoneError, history: History, retry_policy: RetryPolicy, dice: float) -> Decision:
    unknown = isinstance(error, Unknown) or history.answer_unknown
    outcome = Outcome.UNKNOWN if isinstance(error, Unknown) else Outcome.NOT_BOOKED
    if _is_used_up(error, history, retry_policy):
        return _ended(State.NEEDS_REVIEW if unknown else State.FAILED, outcome, error, unknown)
    delay = _delay(error, history, retry_policy, dice)
    return _retrying(outcome, error, unknown, delay, counts=uses_attempt(error))


def _not_found(
    lookup: LookupResult, error: XoneError, history: History, retry_policy: RetryPolicy, dice: float
) -> Decision:
    """The booking must exist, or may, and the list of bookings did not show it."""
    if isinstance(error, OrderEnded) and lookup is LookupResult.NOT_LISTED:
        return _settled_by_list(error, history, retry_policy)
    unknown = isinstance(error, Unknown) or history.answer_unknown
    outcome = Outcome.REFUSED if isinstance(error, Refused) else Outcome.UNKNOWN
    if lookup is LookupResult.SUSPENDED:
        has_ended = False  # the last look is still to come
    elif lookup is LookupResult.UNAVAILABLE:  # what only waits for the list does so until it is too old
        has_ended = history.age >= retry_policy.max_age
    else:
        may_be_listed_later = lookup is LookupResult.NOT_LISTED and not isinstance(error, Refused)
        has_tries_left = history.read_backs + 1 < READ_BACK_TRIES and not _is_used_up(error, history, retry_policy)
        has_ended = not (may_be_listed_later and has_tries_left)
    if has_ended:
        return _ended(State.NEEDS_REVIEW, outcome, error, unknown)
    counts = uses_attempt(error)
    delay = _delay(error, history, retry_policy, dice)
    return _retrying(outcome, error, unknown, delay, counts, not_listed=lookup is LookupResult.NOT_LISTED)


def _settled_by_list(error: OrderEnded, history: History, retry_policy: RetryPolicy) -> Decision:
    """The order has ended, and XONE may have booked: the list decides, once it had time to show the booking.

    The delays between its readings have no jitter, for they are that time: 4, 8, … 256 s by default, 508 s in all.
    """
    if history.read_backs + 1 >= READ_BACK_TRIES:
        return _ended(State.FAILED, Outcome.NOT_BOOKED, error)
    delay = exponential(retry_policy.base_delay, history.read_backs + 1, retry_policy.max_delay)
    return _retrying(Outcome.NOT_BOOKED, error, True, delay, counts=False, not_listed=True)


def _retrying(
    outcome: Outcome, error: XoneError, unknown: bool, delay: float, counts: bool, not_listed: bool = False
) -> Decision:
    return Decision(
        State.RETRYING,
        outcome,
        error=error,
        http_status=error.http_status,
        delay=delay,
        uses_attempt=counts,
        answer_unknown=unknown,
        not_listed=not_listed,
    )


def _ended(state: State, outcome: Outcome, error: XoneError, unknown: bool = False) -> Decision:
    return Decision(state, outcome, error=error, http_status=error.http_status, answer_unknown=unknown)


def uses_attempt(error: XoneError) -> bool:
    """Whether an answer uses up an attempt. Pressure and wrong credentials do not: they are no fault of the offer."""
    if isinstance(error, BadCredentials):
        return False
    return not (isinstance(error, Busy) and error.http_status in STATUSES_WITHOUT_ATTEMPT)


def _is_used_up(error: XoneError, history: History, retry_policy: RetryPolicy) -> bool:
    """Whether this was the last attempt, by number or by age."""
    by_number = uses_attempt(error) and history.attempts_used + 1 >= retry_policy.max_attempts
    return by_number or history.age >= retry_policy.max_age


def _delay(error: XoneError, history: History, retry_policy: RetryPolicy, dice: float) -> float:
    """Seconds until the next attempt: backoff, or what XONE asked for with jitter of up to the base delay."""
    base = retry_policy.base_delay
    backoff = full_jitter(base, exponential(base, history.attempts_used + 1, retry_policy.max_delay), dice)
    asked_for = error.retry_after + full_jitter(0.0, base, dice) if error.retry_after is not None else 0.0
    return max(backoff, asked_for)
