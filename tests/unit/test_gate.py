"""The gate before XONE, against a clock of the test's own."""

import contextlib

import pytest

from worker.errors import (
    AlreadyBooked,
    BadCredentials,
    Busy,
    ConfirmOfferError,
    NotSent,
    Refused,
    Unknown,
    XoneError,
)
from worker.xone.circuit_breaker import RUN, Gate, Held

DOWN = [
    NotSent("connect", ""),
    Unknown("timeout", ""),
    Unknown("connection-lost", ""),
    Unknown("http-500", "", 500),
    Unknown("http-599", "", 599),
    Unknown("bad-answer", "", 200),
    Busy("http-503", "", 503),
]
UP = [
    Refused("http-422", "", 422),
    Refused("redirect", "", 302),
    AlreadyBooked("already-booked", "", 409),
    Unknown("wrong-offer", "", 200),
    Unknown("http-408", "", 408),
    Busy("http-423", "", 423),
]


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def gate(clock: Clock) -> Gate:
    return Gate(clock)


def call(gate: Gate, error: Exception | None = None) -> bool:
    """Whether a call passed; it ends with the error."""
    try:
        with gate.passing():
            if error is not None:
                raise error
    except Held:
        return False
    except ConfirmOfferError:
        pass
    return True


def look_in_vain(gate: Gate) -> None:
    with pytest.raises(Unknown), gate.passing(proves=False):
        raise Unknown("http-500", "", 500)


def open_it(gate: Gate, error: XoneError = DOWN[0]) -> None:
    for _ in range(RUN):
        assert call(gate, error)


@pytest.mark.parametrize("error", DOWN, ids=lambda error: error.code)
def test_a_run_of_failures_opens_it(gate: Gate, error: XoneError) -> None:
    for _ in range(RUN - 1):
        assert call(gate, error)
        assert gate.wait() == 0
    assert call(gate, error)

    assert gate.open_for == error.code
    assert gate.wait() == 1.0
    assert not call(gate)


@pytest.mark.parametrize("error", [*UP, None], ids=lambda error: error.code if error else "success")
def test_an_answer_breaks_the_run(gate: Gate, error: XoneError | None) -> None:
    for _ in range(RUN - 1):
        call(gate, DOWN[0])
    call(gate, error)
    for _ in range(RUN - 1):
        call(gate, DOWN[0])

    assert gate.open_for is None


@pytest.mark.parametrize("error", UP, ids=lambda error: error.code)
def test_trouble_with_an_offer_does_not_open_it(gate: Gate, error: XoneError) -> None:
    for _ in range(3 * RUN):
        assert call(gate, error)


def test_probes_go_out_one_at_a_time_with_growing_pauses(gate: Gate, clock: Clock) -> None:
    open_it(gate)
    pauses = []
    for _ in range(6):
        pause = gate.wait()
        pauses.append(pause)
        clock.now += pause - 0.01
        assert not call(gate), "before its time"
        clock.now += 0.01
        with contextlib.suppress(NotSent), gate.passing():
            assert gate.wait() > 0
            assert not call(gate), "a probe is under way"
            raise NotSent("connect", "")

    assert pauses == pytest.approx([1, 2, 4, 5, 5, 5])


def test_a_probe_that_is_answered_closes_it(gate: Gate, clock: Clock) -> None:
    open_it(gate)
    clock.now += 1

    assert call(gate)

    assert gate.open_for is None
    assert call(gate)


def test_a_probe_that_made_no_call_leaves_room_for_another(gate: Gate, clock: Clock) -> None:
    open_it(gate)
    clock.now += 1
    with pytest.raises(KeyError), gate.passing():
        raise KeyError

    assert gate.wait() == 0


def test_the_list_of_bookings_proves_nothing_about_confirming(gate: Gate, clock: Clock) -> None:
    for _ in range(RUN):
        with gate.passing(proves=False):
            pass
        call(gate, DOWN[0])
    assert gate.open_for is not None

    clock.now += 1
    with gate.passing(proves=False):
        pass

    assert gate.open_for is not None
    assert call(gate), "the probe is still to be made"
    assert gate.open_for is None


def test_a_broken_list_of_bookings_does_not_keep_it_open(gate: Gate, clock: Clock) -> None:
    open_it(gate)
    clock.now += 1
    look_in_vain(gate)

    assert gate.wait() == 0
    assert call(gate), "the call that follows the look"
    assert gate.open_for is None


def test_probes_of_the_list_alone_have_growing_pauses(gate: Gate, clock: Clock) -> None:
    open_it(gate)
    pauses = []
    for _ in range(4):
        pauses.append(gate.wait())
        clock.now += gate.wait()
        look_in_vain(gate)
        look_in_vain(gate)

    assert pauses == [1, 2, 4, 5]


def test_failures_of_calls_that_began_before_do_not_make_the_pause_longer(gate: Gate, clock: Clock) -> None:
    with contextlib.suppress(NotSent), gate.passing():
        open_it(gate)
        raise NotSent("connect", "")

    assert gate.wait() == 1.0


def test_wrong_credentials_open_it_at_once(gate: Gate, clock: Clock) -> None:
    assert call(gate, BadCredentials("credentials", "", 401))

    assert gate.open_for == "credentials"
    assert not call(gate)


def test_a_429_slows_all_calls_for_as_long_as_it_asks(gate: Gate, clock: Clock) -> None:
    assert call(gate, Busy("http-429", "", 429, retry_after=30.0))

    assert gate.wait() == 30.0
    assert not call(gate)
    clock.now += 30
    assert call(gate)


def test_429s_without_a_time_slow_more_and_more_until_one_call_succeeds(gate: Gate, clock: Clock) -> None:
    waits = []
    for _ in range(8):
        assert call(gate, Busy("http-429", "", 429))
        waits.append(gate.wait())
        clock.now += gate.wait()
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60]

    call(gate)
    call(gate, Busy("http-429", "", 429))
    assert gate.wait() == 1.0
