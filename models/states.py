"""The states of confirmations and batches, the outcomes of attempts, and the codes of their errors."""

from dataclasses import dataclass
from enum import StrEnum


class State(StrEnum):
    """The state of a confirmation. ``due_at`` of its row says when the Scheduler looks at it next.

    queued        accepted or put back; no worker works on it
    confirming    a worker holds the lease and may be calling XONE
    retrying      an attempt had no lasting answer; the next one is due at ``due_at``
    confirmed     the booking is stored, and its status is a confirmed one
    pending       the booking is stored, and its status may still become a confirmed one: it is followed up
    cancelled     the booking is stored, and its status says that it gives no cover
    failed        XONE refused for good, or the retries are used up
    needs_review  only a person can establish whether a booking exists, or what becomes of one that stays pending
    """

    QUEUED = "queued"
    CONFIRMING = "confirming"
    RETRYING = "retrying"
    CONFIRMED = "confirmed"
    PENDING = "pending"
    CANCELLED = "cancelled"
    FAILED = "failed"
    NEEDS_REVIEW = "needs_review"


BOOKED = (State.CONFIRMED, State.PENDING, State.CANCELLED)  # by the status of the booking, which is stored
ENDED = (*BOOKED, State.FAILED, State.NEEDS_REVIEW)  # nothing is due any more
WAITING = (State.QUEUED, State.RETRYING)  # no worker has a lease
PURGEABLE = (*BOOKED, State.FAILED)  # ended, and no person has to decide with personal data


@dataclass(frozen=True)
class BookingStatuses:
    """What the statuses of a booking mean; in capitals, since case does not count."""

    confirmed: frozenset[str] = frozenset({"CONFIRMED", "ACTIVE"})
    cancelled: frozenset[str] = frozenset({"CANCELLED", "DELETED", "FAILED", "REJECTED", "VOID"})

    def state_of(self, status: str | None) -> State:
        """The state of a confirmation whose booking has this status: one of BOOKED."""
        status = (status or "").strip().upper()
        if status in self.confirmed:
            return State.CONFIRMED
        return State.CANCELLED if status in self.cancelled else State.PENDING


DELETABLE = ("confirmed", "cancelled", "failed")  # nothing more comes; not pending, which may still be confirmed


class BatchState(StrEnum):
    """The state of a batch of reprocessing.

    running    the Scheduler feeds it in
    paused     nothing more is fed in for now; items under way go on
    cancelled  nothing more will be fed in
    done       every item has ended
    """

    RUNNING = "running"
    PAUSED = "paused"
    CANCELLED = "cancelled"
    DONE = "done"


class Outcome(StrEnum):
    """What an attempt showed about the booking.

    booked       XONE has booked, and the booking is stored
    refused      XONE refused for good
    not_booked   XONE certainly did not book this time: not sent, busy, or wrong credentials
    unknown      XONE may have booked
    """

    BOOKED = "booked"
    REFUSED = "refused"
    NOT_BOOKED = "not_booked"
    UNKNOWN = "unknown"


# Beside http-<status>. More may come.
ERROR_CODES = (
    "connect", "timeout", "connection-lost", "bad-answer", "wrong-offer", "too-large", "redirect", "already-booked",
    "credentials", "path", "poison", "resolved", "expired", "withdrawn", "still-pending",
)  # fmt: skip
