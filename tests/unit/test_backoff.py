"""Backoff: the formula, its bounds, and jitter within them."""

from hypothesis import given
from hypothesis import strategies as st

from worker.backoff import MAX_SET_ASIDE, SetAside, exponential, full_jitter


def test_delays_double_up_to_the_maximum() -> None:
    assert [exponential(2.0, attempt, 300.0) for attempt in range(10)] == [2, 4, 8, 16, 32, 64, 128, 256, 300, 300]


def test_any_number_of_attempts_has_a_delay() -> None:
    assert exponential(0.1, 10**9, 10.0) == 10.0


@given(st.floats(0, 1e6), st.floats(0, 1e6), st.floats(0, 1, exclude_max=True))
def test_jitter_is_within_its_bounds(least: float, more: float, dice: float) -> None:
    assert least <= full_jitter(least, least + more, dice) <= least + more
    assert full_jitter(least, least + more, 0.0) == least


def test_an_item_that_failed_waits_twice_as_long_each_time_and_stops_no_other() -> None:
    at = 0.0
    failing = SetAside[str](1.0, 3.0, lambda: at)
    assert failing.add("a")

    for wait in (1.0, 2.0, 3.0, 3.0):
        assert failing.waiting() == {"a"}
        at += wait - 0.01
        assert failing.waiting() == {"a"}
        at += 0.02
        assert failing.waiting() == set()
        assert not failing.add("a"), "known"

    failing.discard("a")
    assert failing.waiting() == set()
    assert failing.add("a"), "it had succeeded"


def test_what_failed_longest_ago_is_forgotten() -> None:
    failing = SetAside[int](1.0, 3.0, lambda: 0.0)
    for number in range(MAX_SET_ASIDE + 1):
        failing.add(number)

    assert failing.waiting() == set(range(1, MAX_SET_ASIDE + 1))
