"""What earlier versions stored in clear, and this one encrypts: unknown fields, and values without a known form."""

from collections.abc import Collection
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, select, update

from models import booking as xone
from models.event import BOOKING_EVENTS, without_misfits
from models.tables import Booking, OutboxEvent, Policy, Policyholder
from tasks.stored_booking import booking_values, policy_values, stored_in_clear

_IDS = {"id": "-", "offer_id": "-"}  # in place of those of a booking, which stay


def remove_misfits(connection: Connection, ids: Collection[UUID]) -> dict[UUID, dict[str, Any]]:
    """Takes such values out of the clear columns of bookings, and out of their events.

    Returns what was in columns, by confirmation and path, as leftovers().
    """
    _remove_from_events(connection, ids)
    removed = {}
    for id_, stored in stored_in_clear(connection, ids).items():
        booking = xone.Booking.model_validate({**stored, **_IDS})
        if misfits := booking.leftovers():
            removed[id_] = misfits
            values = {name: value for name, value in booking_values(booking).items() if name not in _IDS}
            connection.execute(update(Booking).where(Booking.confirmation_id == id_).values(values))
            if booking.policyholder is not None:
                is_row = Policyholder.confirmation_id == id_
                connection.execute(update(Policyholder).where(is_row).values(id=booking.policyholder.id))
            for position, policy in enumerate(booking.policies):
                is_policy = Policy.confirmation_id == id_, Policy.position == position
                connection.execute(update(Policy).where(*is_policy).values(policy_values(policy)))
    return removed


def _remove_from_events(connection: Connection, ids: Collection[UUID]) -> None:
    is_theirs = OutboxEvent.confirmation_id.in_(ids), OutboxEvent.type.in_(BOOKING_EVENTS)
    for event in connection.execute(select(OutboxEvent.id, OutboxEvent.payload).where(*is_theirs)).all():
        payload = without_misfits(event.payload)
        if payload != event.payload:
            connection.execute(update(OutboxEvent).where(OutboxEvent.id == event.id).values(payload=payload))
