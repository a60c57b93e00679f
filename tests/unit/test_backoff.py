"""Backoff: the formula, its bounds, and jitter within them."""

from hypothesis import given
from hypothesis import strategies as st

from worker.backoff import exponential, full_jitter


def test_delays_double_up_to_the_maximum() -> None:
    assert [exponential(2.0, attempt, 300.0) for attempt in range(10)] == [2, 4, 8, 16, 32, 64, 128, 256, 300, 300]


def test_any_number_of_attempts_has_a_delay() -> None:
    assert exponential(0.1, 10**9, 10.0) == 10.0


@given(st.floats(0, 1e6), st.floats(0, 1e6), st.floats(0, 1, exclude_max=True))
def test_jitter_is_within_its_bounds(least: float, more: float, dice: float) -> None:
    assert least <= full_jitter(least, least + more, dice) <= least + more
    assert full_jitter(least, least + more, 0.0) == least
