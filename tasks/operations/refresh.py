"""A look at one booking at XONE, now: what a follow-up would find, for a booking in any state."""

import time
from dataclasses import dataclass

from models.event import EventType
from models.states import BOOKED, State
from tasks.follow_up import STILL_PENDING, FollowUpLost, ListLease, lease_list, read_list, release_list
from tasks.operations import lookup
from tasks.operations.audit import audit
from tasks.operations.lookup import ConfirmationDetails
from worker.errors import RefreshError
from worker.runtime import Runtime
from worker.xone.circuit_breaker import CallsSuspended

MAX_WAIT = 60.0  # seconds for another worker that reads the partner's list
POLL = 0.5  # seconds


@dataclass(frozen=True)
class Refreshed:
    """What a look has shown. listed: whether the partner's list holds the booking; state, status, sequence: as now.

    event_type: of the event that was written; None if nothing has changed.
    """

    partner_id: str
    offer_id: str
    booking_id: str
    listed: bool
    state_before: State
    state: State
    status_before: str | None
    status: str | None
    event_type: EventType | None
    sequence: int


def refresh(runtime: Runtime, before: ConfirmationDetails, by: str) -> Refreshed:
    """Reads the partner's list until the booking was seen, and records what has changed.

    before: of a confirmation with a booking; by: ``user@host``. Raises RefreshError, XoneError and CallsSuspended.
    """
    booking = before.booking
    is_reviewed = before.state is State.NEEDS_REVIEW and before.error and before.error.code == STILL_PENDING
    if booking is None or not (before.state in BOOKED or is_reviewed):
        raise RefreshError(f"offer {before.offer_id} is {before.state}: no booking of it is stored that could change")
    if not runtime.xone.can_list_bookings:
        raise RefreshError("XONE_BOOKINGS_PATH is empty: bookings can't be looked at")
    if (wait := runtime.xone.calls.wait_for_lookup(before.partner_id)) > 0:
        raise CallsSuspended(wait)
    lease = _lease(runtime, before.partner_id)
    try:
        look = read_list(runtime, lease, [booking.id], (*BOOKED, State.NEEDS_REVIEW))
        release_list(lease, runtime, None)
    except FollowUpLost:
        raise RefreshError("the look took so long that a worker reads this partner's list now: try again") from None
    except BaseException:
        release_list(lease, runtime, None)
        raise
    changed = {offer_id: change.event_type for offer_id, change in look.changed}
    if changed:
        facts = {"partner": before.partner_id, "offer": before.offer_id}
        runtime.commit_once(lambda connection: audit(connection, "refresh", by, None, len(changed), **facts))
    (after,) = (found.details for found in lookup.find(runtime.engine, before.offer_id, before.partner_id))
    return Refreshed(
        partner_id=before.partner_id,
        offer_id=before.offer_id,
        booking_id=booking.id,
        listed=bool(look.listed),
        state_before=before.state,
        state=after.state,
        status_before=booking.status,
        status=after.booking.status if after.booking else None,
        event_type=changed.get(before.offer_id),
        sequence=len(after.events),
    )


def _lease(runtime: Runtime, partner_id: str) -> ListLease:
    """The lease on a partner's list, for which others are waited. Raises RefreshError."""
    until = time.monotonic() + MAX_WAIT
    while (lease := lease_list(runtime, partner_id)) is None:
        if time.monotonic() > until or runtime.shutting_down.wait(POLL):
            raise RefreshError(f"a worker is reading the list of bookings of {partner_id}: try again in a minute")
    return lease
