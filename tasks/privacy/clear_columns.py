"""What earlier versions stored in clear, and this one encrypts: unknown fields, and values without a known form."""

from collections import defaultdict
from collections.abc import Collection
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, select, update

from models import booking as xone
from models.tables import Booking, Policy
from tasks.record import booking_values, policy_values


def remove_misfits(connection: Connection, ids: Collection[UUID]) -> dict[UUID, dict[str, Any]]:
    """Takes such values out of the clear columns of bookings. Returns them by confirmation and path, as leftovers()."""
    policies = defaultdict[UUID, list[dict[str, Any]]](list)
    is_theirs = Policy.confirmation_id.in_(ids)
    for row in connection.execute(select(Policy.__table__).where(is_theirs).order_by(Policy.position)):
        policies[row.confirmation_id].append({name: getattr(row, name) for name in xone.Policy.model_fields})
    removed = {}
    for row in connection.execute(select(Booking.__table__).where(Booking.confirmation_id.in_(ids))).all():
        id_, known = row.confirmation_id, xone.Booking.model_fields
        stored = {name: value for name, value in row._mapping.items() if name in known}
        booking = xone.Booking.model_validate(
            {**stored, "quote": {"uuid": row.quote_uuid}, "policies": policies.get(id_, [])}
        )
        if misfits := booking.leftovers():
            removed[id_] = misfits
            connection.execute(update(Booking).where(Booking.confirmation_id == id_).values(booking_values(booking)))
            for position, policy in enumerate(booking.policies):
                is_row = Policy.confirmation_id == id_, Policy.position == position
                connection.execute(update(Policy).where(*is_row).values(policy_values(policy)))
    return removed
