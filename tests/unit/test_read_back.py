"""Callers that look up bookings of one partner share the readings of its list."""

from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Event
from typing import Any

import pytest

from tests.support.system import until
from worker.errors import Unknown
from worker.xone import read_back
from worker.xone.circuit_breaker import CallsSuspended
from worker.xone.read_back import Listed, ReadBack

NONE: frozenset[str] = frozenset()


class List:
    """A partner's list of bookings. Each reading waits for ``may_continue``."""

    def __init__(self) -> None:
        self.bookings: list[Listed] = []
        self.readings = 0
        self.may_continue = Event()
        self.failures: list[BaseException] = []  # of the next readings, each raised after the first booking

    def read(self) -> Generator[Listed, None, None]:
        self.readings += 1
        shown = list(self.bookings)
        assert self.may_continue.wait(20)
        yield from shown[:1]
        if self.failures:
            raise self.failures.pop(0)
        yield from shown[1:]


class Callers:
    """Threads that look up offers."""

    def __init__(self, listing: List) -> None:
        self.read_back = ReadBack()
        self.listing = listing
        self.pool = ThreadPoolExecutor(40)

    def look_up(
        self, offer_id: str, quotes: frozenset[str] = NONE, while_waiting: Callable[[], None] = lambda: None
    ) -> Future[Any]:
        return self.pool.submit(self.read_back.find, "P-1", offer_id, quotes, self.listing.read, while_waiting)

    def waiting(self) -> int:
        return sum(len(reading.wanted) for reading in self.read_back._next.values())

    def wait_behind_a_reading(self, *offers: str) -> tuple[Future[Any], list[Future[Any]]]:
        """The caller that reads, and the callers that came after the reading began."""
        first = self.look_up("first")
        until(lambda: self.listing.readings == 1)
        others = [self.look_up(offer_id) for offer_id in offers]
        until(lambda: self.waiting() == len(offers))
        return first, others


@pytest.fixture
def callers(monkeypatch: pytest.MonkeyPatch) -> Callers:
    monkeypatch.setattr(read_back, "WAIT", 0.01)
    return Callers(List())


def listed(offer_id: str) -> Listed:
    return {"id": f"INS-{offer_id}", "offer_id": offer_id}


def test_all_waiting_callers_share_the_next_reading(callers: Callers) -> None:
    offers = [f"o-{number}" for number in range(30)]
    first, others = callers.wait_behind_a_reading(*offers)
    callers.listing.bookings = [listed(offer_id) for offer_id in offers[1:]]  # after the first reading began
    callers.listing.may_continue.set()

    assert first.result(20) is None
    assert [other.result(20) for other in others] == [None, *callers.listing.bookings]
    assert callers.listing.readings == 2
    assert callers.waiting() == 0


def test_each_partner_has_its_own_readings(callers: Callers) -> None:
    first = callers.look_up("o-1")
    until(lambda: callers.listing.readings == 1)
    other = callers.pool.submit(callers.read_back.find, "P-2", "o-1", NONE, callers.listing.read, lambda: None)
    until(lambda: callers.listing.readings == 2)
    callers.listing.may_continue.set()

    assert (first.result(20), other.result(20)) == (None, None)


def test_a_failure_reaches_all_callers_whose_booking_was_not_seen_before(callers: Callers) -> None:
    first, (seen, unseen) = callers.wait_behind_a_reading("o-1", "o-2")
    callers.listing.bookings = [listed("o-1"), listed("o-2")]
    failure = Unknown("timeout", "no whole answer", None)
    callers.listing.failures = [CallsSuspended(3.0), failure]
    callers.listing.may_continue.set()

    with pytest.raises(CallsSuspended):
        first.result(20)
    assert seen.result(20) == listed("o-1")
    assert unseen.exception(20) is failure


def test_another_caller_reads_when_the_reader_must_leave(callers: Callers) -> None:
    class MustLeave(Exception):
        pass

    callers.listing.may_continue.set()
    callers.listing.bookings = [listed("other"), listed("o-1"), listed("o-2")]
    callers.listing.failures = [MustLeave()]

    with pytest.raises(MustLeave):
        callers.read_back.find("P-1", "o-1", NONE, callers.listing.read, lambda: None)
    assert callers.read_back.find("P-1", "o-2", NONE, callers.listing.read, lambda: None) == listed("o-2")


def test_a_waiting_caller_that_must_leave_does_not_affect_the_others(callers: Callers) -> None:
    def leave() -> None:
        raise CallsSuspended(0.0)

    first, (other,) = callers.wait_behind_a_reading("o-1")
    leaving = callers.look_up("o-2", while_waiting=leave)

    assert isinstance(leaving.exception(20), CallsSuspended)
    callers.listing.bookings = [listed("o-1")]
    callers.listing.may_continue.set()
    assert (first.result(20), other.result(20)) == (None, listed("o-1"))


def test_bookings_without_an_offer_are_distinguished_by_their_quotes(callers: Callers) -> None:
    without_offer = [
        {"id": "INS-7", "quote": {"uuid": "q-7"}},
        {"id": "INS-8", "offer_id": None, "quote": {"uuid": "q-8"}},
    ]
    callers.listing.bookings = without_offer
    callers.listing.may_continue.set()

    assert callers.look_up("o-8", frozenset({"q-8", "q-9"})).result(20) == without_offer[1]
    assert callers.look_up("o-7", frozenset({"q-7"})).result(20) == without_offer[0]
    assert callers.look_up("o-9", frozenset({"q-9"})).result(20) is None


OFFER = "5c7e1f00-0000-4000-8000-00000000abcd"
QUOTE = "0a7e1f00-0000-4000-8000-00000000abcd"


def found(offer_id: str, quotes: frozenset[str], *bookings: Listed, **more: Any) -> Listed | None:
    return ReadBack().find("P-1", offer_id, quotes, lambda: (yield from bookings), lambda: None, **more)


@pytest.mark.parametrize("listed_as", [OFFER, OFFER.upper(), OFFER.replace("-", "")])
@pytest.mark.parametrize("asked_as", [OFFER, OFFER.upper()])
def test_an_offer_is_found_by_its_uuid_in_any_form(listed_as: str, asked_as: str) -> None:
    assert found(asked_as, NONE, listed("other"), listed(listed_as)) == listed(listed_as)


def test_if_offer_ids_differ_in_case_only_the_quote_decides() -> None:
    booking = {"id": "INS-1", "offer_id": "SO-1", "quote": {"uuid": QUOTE.upper()}}

    assert found("so-1", frozenset({QUOTE}), booking) == booking
    assert found("so-1", frozenset({"another"}), booking) is None
    assert found("so-2", frozenset({QUOTE}), booking) is None  # it is another offer's, whatever its quote


def test_a_booking_that_names_no_offer_is_nobodys_if_it_may_be_anothers() -> None:
    one, two = ({"id": id_, "quote": {"uuid": QUOTE}} for id_ in ("INS-1", "INS-2"))
    quotes = frozenset({QUOTE.upper()})

    assert found(OFFER, quotes, one) == one
    assert found(OFFER, quotes, one, one) == one  # pages that overlap
    assert found(OFFER, quotes, one, two) is None
    assert found(OFFER, quotes, one, two, may_be_anothers=lambda id_: id_ == "INS-2") == one
    assert found(OFFER, quotes, one, may_be_anothers=lambda _: True) is None
    assert found(OFFER, quotes, one, {**one, "offer_id": "another"}) is None


@pytest.mark.parametrize("odd", ["a\x00", "\ud800", None, ["x"], "x" * 256])
def test_the_database_is_not_asked_whose_an_id_is_that_it_can_not_hold(odd: Any) -> None:
    asked: list[str] = []
    booking = {"id": odd, "quote": {"uuid": QUOTE}}

    assert found(OFFER, frozenset({QUOTE}), booking, may_be_anothers=lambda id_: bool(asked.append(id_))) == booking
    assert [id_ for id_ in asked if id_ != "None"] == []


def test_a_booking_that_names_no_offer_is_nobodys_if_two_wait_for_its_quote(callers: Callers) -> None:
    quotes = frozenset({"q"})
    first = callers.look_up("first")
    until(lambda: callers.listing.readings == 1)
    others = [callers.look_up(offer, quotes) for offer in ("o-1", "o-2")]
    until(lambda: callers.waiting() == 2)
    callers.listing.bookings = [{"id": "INS-1", "quote": {"uuid": "q"}}]
    callers.listing.may_continue.set()

    assert [first.result(20), *(other.result(20) for other in others)] == [None, None, None]


def test_an_offer_id_may_be_a_number() -> None:
    assert found("100", NONE, {"id": 1, "offer_id": 100}) == {"id": 1, "offer_id": 100}
    assert found("True", NONE, {"id": 1, "offer_id": True}) is None
