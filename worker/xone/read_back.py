"""Read-back: what exists already, from a partner's list of bookings. Callers who wait share one reading.

The list can't be asked for one offer, and may be thousands long: after an outage, when hundreds of answers are
unknown at once, a reading for each of them would be hundreds of thousands of calls. So a partner's list is read by
one caller at a time; who asks meanwhile waits for the next reading, which begins after that and serves all of them.
"""

from collections import defaultdict
from collections.abc import Callable, Generator, Iterable
from contextlib import closing
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

from worker.errors import XoneError
from worker.xone.circuit_breaker import CallsSuspended

Listed = dict[str, Any]
Reading = Callable[[], Generator[Listed, None, None]]

WAIT = 1.0  # seconds between two looks after the own lease


@dataclass
class _Round:
    """One reading, and who is served by it."""

    wanted: dict[str, frozenset[str]] = field(default_factory=dict)  # quote ids by offer id
    found: dict[str, Listed] = field(default_factory=dict)  # by offer id
    failure: XoneError | CallsSuspended | None = None
    has_ended: bool = False

    def read(self, listing: Iterable[Listed]) -> None:
        wanted = dict(self.wanted)
        by_quote = {quote_id: offer_id for offer_id, quote_ids in wanted.items() for quote_id in quote_ids}
        for listed in listing:
            offer_id = listed.get("offer_id") or by_quote.get(_quote_of(listed))
            if isinstance(offer_id, str) and offer_id in wanted:
                self.found.setdefault(offer_id, listed)
                if len(self.found) == len(wanted):
                    return


class ReadBack:
    """Threads share it."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._next: dict[str, _Round] = {}  # by partner: a reading that has not begun, so that it can be joined
        self._turns: defaultdict[str, Lock] = defaultdict(Lock)  # by partner: held by who reads

    def find(
        self,
        partner_id: str,
        offer_id: str,
        quote_ids: frozenset[str],
        reading: Reading,
        while_waiting: Callable[[], None],
    ) -> Listed | None:
        """What the list holds for an offer: by ``offer_id`` where the listed booking has one, else by ``quote.uuid``.

        reading: reads the list. Of those who wait one does it, for all; all get what it raises of XoneError and Held.
        Where it raises anything else, that is its caller's own matter, and another one reads.
        while_waiting: called every second; what it raises ends the waiting of its caller alone.
        """
        with self._lock:
            ours = self._next.setdefault(partner_id, _Round())
            ours.wanted[offer_id] = quote_ids
            turn = self._turns[partner_id]
        while not turn.acquire(timeout=WAIT):
            while_waiting()
        try:
            if not ours.has_ended:
                self._read(partner_id, ours, reading)
        finally:
            turn.release()
        if offer_id not in ours.found and ours.failure is not None:
            raise ours.failure
        return ours.found.get(offer_id)

    def _read(self, partner_id: str, ours: _Round, reading: Reading) -> None:
        with self._lock:
            if self._next.get(partner_id) is ours:
                del self._next[partner_id]
        try:
            with closing(reading()) as listing:
                ours.read(listing)
        except (XoneError, CallsSuspended) as failure:
            ours.failure = failure
        ours.has_ended = True


def _quote_of(listed: Listed) -> str:
    quote = listed.get("quote")
    uuid = quote.get("uuid") if isinstance(quote, dict) else None
    return uuid if isinstance(uuid, str) else ""
