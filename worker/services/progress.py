"""Whether tasks make progress: a worker that has messages and ends none is not well, whatever connections are open."""

import time
from collections.abc import Callable
from itertools import count
from threading import Lock

from worker.services.health_file import PartHealth

GRACE = 60.0  # seconds for everything but calls and the lease: pauses before a message goes back, a slow machine


class Progress:
    """The messages that this worker has in hand, and when one ended last."""

    def __init__(self, xone_timeout: float, lease_seconds: float) -> None:
        # A task may ask for a token, read the list of bookings before and after its call, and wait for a lease to end.
        self.limit = 4 * xone_timeout + lease_seconds + GRACE
        self._lock = Lock()
        self._in_hand: dict[int, float] = {}  # when they came, as of time.time(), the oldest first
        self._numbers = count()
        self._ended_at = 0.0
        self._excused_until = 0.0

    def message_came(self) -> int:
        """Returns a number for it."""
        with self._lock:
            number = next(self._numbers)
            self._in_hand[number] = time.time()
        return number

    def message_ended(self, number: int) -> None:
        """It was acknowledged or rejected."""
        with self._lock:
            self._in_hand.pop(number, None)
            self._ended_at = time.time()

    def part(self, is_excused: bool, waiting_for: Callable[[], str | None]) -> PartHealth:
        """The health of the tasks. They are well until no message has ended for ``limit`` seconds.

        is_excused: another part is not well, and tasks wait for the same; the time does not count. waiting_for: the
        dependency that threads of this process wait for.
        """
        now = time.time()
        with self._lock:
            if is_excused:
                self._excused_until = now
            if not self._in_hand:
                return PartHealth(now, now)
            number, oldest = len(self._in_hand), next(iter(self._in_hand.values()))
            well_until = max(oldest, self._ended_at, self._excused_until) + self.limit
        if now < well_until:
            return PartHealth(now, now)
        dependency = waiting_for()
        # For a dependency a restart does not help: health --live goes by the second time.
        ran_at = well_until if dependency is None else now
        return PartHealth(well_until, ran_at, dependency or f"the end of {number} messages that it has in hand")
