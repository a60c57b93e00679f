"""Whether a call to XONE may be made now: circuit breaker and throttle, as one, for one process."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from models.call_stop import CallStop
from worker.errors import XoneError
from worker.xone.circuit_breaker import CallsSuspended, CircuitBreaker, ListBreaker, is_outage
from worker.xone.throttle import Throttle, is_throttling


class CallControl:
    """``with calls.guard():`` stands around each confirm call, ``guard_lookup`` around each reading of a list.

    What a list of bookings says of itself stops look-ups only. Threads share it.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """clock: monotonic seconds."""
        self.circuit_breaker = CircuitBreaker(clock)
        self.throttle = Throttle(clock)
        self.lookup_throttle = Throttle(clock)
        self._clock = clock
        self._lists: dict[str, ListBreaker] = {}  # by partner

    @property
    def is_half_open(self) -> bool:
        """Whether only one call at a time may pass."""
        return self.circuit_breaker.is_half_open

    def wait(self) -> float:
        """Seconds until a call may pass; 0 if one may now."""
        return max(self.circuit_breaker.wait(), self.throttle.wait())

    @property
    def reason(self) -> str | None:
        """The code of what keeps calls from passing, or None."""
        return self.circuit_breaker.open_reason or ("http-429" if self.throttle.wait() > 0 else None)

    def stops(self) -> list[CallStop]:
        """What keeps calls from passing now, and readings of lists of bookings."""
        calls = [self.circuit_breaker.stop(), self.throttle.stop()]
        lists = [(None, self.lookup_throttle.stop()), *((name, list_.stop()) for name, list_ in [*self._lists.items()])]
        lookups = [replace(stop, lookups=True, partner_id=partner) for partner, stop in lists if stop is not None]
        return [stop for stop in calls if stop is not None] + lookups

    def wait_for_lookup(self, partner_id: str) -> float:
        """Seconds until the partner's list of bookings may be read; 0 if it may now."""
        return max(self.wait(), self.lookup_throttle.wait(), self._list(partner_id).wait())

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Lets one confirm call pass, and learns from what it raises. Raises CallsSuspended if none may pass."""
        if self.throttle.wait() > 0:
            raise CallsSuspended(self.wait())
        with _learning(self.throttle), self.circuit_breaker.guard():
            yield

    @contextmanager
    def guard_lookup(self, partner_id: str) -> Iterator[None]:
        """As ``guard``, for one reading of the partner's list of bookings."""
        if (wait := self.wait_for_lookup(partner_id)) > 0:
            raise CallsSuspended(wait)
        with (
            _learning(self.lookup_throttle),
            self._list(partner_id).guard(),
            self.circuit_breaker.guard(proves=False),
        ):
            yield

    def _list(self, partner_id: str) -> ListBreaker:
        return self._lists.setdefault(partner_id, ListBreaker(self._clock))


@contextmanager
def _learning(throttle: Throttle) -> Iterator[None]:
    try:
        yield
    except XoneError as error:
        if is_throttling(error):
            throttle.throttle(error.retry_after)
        elif not is_outage(error):
            throttle.reset()
        raise
    else:
        throttle.reset()
