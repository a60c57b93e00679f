"""A stand-in of XONE on this machine: token, confirm and the list of bookings, with faults on request.

The end of an offer id asks for a fault: `o-1~drop-after` always, `o-1~drop-after~2` for its first two calls
only (see FAULTS). Switches change XONE as a whole (see SWITCHES). The page at `/` explains both. No offer is
booked twice: the second call is refused whatever its x-idempotency-key, as XONE does not promise to heed it.

From the bottom: answers (what is answered), bookings (what is booked), sending (how it is sent), faults (the tables
of faults and switches), upstream (what XONE knows and decides), page (for people), server (all of it over HTTP).
"""

from worker.sandbox.answers import to_json
from worker.sandbox.faults import FAULTS, SWITCHES, Fault
from worker.sandbox.sending import HUGE_BYTES
from worker.sandbox.server import Sandbox
from worker.sandbox.upstream import Call

__all__ = ["FAULTS", "HUGE_BYTES", "SWITCHES", "Call", "Fault", "Sandbox", "to_json"]
