"""The states of a confirmation and the outcomes of an attempt."""

from enum import StrEnum


class State(StrEnum):
    """Where a confirmation stands. ``due_at`` of the row says when the Scheduler looks at it next.

    queued        accepted, or put back, and not being worked on
    confirming    a worker holds the lease and may be calling XONE
    retrying      an attempt had no lasting answer; the next one is due at ``due_at``
    confirmed     the booking is stored and its status is a confirmed one
    pending       the booking is stored and its status is not a confirmed one yet
    failed        XONE refused for good, or the retries are used up
    needs_review  whether a booking exists can't be established without a person
    """

    QUEUED = "queued"
    CONFIRMING = "confirming"
    RETRYING = "retrying"
    CONFIRMED = "confirmed"
    PENDING = "pending"
    FAILED = "failed"
    NEEDS_REVIEW = "needs_review"


class BatchState(StrEnum):
    """Where a batch of reprocessing stands.

    running    the Scheduler feeds it in
    paused     nothing more is fed in; what is under way goes on
    cancelled  nothing more will be fed in
    done       every item has ended
    """

    RUNNING = "running"
    PAUSED = "paused"
    CANCELLED = "cancelled"
    DONE = "done"


class Outcome(StrEnum):
    """What an attempt told about the booking.

    booked       XONE has it, and so have we
    refused      XONE said no for good
    not_booked   XONE certainly did not book this time: not sent, busy, or wrong credentials
    unknown      XONE may have booked
    """

    BOOKED = "booked"
    REFUSED = "refused"
    NOT_BOOKED = "not_booked"
    UNKNOWN = "unknown"
