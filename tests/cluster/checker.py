"""The checker: decides from histories alone whether the promises were kept while something failed.

Histories are what was seen from outside: jobs that the broker confirmed, calls that came in at XONE, what XONE booked,
rows at the end, events that a consumer received, dead letters. All times are of one monotonic clock, in seconds.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

CONFIRMED = "confirmed"
ENDED = {  # the event that announces each state in which a confirmation may end
    CONFIRMED: "booking.confirmed",
    "pending": "booking.pending",
    "cancelled": "booking.cancelled",
    "failed": "confirmation.failed",
    "needs_review": "confirmation.needs_review",
}
LATE = 5.0  # seconds from publishing a job to its event: whatever takes longer did not flow
HANG_UP_NOTICED = 0.5  # seconds in which XONE's stand-in notices that a client has left


@dataclass(frozen=True)
class Job:
    """A job that a checkout published. confirmed_at: None if the broker never confirmed it; tries: publishes of it."""

    offer: str
    published_at: float
    confirmed_at: float | None
    tries: int = 1


@dataclass(frozen=True)
class Call:
    """A confirm call at XONE. ended: when it was answered, or its client seen to be gone; status: None: no answer."""

    offer: str
    key: str | None
    started: float
    ended: float
    status: int | None


@dataclass(frozen=True)
class Row:
    """A confirmation as it is stored at the end. sequences: of the events in its outbox, from the lowest."""

    offer: str
    state: str
    booking: str | None
    sequences: tuple[int, ...] = (1,)


@dataclass(frozen=True)
class Received:
    """An event that a consumer received. booking: the id of the booking in it."""

    id: str
    offer: str
    type: str
    sequence: int
    booking: str | None
    at: float


@dataclass(frozen=True)
class Histories:
    """All that is known of a span of time. Each collection is in the order in which it happened.

    bookings: offer and id of each booking that XONE made; in_flight_twice: offers of which XONE's stand-in saw two
    calls at once; fault: when it began and ended; is_lossy: whether the database lost commits, as an asynchronous
    standby does: rows may then be gone, and their bookings be announced again; is_reconciled: whether what XONE has was
    taken in since; held: offers that the fault itself
    holds up, such as by a lock on their rows; within: seconds from the begin of the fault in which all must flow again;
    max_pause: the longest time in seconds in which jobs may wait and no event comes.
    """

    jobs: tuple[Job, ...] = ()
    calls: tuple[Call, ...] = ()
    bookings: tuple[tuple[str, str], ...] = ()
    in_flight_twice: frozenset[str] = frozenset()
    rows: tuple[Row, ...] = ()
    events: tuple[Received, ...] = ()
    dead_letters: tuple[str, ...] = ()
    incidents: tuple[str, ...] = ()  # what must not happen at all: a worker that ended by itself, a defect in a log
    fault: tuple[float, float] = (0.0, 0.0)
    is_lossy: bool = False
    is_reconciled: bool = False
    held: frozenset[str] = frozenset()
    within: float = math.inf
    max_pause: float = math.inf

    def of(self, prefix: str) -> "Histories":
        """Only what belongs to offers that begin with ``prefix``."""

        def own(entries: Iterable[Job | Call | Row | Received]) -> tuple:  # type: ignore[type-arg]
            return tuple(entry for entry in entries if entry.offer.startswith(prefix))

        return replace(
            self,
            jobs=own(self.jobs),
            calls=own(self.calls),
            rows=own(self.rows),
            events=own(self.events),
            bookings=tuple(pair for pair in self.bookings if pair[0].startswith(prefix)),
            in_flight_twice=frozenset(offer for offer in self.in_flight_twice if offer.startswith(prefix)),
            dead_letters=tuple(offer for offer in self.dead_letters if offer.startswith(prefix)),
        )

    @cached_property
    def row_of(self) -> dict[str, Row]:
        return {row.offer: row for row in self.rows}

    @cached_property
    def first_receipts(self) -> dict[str, list[Received]]:
        """By offer, each event when it came first."""
        first = {event.id: event for event in reversed(self.events)}
        by_offer: dict[str, list[Received]] = defaultdict(list)
        for event in sorted(first.values(), key=lambda event: event.at):
            by_offer[event.offer].append(event)
        return by_offer

    @cached_property
    def ends(self) -> dict[str, float]:
        """By offer, when its first event came."""
        return {offer: events[0].at for offer, events in self.first_receipts.items()}

    @cached_property
    def lost(self) -> list[str]:
        """Offers whose job the broker confirmed, and that did not come to an end."""
        confirmed = [job.offer for job in self.jobs if job.confirmed_at is not None]
        return [offer for offer in confirmed if not self._has_ended(offer)]

    def _has_ended(self, offer: str) -> bool:
        row = self.row_of.get(offer)
        announced = {event.type for event in self.first_receipts.get(offer, ())}
        return row is not None and ENDED.get(row.state) in announced


# --- The rules: each yields what violates it ---


def every_confirmed_publish_ended(seen: Histories) -> Iterator[str]:
    for offer in seen.lost:
        row = seen.row_of.get(offer)
        if row is None and seen.is_lossy:
            continue  # counted as lost
        types = [event.type for event in seen.first_receipts.get(offer, ())]
        yield f"{offer}: {row.state if row else 'no row'}, events {types}"


def every_job_was_confirmed(seen: Histories) -> Iterator[str]:
    yield from (f"{job.offer}: never, in {job.tries} tries" for job in seen.jobs if job.confirmed_at is None)


def every_row_is_of_a_job(seen: Histories) -> Iterator[str]:
    published = {job.offer for job in seen.jobs}
    yield from (f"{offer}: was never published" for offer in seen.row_of if offer not in published)
    yield from (f"{offer}: two rows" for offer, count in Counter(row.offer for row in seen.rows).items() if count > 1)


def no_offer_was_booked_twice(seen: Histories) -> Iterator[str]:
    for offer, ids in _booking_ids(seen).items():
        if len(ids) > 1:
            yield f"{offer}: booked as {sorted(ids)}"
    booked = Counter(call.offer for call in seen.calls if call.status == 201)
    yield from (f"{offer}: {count} calls made a booking" for offer, count in booked.items() if count > 1)


def one_key_for_all_calls_of_an_offer(seen: Histories) -> Iterator[str]:
    """With another key, XONE can't tell a repeat from a second order. The key is lost with the row."""
    keys: dict[str, set[str | None]] = defaultdict(set)
    for call in seen.calls:
        keys[call.offer].add(call.key)
    for offer, used in keys.items():
        if None in used or (len(used) > 1 and not seen.is_lossy):
            yield f"{offer}: {len(used)} keys" + (", one of them none" if None in used else "")


def no_two_calls_at_once(seen: Histories) -> Iterator[str]:
    yield from (f"{offer}: two calls in flight at once" for offer in sorted(seen.in_flight_twice))
    calls: dict[str, list[Call]] = defaultdict(list)
    for call in sorted(seen.calls, key=lambda call: call.started):
        calls[call.offer].append(call)
    for offer, own in calls.items():
        for before, after in pairwise(own):
            if after.started < before.ended - (HANG_UP_NOTICED if before.status is None else 0):
                yield f"{offer}: a call began {before.ended - after.started:.2f} s before the one before it ended"


def every_booking_is_stored_and_announced(seen: Histories) -> Iterator[str]:
    announced: dict[str, set[str]] = defaultdict(set)
    for event in seen.events:
        if event.booking is not None:
            announced[event.offer].add(event.booking)
    stored = {row.offer: row.booking for row in seen.rows if row.booking is not None}
    upstream = _booking_ids(seen)
    for offer in sorted(upstream.keys() | stored.keys() | announced.keys()):
        ids = upstream.get(offer, set()), {stored[offer]} if offer in stored else set(), announced.get(offer, set())
        if seen.is_lossy and not seen.is_reconciled and offer not in seen.row_of and not ids[2] - ids[0]:
            continue  # the row is lost, and XONE still knows the booking
        if not ids[0] == ids[1] == ids[2]:
            yield f"{offer}: upstream {sorted(ids[0])}, stored {sorted(ids[1])}, announced {sorted(ids[2])}"


def events_are_in_order(seen: Histories) -> Iterator[str]:
    """A consumer that drops what is not newer than what it has misses nothing."""
    for offer, events in seen.first_receipts.items():
        sequences = [event.sequence for event in events]
        if not all(before < after for before, after in pairwise(sequences)):
            yield f"{offer}: {sequences}"


def every_event_of_the_outbox_was_received(seen: Histories) -> Iterator[str]:
    """And no other, unless the database has lost it."""
    for row in seen.rows:
        written, received = set(row.sequences), {event.sequence for event in seen.first_receipts.get(row.offer, ())}
        if written - received or (received - written and not seen.is_lossy):
            yield f"{row.offer}: {sorted(written)} written, {sorted(received)} received"


def each_end_is_announced_once(seen: Histories) -> Iterator[str]:
    """Under two ids, a consumer would take one booking for two. A row that is lost loses the id of its event."""
    for offer, events in seen.first_receipts.items():
        for (event_type, booking), count in Counter((event.type, event.booking) for event in events).items():
            if count > 1 and booking is not None and not seen.is_lossy:
                yield f"{offer}: {count} events {event_type} of booking {booking}"


def no_good_job_is_a_dead_letter(seen: Histories) -> Iterator[str]:
    yield from seen.dead_letters


def all_flows_again_in_time(seen: Histories) -> Iterator[str]:
    if (seconds := seconds_until_all_flows(seen)) > seen.within:
        yield f"after {seconds:.1f} s, not within {seen.within:.0f} s"


def no_pause_is_too_long(seen: Histories) -> Iterator[str]:
    if (seconds := longest_stall(seen)) > seen.max_pause:
        yield f"{seconds:.1f} s, not {seen.max_pause:.0f} s at most"


def no_incident(seen: Histories) -> Iterator[str]:
    yield from seen.incidents


RULES: dict[str, Callable[[Histories], Iterator[str]]] = {
    "every job was confirmed by the broker in the end": every_job_was_confirmed,
    "every confirmed publish ended": every_confirmed_publish_ended,
    "every row is of one job": every_row_is_of_a_job,
    "no offer was booked twice": no_offer_was_booked_twice,
    "all calls of an offer have the same idempotency key": one_key_for_all_calls_of_an_offer,
    "no two calls of an offer at once": no_two_calls_at_once,
    "every booking upstream is stored and announced": every_booking_is_stored_and_announced,
    "events are in order": events_are_in_order,
    "every event of the outbox was received": every_event_of_the_outbox_was_received,
    "each end is announced under one id": each_end_is_announced_once,
    "no good job is a dead letter": no_good_job_is_a_dead_letter,
    "all flows again in time": all_flows_again_in_time,
    "no pause is too long": no_pause_is_too_long,
    "no worker ended by itself or reported a defect": no_incident,
}


def _booking_ids(seen: Histories) -> dict[str, set[str]]:
    ids: dict[str, set[str]] = defaultdict(set)
    for offer, booking in seen.bookings:
        ids[offer].add(booking)
    return ids


@dataclass(frozen=True)
class Verdict:
    """What the checker found. Numbers, unless said otherwise, are of offers.

    lasted: seconds of the fault; lost: confirmed jobs without an end; doubled: booked, or called, twice where once was
    right; repeated_events: further receipts of an event, and events about an end that was announced before;
    repeated_calls: calls of an offer after one that booked, or that had no answer; repeated_jobs: further publishes;
    stall: the longest time in seconds in which jobs waited and no event came; flows_after: seconds from the begin of
    the fault to the end of the last job that took longer than LATE.
    """

    violations: dict[str, list[str]]  # by rule
    lasted: float
    jobs: int
    lost: int
    doubled: int
    repeated_events: int
    repeated_calls: int
    repeated_jobs: int
    stall: float
    flows_after: float

    @property
    def is_good(self) -> bool:
        return not self.violations


def check(seen: Histories) -> Verdict:
    """Decides. A pure function."""
    found = {rule: list(violations(seen)) for rule, violations in RULES.items()}
    doubled = {
        violation.partition(":")[0]
        for rule in (no_offer_was_booked_twice, no_two_calls_at_once, one_key_for_all_calls_of_an_offer)
        for violation in rule(seen)
    }
    receipts = len(seen.events)
    announced = {(event.offer, event.type, event.booking) for event in seen.events}
    return Verdict(
        violations={rule: violations for rule, violations in found.items() if violations},
        lasted=seen.fault[1] - seen.fault[0],
        jobs=len(seen.jobs),
        lost=len(seen.lost),
        doubled=len(doubled),
        repeated_events=receipts - len(announced),
        repeated_calls=repeated_calls(seen),
        repeated_jobs=sum(job.tries - 1 for job in seen.jobs),
        stall=longest_stall(seen),
        flows_after=seconds_until_all_flows(seen),
    )


def repeated_calls(seen: Histories) -> int:
    may_have_booked: set[str] = set()
    repeated = 0
    for call in sorted(seen.calls, key=lambda call: call.started):
        repeated += call.offer in may_have_booked
        if call.status in (None, 201):
            may_have_booked.add(call.offer)
    return repeated


def longest_stall(seen: Histories) -> float:
    """The longest time in which at least one job, which the broker had, waited, and no event came at all."""
    moments = sorted(seen.ends.values())
    waits = [
        (job.confirmed_at, seen.ends[job.offer]) for job in seen.jobs if job.confirmed_at and job.offer in seen.ends
    ]
    longest = 0.0
    for before, after in zip([float("-inf"), *moments], moments, strict=False):
        waiting = [max(begun, before) for begun, ended in waits if begun < after <= ended]
        if waiting:
            longest = max(longest, after - min(waiting))
    return longest


def seconds_until_all_flows(seen: Histories) -> float:
    """From the begin of the fault until the last job that took longer than LATE had its event; 0 if all were quick.

    The time counts from when a checkout first tried to publish: a broker that takes no jobs is an outage, too.
    """
    ends = [
        seen.ends[job.offer]
        for job in seen.jobs
        if job.offer in seen.ends and job.offer not in seen.held and seen.ends[job.offer] - job.published_at > LATE
    ]
    return max(0.0, max(ends, default=seen.fault[0]) - seen.fault[0])
