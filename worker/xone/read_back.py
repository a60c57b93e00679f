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

from models.booking import is_id
from models.same import canonical_id, differs_in_case_only
from worker.errors import XoneError
from worker.xone.booking_list import Listed
from worker.xone.circuit_breaker import CallsSuspended

Reading = Callable[[], Generator[Listed, None, None]]

WAIT = 1.0  # seconds between two calls of while_waiting


@dataclass
class _Round:
    """One reading, with the offers that it is for and what it found."""

    wanted: dict[str, frozenset[str]] = field(default_factory=dict)  # quote ids, by offer id
    bookings: dict[str, Listed] = field(default_factory=dict)  # as listed, by offer id
    nameless: dict[str, list[Listed]] = field(default_factory=dict)  # that have a quote of the offer, by offer id
    failure: XoneError | CallsSuspended | None = None
    has_ended: bool = False

    def read(self, listing: Iterable[Listed]) -> None:
        """Looks for the wanted offers. A booking that names no offer counts only once the whole list was read."""
        wanted = dict(self.wanted)
        by_offer, by_quote = defaultdict[str, list[str]](list), defaultdict[str, list[str]](list)
        for offer_id, quote_ids in wanted.items():
            by_offer[canonical_id(offer_id)].append(offer_id)
            for quote_id in {canonical_id(quote_id) for quote_id in quote_ids}:
                by_quote[quote_id].append(offer_id)
        nameless: dict[str, Listed] = {}  # by booking id: pages may overlap
        named = set[str]()  # ids of bookings that name an offer, and have a quote of ours
        for listed in listing:
            offer, quote_id = offer_named_by(listed), canonical_id(_quote_of(listed))
            if offer is None:
                if quote_id in by_quote:
                    nameless.setdefault(_id_of(listed), listed)
                continue
            if quote_id in by_quote:
                named.add(_id_of(listed))
            with_quote = [offer_id for offer_id in by_quote.get(quote_id, ()) if differs_in_case_only(offer_id, offer)]
            for offer_id in by_offer.get(canonical_id(offer), with_quote):
                self.bookings.setdefault(offer_id, listed)
            if len(self.bookings) == len(wanted):
                return
        for booking_id, listed in nameless.items():
            offers = [o for o in by_quote[canonical_id(_quote_of(listed))] if o not in self.bookings]
            if len(offers) == 1 and booking_id not in named:  # otherwise nobody can tell whose it is
                self.nameless.setdefault(offers[0], []).append(listed)


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
        may_be_anothers: Callable[[str], bool] = lambda _: False,
    ) -> Listed | None:
        """The listed booking of an offer, or None: by its ``offer_id`` if it has one, else by its ``quote.uuid``.

        A quote alone proves little, for offers may share it: the booking must be the only one with a quote of this
        offer, and ``may_be_anothers`` tells by its id whether it may belong to another offer.

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
        if offer_id in round_.bookings:
            return round_.bookings[offer_id]
        nameless = round_.nameless.get(offer_id, [])
        ids = [_id_of(listed) for listed in nameless]  # one that can't be an id is nobody's
        ours = [listed for listed, id_ in zip(nameless, ids, strict=True) if not (is_id(id_) and may_be_anothers(id_))]
        return ours[0] if len(ours) == 1 else None

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


def offer_named_by(listed: Listed) -> str | None:
    """The ``offer_id`` of a listed booking, or None if it has none."""
    offer = listed.get("offer_id")
    if isinstance(offer, int) and not isinstance(offer, bool):
        return str(offer)
    return offer if isinstance(offer, str) and offer else None


def _id_of(listed: Listed) -> str:
    return canonical_id(str(listed.get("id")))


def _quote_of(listed: Listed) -> str:
    quote = listed.get("quote")
    uuid = quote.get("uuid") if isinstance(quote, dict) else None
    return uuid if isinstance(uuid, str) else ""
