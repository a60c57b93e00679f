"""Read-back: finds a booking that exists already in its partner's list of bookings.

The list can't be asked for a single offer, and may have thousands of bookings. After an outage hundreds of answers are
unknown at once, and a reading for each would be hundreds of thousands of calls. So threads share readings: one thread
at a time reads a partner's list. Those that ask meanwhile wait for the next reading, which serves all of them.
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

WAIT = 1.0  # seconds between two calls of while_waiting


@dataclass
class _Round:
    """One reading, with the offers that it is for and what it found."""

    wanted: dict[str, frozenset[str]] = field(default_factory=dict)  # quote ids, by offer id
    bookings: dict[str, Listed] = field(default_factory=dict)  # as listed, by offer id
    failure: XoneError | CallsSuspended | None = None
    has_ended: bool = False

    def read(self, listing: Iterable[Listed]) -> None:
        wanted = dict(self.wanted)
        by_quote = {quote_id: offer_id for offer_id, quote_ids in wanted.items() for quote_id in quote_ids}
        for listed in listing:
            offer_id = listed.get("offer_id") or by_quote.get(_quote_of(listed))
            if isinstance(offer_id, str) and offer_id in wanted:
                self.bookings.setdefault(offer_id, listed)
                if len(self.bookings) == len(wanted):
                    return


class ReadBack:
    """Shared readings of the lists of bookings. Threads share it."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._next: dict[str, _Round] = {}  # by partner: a reading that has not begun and can be joined
        self._reading: defaultdict[str, Lock] = defaultdict(Lock)  # by partner: held by the thread that reads

    def find(
        self,
        partner_id: str,
        offer_id: str,
        quote_ids: frozenset[str],
        reading: Reading,
        while_waiting: Callable[[], None],
    ) -> Listed | None:
        """The listed booking of an offer, or None: by its ``offer_id`` if it has one, else by its ``quote.uuid``.

        reading: yields the listed bookings. One of the waiting threads runs it, for all of them. XoneError and
        CallsSuspended that it raises reach all of them. Any other exception reaches only the thread that ran it, and
        another thread reads. while_waiting: called every second; what it raises ends the wait of its own thread.
        """
        with self._lock:
            round_ = self._next.setdefault(partner_id, _Round())
            round_.wanted[offer_id] = quote_ids
            is_reading = self._reading[partner_id]
        while not is_reading.acquire(timeout=WAIT):
            while_waiting()
        try:
            if not round_.has_ended:
                self._read(partner_id, round_, reading)
        finally:
            is_reading.release()
        if offer_id not in round_.bookings and round_.failure is not None:
            raise round_.failure
        return round_.bookings.get(offer_id)

    def _read(self, partner_id: str, round_: _Round, reading: Reading) -> None:
        with self._lock:
            if self._next.get(partner_id) is round_:
                del self._next[partner_id]
        try:
            with closing(reading()) as listing:
                round_.read(listing)
        except (XoneError, CallsSuspended) as failure:
            round_.failure = failure
        round_.has_ended = True


def _quote_of(listed: Listed) -> str:
    quote = listed.get("quote")
    uuid = quote.get("uuid") if isinstance(quote, dict) else None
    return uuid if isinstance(uuid, str) else ""
