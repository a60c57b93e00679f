"""The circuit breaker, against a clock of the test."""

import contextlib

import pytest

from tests.support.clock import Clock
from worker.errors import (
    AlreadyBooked,
    BadCredentials,
    Busy,
    ConfirmOfferError,
    NotSent,
    NotXone,
    Refused,
    Unknown,
    XoneError,
)
from worker.xone.circuit_breaker import FAILURE_THRESHOLD, CallsSuspended, CircuitBreaker

DOWN = [
    NotSent("connect", ""),
    Unknown("timeout", ""),
    Unknown("connection-lost", ""),
    Unknown("http-500", "", 500),
    Unknown("http-599", "", 599),
    NotXone("bad-answer", "", 200),
    Busy("http-503", "", 503),
]
UP = [
    Refused("http-422", "", 422),
    Refused("redirect", "", 302),
    AlreadyBooked("already-booked", "", 409),
    Unknown("wrong-offer", "", 200),
    Unknown("bad-answer", "", 200),
    Unknown("http-408", "", 408),
    Busy("http-423", "", 423),
]


@pytest.fixture
def circuit_breaker(clock: Clock) -> CircuitBreaker:
    return CircuitBreaker(clock)


def call(circuit_breaker: CircuitBreaker, error: Exception | None = None) -> bool:
    """Makes a call that ends with this error. Returns whether the call was allowed."""
    try:
        with circuit_breaker.guard():
            if error is not None:
                raise error
    except CallsSuspended:
        return False
    except ConfirmOfferError:
        pass
    return True


def fail_lookup(circuit_breaker: CircuitBreaker) -> None:
    with pytest.raises(Unknown), circuit_breaker.guard(proves=False):
        raise Unknown("http-500", "", 500)


def trip(circuit_breaker: CircuitBreaker, error: XoneError = DOWN[0]) -> None:
    for _ in range(FAILURE_THRESHOLD):
        assert call(circuit_breaker, error)


@pytest.mark.parametrize("error", DOWN, ids=lambda error: error.code)
def test_consecutive_failures_open_the_breaker(circuit_breaker: CircuitBreaker, error: XoneError) -> None:
    for _ in range(FAILURE_THRESHOLD - 1):
        assert call(circuit_breaker, error)
        assert circuit_breaker.wait() == 0
    assert call(circuit_breaker, error)

    assert circuit_breaker.open_reason == error.code
    assert circuit_breaker.wait() == 1.0
    assert not call(circuit_breaker)


@pytest.mark.parametrize("error", [*UP, None], ids=lambda error: error.code if error else "success")
def test_an_answer_resets_the_count_of_failures(circuit_breaker: CircuitBreaker, error: XoneError | None) -> None:
    for _ in range(FAILURE_THRESHOLD - 1):
        call(circuit_breaker, DOWN[0])
    call(circuit_breaker, error)
    for _ in range(FAILURE_THRESHOLD - 1):
        call(circuit_breaker, DOWN[0])

    assert circuit_breaker.open_reason is None


@pytest.mark.parametrize("error", UP, ids=lambda error: error.code)
def test_errors_of_an_offer_do_not_open_the_breaker(circuit_breaker: CircuitBreaker, error: XoneError) -> None:
    for _ in range(3 * FAILURE_THRESHOLD):
        assert call(circuit_breaker, error)


def test_probes_are_sent_one_at_a_time_with_growing_waits(circuit_breaker: CircuitBreaker, clock: Clock) -> None:
    trip(circuit_breaker)
    waits = []
    for _ in range(6):
        wait = circuit_breaker.wait()
        waits.append(wait)
        clock.now += wait - 0.01
        assert not call(circuit_breaker), "before its time"
        clock.now += 0.01
        with contextlib.suppress(NotSent), circuit_breaker.guard():
            assert circuit_breaker.wait() > 0
            assert not call(circuit_breaker), "a probe is under way"
            raise NotSent("connect", "")

    assert waits == pytest.approx([1, 2, 4, 5, 5, 5])


def test_an_answered_probe_closes_the_breaker(circuit_breaker: CircuitBreaker, clock: Clock) -> None:
    trip(circuit_breaker)
    clock.now += 1

    assert call(circuit_breaker)

    assert circuit_breaker.open_reason is None
    assert call(circuit_breaker)


def test_a_probe_without_a_call_allows_another_probe(circuit_breaker: CircuitBreaker, clock: Clock) -> None:
    trip(circuit_breaker)
    clock.now += 1
    with pytest.raises(KeyError), circuit_breaker.guard():
        raise KeyError

    assert circuit_breaker.wait() == 0


def test_an_answered_list_of_bookings_does_not_close_the_breaker(circuit_breaker: CircuitBreaker, clock: Clock) -> None:
    for _ in range(FAILURE_THRESHOLD):
        with circuit_breaker.guard(proves=False):
            pass
        call(circuit_breaker, DOWN[0])
    assert circuit_breaker.open_reason is not None

    clock.now += 1
    with circuit_breaker.guard(proves=False):
        pass

    assert circuit_breaker.open_reason is not None
    assert call(circuit_breaker), "the probe is still to be made"
    assert circuit_breaker.open_reason is None


def test_a_failing_list_of_bookings_does_not_keep_the_breaker_open(
    circuit_breaker: CircuitBreaker, clock: Clock
) -> None:
    trip(circuit_breaker)
    clock.now += 1
    fail_lookup(circuit_breaker)

    assert circuit_breaker.wait() == 0
    assert call(circuit_breaker), "the call that follows the lookup"
    assert circuit_breaker.open_reason is None


@pytest.mark.parametrize("error", [error for error in DOWN if not isinstance(error, NotSent)], ids=lambda e: e.code)
def test_a_broken_list_of_bookings_does_not_open_it(circuit_breaker: CircuitBreaker, error: XoneError) -> None:
    for _ in range(3 * FAILURE_THRESHOLD):
        with contextlib.suppress(XoneError), circuit_breaker.guard(proves=False):
            raise error

    assert circuit_breaker.open_reason is None
    for _ in range(FAILURE_THRESHOLD - 1):
        call(circuit_breaker, DOWN[0])
    assert circuit_breaker.open_reason is None, "nor does it count"


@pytest.mark.parametrize(
    "error", [NotSent("connect", ""), BadCredentials("credentials", "", 401)], ids=lambda e: e.code
)
def test_what_a_look_up_shows_of_xone_as_a_whole_opens_it(circuit_breaker: CircuitBreaker, error: XoneError) -> None:
    for _ in range(FAILURE_THRESHOLD):
        with contextlib.suppress(XoneError, CallsSuspended), circuit_breaker.guard(proves=False):
            raise error

    assert circuit_breaker.open_reason == error.code


def test_failures_of_earlier_calls_do_not_extend_the_wait(circuit_breaker: CircuitBreaker, clock: Clock) -> None:
    with contextlib.suppress(NotSent), circuit_breaker.guard():
        trip(circuit_breaker)
        raise NotSent("connect", "")

    assert circuit_breaker.wait() == 1.0


def test_wrong_credentials_open_the_breaker_at_once(circuit_breaker: CircuitBreaker, clock: Clock) -> None:
    assert call(circuit_breaker, BadCredentials("credentials", "", 401))

    assert circuit_breaker.open_reason == "credentials"
    assert not call(circuit_breaker)


def test_a_429_does_not_open_the_breaker(circuit_breaker: CircuitBreaker, clock: Clock) -> None:
    for _ in range(3 * FAILURE_THRESHOLD):
        assert call(circuit_breaker, Busy("http-429", "", 429, retry_after=30.0))
    assert circuit_breaker.wait() == 0

    trip(circuit_breaker)
    clock.now += 1
    assert call(circuit_breaker, Busy("http-429", "", 429)), "the probe"

    assert circuit_breaker.open_reason == "connect"
    assert circuit_breaker.wait() == 0, "the probe is still to be made"
