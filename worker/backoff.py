"""How long to wait before the next try: exponential backoff, full jitter, and what is set aside meanwhile.

    exponential(base, attempt, maximum) = min(maximum, base · 2^attempt)
    full_jitter(least, most, dice)      = least + dice · (most - least)         dice in [0, 1)

``exponential(2, attempt, 300)`` for attempts 0, 1, 2, … gives 2, 4, 8, 16, 32, 64, 128, 256, 300, 300, … With full
jitter each delay is random between ``least`` and that, so callers that failed together do not come back together.

Source: Marc Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015. Its full jitter begins at 0.
"""

import time
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

Item = TypeVar("Item", bound=Hashable)

MAX_EXPONENT = 32  # beyond it, 2^attempt only overflows
MAX_SET_ASIDE = 10_000  # items


def exponential(base: float, attempt: int, maximum: float) -> float:
    """Seconds to wait after ``attempt`` earlier tries: ``base`` doubled for each, at most ``maximum``."""
    return min(maximum, base * 2.0 ** min(attempt, MAX_EXPONENT))


def full_jitter(least: float, most: float, dice: float) -> float:
    """Seconds between ``least`` and ``most``. dice: in [0, 1)."""
    return least + dice * (most - least)


class SetAside(Generic[Item]):
    """Items of a work that have failed. Each waits, twice as long after each failure, and stops no other.

    It knows the MAX_SET_ASIDE that failed last. Any other counts as one that has not failed.
    """

    def __init__(self, initial: float, maximum: float, clock: Callable[[], float] = time.monotonic) -> None:
        """initial, maximum: seconds that an item waits after its first failure, and at most."""
        self._initial, self._maximum, self._clock = initial, maximum, clock
        self._failed: dict[Item, tuple[int, float]] = {}  # number of failures, and when the item may be tried again

    def add(self, item: Item) -> bool:
        """Notes a failure. Returns whether it is the item's first."""
        number, _ = self._failed.pop(item, (0, 0.0))
        self._failed[item] = number + 1, self._clock() + exponential(self._initial, number, self._maximum)
        if len(self._failed) > MAX_SET_ASIDE:
            del self._failed[next(iter(self._failed))]
        return number == 0

    def discard(self, item: Item) -> None:
        """Forgets the failures of an item, which has succeeded."""
        self._failed.pop(item, None)

    def waiting(self) -> set[Item]:
        """The items that may not be tried yet."""
        now = self._clock()
        return {item for item, (_, retry_at) in self._failed.items() if now < retry_at}
