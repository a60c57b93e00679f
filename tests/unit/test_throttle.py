"""Throttling after a 429, beside the circuit breaker, against a clock of the test."""

import contextlib

import pytest

from tests.support.clock import Clock
from worker.errors import Busy, NotSent, Refused, Unknown, XoneError
from worker.xone.call_control import CallControl
from worker.xone.circuit_breaker import FAILURE_THRESHOLD, CallsSuspended


@pytest.fixture
def calls(clock: Clock) -> CallControl:
    return CallControl(clock)


def call(calls: CallControl, error: XoneError | None = None, proves: bool = True) -> bool:
    """Makes a call that ends with this error. Returns whether the call was allowed."""
    try:
        with contextlib.suppress(XoneError), calls.guard() if proves else calls.guard_lookup("P-1"):
            if error is not None:
                raise error
    except CallsSuspended:
        return False
    return True


def throttled(retry_after: float | None = None) -> Busy:
    return Busy("http-429", "", 429, retry_after=retry_after)


def test_a_429_suspends_all_calls_for_its_retry_after(calls: CallControl, clock: Clock) -> None:
    assert call(calls, throttled(30.0))

    assert calls.wait() == 30.0
    assert not call(calls)
    clock.now += 30
    assert call(calls)


@pytest.mark.parametrize("answer", [None, Refused("http-422", "", 422)], ids=["booked", "refused"])
def test_429s_without_retry_after_suspend_calls_for_longer_each_time(
    answer: XoneError | None, calls: CallControl, clock: Clock
) -> None:
    waits = []
    for _ in range(8):
        assert call(calls, throttled())
        waits.append(calls.wait())
        clock.now += calls.wait()
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60]

    call(calls, answer)
    call(calls, throttled())
    assert calls.wait() == 1.0


@pytest.mark.parametrize(
    ("error", "proves"), [(NotSent("connect", ""), True), (None, False)], ids=["an outage", "the list of bookings"]
)
def test_an_answer_that_does_not_prove_that_xone_confirms_resets_nothing(
    error: XoneError | None, proves: bool, calls: CallControl, clock: Clock
) -> None:
    call(calls, throttled())
    clock.now += 1
    call(calls, error, proves)
    call(calls, throttled())

    assert calls.wait() == 2.0


def test_a_shorter_wait_does_not_end_a_longer_one(calls: CallControl) -> None:
    with contextlib.suppress(Busy), calls.guard():
        call(calls, throttled(30.0))
        raise throttled(1.0)

    assert calls.wait() == 30.0


def test_the_longer_wait_of_breaker_and_throttle_applies(calls: CallControl, clock: Clock) -> None:
    with contextlib.suppress(Busy), calls.guard():
        for _ in range(FAILURE_THRESHOLD):
            call(calls, NotSent("connect", ""))
        raise throttled(0.5)
    assert calls.wait() == 1.0

    clock.now += 1
    assert call(calls, throttled(30.0)), "the probe"
    assert calls.wait() == 30.0
    assert calls.circuit_breaker.open_reason == "connect"


def test_a_429_of_the_list_of_bookings_stops_look_ups_only(calls: CallControl, clock: Clock) -> None:
    assert call(calls, throttled(30.0), proves=False)

    assert (calls.wait(), calls.wait_for_lookup("P-1")) == (0, 30.0)
    assert call(calls)
    assert not call(calls, proves=False)
    clock.now += 30
    assert call(calls, proves=False)


def test_a_burst_of_429s_counts_as_one(calls: CallControl) -> None:
    with contextlib.suppress(Busy), calls.guard():
        with contextlib.suppress(Busy), calls.guard():
            assert call(calls, throttled())
            raise throttled()
        raise throttled()

    assert calls.wait() == 1.0


def test_a_list_that_fails_stops_its_own_look_ups_only_for_longer_each_time(calls: CallControl, clock: Clock) -> None:
    waits = []
    for _ in range(8):
        assert call(calls, Unknown("timeout", ""), proves=False)
        waits.append(calls.wait_for_lookup("P-1"))
        assert not call(calls, proves=False)
        assert (calls.wait(), calls.wait_for_lookup("P-2")) == (0, 0)
        clock.now += waits[-1]
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60]

    with calls.guard_lookup("P-1"):
        assert calls.wait_for_lookup("P-1") > 0, "one thread at a time tries a list that has failed"
    assert calls.wait_for_lookup("P-1") == 0


@pytest.mark.parametrize("answer", [Refused("http-403", "", 403), None], ids=["forbidden", "read in part"])
def test_a_list_that_answers_may_be_read_again(answer: XoneError | None, calls: CallControl, clock: Clock) -> None:
    call(calls, Unknown("http-500", "", 500), proves=False)
    clock.now += 1
    if answer is not None:
        assert call(calls, answer, proves=False)
    else:
        with contextlib.suppress(GeneratorExit), calls.guard_lookup("P-1"):
            raise GeneratorExit

    assert calls.wait_for_lookup("P-1") == 0


def test_a_429_of_confirm_calls_stops_look_ups_too(calls: CallControl) -> None:
    assert call(calls, throttled(30.0))

    assert calls.wait_for_lookup("P-1") == 30.0
    assert not call(calls, proves=False)
