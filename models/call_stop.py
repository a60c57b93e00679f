"""What keeps a worker from calling XONE, as it notes it for people."""

from dataclasses import dataclass


@dataclass(frozen=True)
class CallStop:
    """What keeps calls of one process from passing.

    code: of the error that stopped them; seconds: for how long already. A circuit breaker lets one probe pass every
    ``probe_every`` seconds; a throttle ends in ``ends_in`` seconds. lookups: it stops only readings of lists of
    bookings, of one partner or, where partner_id is None, of all.
    """

    code: str
    seconds: float
    probe_every: float | None = None
    ends_in: float | None = None
    lookups: bool = False
    partner_id: str | None = None
