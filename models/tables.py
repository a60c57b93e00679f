"""The tables. A confirmation's id is the key of all that belongs to it; it has one booking at most.

Columns named ``sealed_*`` hold encrypted personal data or secrets, bound to their row and column: see
worker/storage/encryption.py.
"""

from datetime import datetime
from decimal import Decimal
from typing import Any, ClassVar
from uuid import UUID

from sqlalchemy import (
    JSON,
    CheckConstraint,
    ColumnElement,
    ForeignKey,
    Index,
    LargeBinary,
    MetaData,
    SmallInteger,
    String,
    Table,
    Text,
    UniqueConstraint,
    Uuid,
    literal_column,
    or_,
    text,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from models.same import as_uuid, spellings
from models.states import BatchState, Outcome, State
from models.types import Money, Time


class Base(DeclarativeBase):
    __table__: ClassVar[Table]

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map: ClassVar = {
        datetime: Time(),
        Decimal: Money(),
        UUID: Uuid(),
        dict[str, Any]: JSON(),
        bytes: LargeBinary(),
    }


def _one_of(column: str, values: type[State] | type[Outcome] | type[BatchState]) -> CheckConstraint:
    allowed = ", ".join(f"'{value}'" for value in values)
    return CheckConstraint(f"{column} in ({allowed})", name=column)


def _partial_index(name: str, *columns: str, where: str, unique: bool = False) -> Index:
    return Index(name, *columns, unique=unique, postgresql_where=text(where), sqlite_where=text(where))


class Confirmation(Base):
    """One offer to be confirmed: the request, its state, and the lease on it."""

    __tablename__ = "confirmations"

    id: Mapped[UUID] = mapped_column(primary_key=True)
    partner_id: Mapped[str] = mapped_column(String(128))
    offer_id: Mapped[str] = mapped_column(String(128), doc="as the first job wrote it")
    offer_uuid: Mapped[UUID | None] = mapped_column(
        doc="the offer id if it is a UUID, whatever form it was written in; null: it is none, or see migration 0005"
    )
    quote_ids: Mapped[str | None] = mapped_column(
        Text, doc="JSON list of the job's quotes, UUIDs in small letters; null: stored by an earlier version"
    )
    order_reference: Mapped[str | None] = mapped_column(String(128))
    echo: Mapped[dict[str, Any]] = mapped_column(doc="the job's metadata, echoed in every event")
    correlation_id: Mapped[str | None] = mapped_column(String(255))
    traceparent: Mapped[str | None] = mapped_column(String(255))
    job_published_at: Mapped[datetime | None] = mapped_column(
        doc="when the checkout published the job; without a timestamp, when it came"
    )

    confirm_by: Mapped[datetime | None] = mapped_column(doc="of the job: no confirm call is made later")
    withdrawn_at: Mapped[datetime | None] = mapped_column(
        doc="since when a person wants no confirm call any more; a row without a job yet has no quote_ids and no body"
    )

    idempotency_key: Mapped[UUID] = mapped_column(doc="the same on every call with this body")
    sealed_body: Mapped[bytes | None] = mapped_column(doc="the exact request body, made before the first call")
    email_hash: Mapped[bytes | None] = mapped_column(
        doc="keyed hash of the policyholder's e-mail: see tasks/email_index.py"
    )

    state: Mapped[State] = mapped_column(String(16))
    due_at: Mapped[datetime | None] = mapped_column(
        doc="when the Scheduler looks at it: the next attempt, or the end of the lease; null if it has ended"
    )
    dispatched_until: Mapped[datetime | None] = mapped_column(doc="a message that resumes it is under way until then")
    lease_token: Mapped[UUID | None] = mapped_column(doc="fencing token: its holder may call XONE and record")

    attempts: Mapped[int] = mapped_column(default=0, doc="all attempts, numbered from 1")
    attempts_used: Mapped[int] = mapped_column(default=0, doc="those that count against RETRY_MAX_ATTEMPTS")
    crashes: Mapped[int] = mapped_column(default=0, doc="leases in a row whose worker did not come back")
    read_backs: Mapped[int] = mapped_column(default=0, doc="read-backs that did not list a booking that must exist")
    answer_unknown: Mapped[bool] = mapped_column(default=False, doc="XONE may have booked: a refusal proves nothing")

    error_code: Mapped[str | None] = mapped_column(String(32))
    error_http_status: Mapped[int | None] = mapped_column(SmallInteger)
    error_detail: Mapped[str | None] = mapped_column(Text)

    batch_id: Mapped[int | None] = mapped_column(doc="the batch that feeds it in")
    sequence: Mapped[int] = mapped_column(default=0, doc="number of the last event")
    queued_at: Mapped[datetime] = mapped_column(doc="RETRY_MAX_AGE counts from here")
    created_at: Mapped[datetime]
    updated_at: Mapped[datetime]
    purged_at: Mapped[datetime | None] = mapped_column(doc="when its personal data was blanked")

    __table_args__ = (
        UniqueConstraint("partner_id", "offer_id"),
        _partial_index(
            "ix_confirmations_offer_uuid_partner_id",
            "offer_uuid",
            "partner_id",
            where="offer_uuid is not null",
            unique=True,
        ),
        _one_of("state", State),
        _partial_index("ix_confirmations_due_at", "due_at", where="due_at is not null"),
        _partial_index("ix_confirmations_partner_id_due_at", "partner_id", "due_at", where="due_at is not null"),
        _partial_index("ix_confirmations_dispatched_until", "dispatched_until", where="dispatched_until is not null"),
        _partial_index(
            "ix_confirmations_answer_unknown_confirm_by",
            "answer_unknown",
            "confirm_by",
            where="confirm_by is not null and state in ('queued', 'retrying')",
        ),
        Index("ix_confirmations_offer_id", "offer_id"),
        Index("ix_confirmations_order_reference", "order_reference"),
        _partial_index(
            "ix_confirmations_ended_badly",
            "state",
            "error_code",
            "error_http_status",
            "updated_at",
            where="state in ('failed', 'needs_review')",
        ),
        _partial_index("ix_confirmations_pending", "partner_id", "updated_at", where="state = 'pending'"),
        _partial_index("ix_confirmations_email_hash", "email_hash", where="email_hash is not null"),
        _partial_index(
            "ix_confirmations_to_purge",
            "updated_at",
            where="state in ('confirmed', 'pending', 'cancelled', 'failed') and purged_at is null",
        ),
    )


def is_offer(offer_id: str) -> ColumnElement[bool]:
    """A condition that a confirmation is of an offer, in whatever form its UUID was written."""
    is_written = Confirmation.offer_id.in_(spellings(offer_id))
    uuid = as_uuid(offer_id)
    return is_written if uuid is None else or_(is_written, Confirmation.offer_uuid == uuid)


def is_pending(row: Any = Confirmation) -> ColumnElement[bool]:
    """A condition that a confirmation is pending, with the state literally in it: see ``ix_confirmations_pending``.

    row: the confirmations, or an alias of them.
    """
    is_it: ColumnElement[bool] = row.state == literal_column(f"'{State.PENDING.value}'")
    return is_it


class FurtherEmail(Base):
    """Another e-mail that finds a confirmation: of an insured, or of the policyholder as XONE returned it."""

    __tablename__ = "further_emails"

    confirmation_id: Mapped[UUID] = mapped_column(ForeignKey("confirmations.id"), primary_key=True)
    email_hash: Mapped[bytes] = mapped_column(primary_key=True)

    __table_args__ = (Index("ix_further_emails_email_hash", "email_hash"),)


class Batch(Base):
    """Confirmations that are tried again. The Scheduler feeds them in at the batch's rate."""

    __tablename__ = "batches"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    state: Mapped[BatchState] = mapped_column(String(16))
    reason: Mapped[str | None] = mapped_column(Text)
    by: Mapped[str] = mapped_column(String(255))
    include_needs_review: Mapped[bool]
    rate: Mapped[float | None] = mapped_column(
        doc="items a second; null: as fast as the bound on items in flight allows"
    )
    total: Mapped[int]
    fed_until: Mapped[datetime] = mapped_column(doc="items that the rate allows are fed in up to this time")
    created_at: Mapped[datetime]
    ended_at: Mapped[datetime | None]

    __table_args__ = (
        _one_of("state", BatchState),
        _partial_index("ix_batches_open", "state", where="state in ('running', 'paused')"),
    )


class BatchItem(Base):
    """A confirmation of a batch: waiting until it is fed in, then running until it has ended."""

    __tablename__ = "batch_items"

    batch_id: Mapped[int] = mapped_column(ForeignKey("batches.id"), primary_key=True)
    position: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    confirmation_id: Mapped[UUID] = mapped_column(ForeignKey("confirmations.id"))
    fed_at: Mapped[datetime | None]
    ended_at: Mapped[datetime | None]
    outcome: Mapped[str | None] = mapped_column(String(16), doc="the state it ended in, or 'skipped'")

    __table_args__ = (
        UniqueConstraint("batch_id", "confirmation_id"),
        Index("ix_batch_items_confirmation_id", "confirmation_id"),
        _partial_index("ix_batch_items_waiting", "batch_id", "position", where="fed_at is null"),
        _partial_index("ix_batch_items_running", "batch_id", where="fed_at is not null and ended_at is null"),
    )


class Pause(Base):
    """A person has paused calls to XONE: for one partner or, with an empty ``partner_id``, for all."""

    __tablename__ = "pauses"

    partner_id: Mapped[str] = mapped_column(String(128), primary_key=True)
    reason: Mapped[str] = mapped_column(Text)
    by: Mapped[str] = mapped_column(String(255))
    created_at: Mapped[datetime]


class AuditEntry(Base):
    """A change that a person made with a command: who, when, what, why, how many."""

    __tablename__ = "audit"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    at: Mapped[datetime]
    by: Mapped[str] = mapped_column(String(255))
    command: Mapped[str] = mapped_column(String(64))
    reason: Mapped[str | None] = mapped_column(Text)
    count: Mapped[int]
    details: Mapped[dict[str, Any]] = mapped_column(doc="ids, filters and numbers; no personal data")


class RateLimit(Base):
    """When the next slot of a rate limit is, over all workers together: see worker/storage/rate_limiter.py."""

    __tablename__ = "rate_limits"

    name: Mapped[str] = mapped_column(String(32), primary_key=True)
    next_at: Mapped[datetime]


class Server(Base):
    """A server that events were written on, and where their sequences go on: see worker/storage/sequence_floor.py."""

    __tablename__ = "servers"

    name: Mapped[str] = mapped_column(String(64), primary_key=True, doc="its cluster and timeline; empty on SQLite")
    sequence_floor: Mapped[int]
    seen_at: Mapped[datetime]


class Attempt(Base):
    """One try to confirm an offer, stored before the call. Without an outcome, its worker did not come back."""

    __tablename__ = "attempts"

    confirmation_id: Mapped[UUID] = mapped_column(ForeignKey("confirmations.id"), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    lease_token: Mapped[UUID]
    started_at: Mapped[datetime]
    duration_ms: Mapped[int | None]
    outcome: Mapped[Outcome | None] = mapped_column(String(16))
    code: Mapped[str | None] = mapped_column(String(32))
    http_status: Mapped[int | None] = mapped_column(SmallInteger)
    detail: Mapped[str | None] = mapped_column(Text)
    sealed_answer: Mapped[bytes | None] = mapped_column(doc="the body of an answer that held no booking")

    __table_args__ = (_one_of("outcome", Outcome),)


class Booking(Base):
    """The booking as XONE returned it, under XONE's names but for ``quote.uuid`` and the encrypted fields."""

    __tablename__ = "bookings"

    confirmation_id: Mapped[UUID] = mapped_column(ForeignKey("confirmations.id"), primary_key=True)
    id: Mapped[str] = mapped_column(String(255), doc="XONE's booking id, `data.id`")
    partner_id: Mapped[str | None] = mapped_column(
        String(128),
        doc="of the confirmation; null: stored by an earlier version, or another one had this booking first",
    )
    offer_id: Mapped[str] = mapped_column(String(255))
    provider_reference: Mapped[str | None] = mapped_column(Text)
    language: Mapped[str | None] = mapped_column(Text)
    provider_customer_id: Mapped[str | None] = mapped_column(Text)
    status: Mapped[str | None] = mapped_column(Text)
    currency: Mapped[str | None] = mapped_column(Text)
    price: Mapped[Decimal | None]
    created_at: Mapped[datetime | None]
    updated_at: Mapped[datetime | None]
    is_instant_booking: Mapped[bool | None]
    payment_status: Mapped[str | None] = mapped_column(Text)
    quote_uuid: Mapped[str | None] = mapped_column(Text)

    sealed_security_token: Mapped[bytes | None]
    sealed_coi_url: Mapped[bytes | None]
    sealed_coi_pdf: Mapped[bytes | None]
    sealed_account_url: Mapped[bytes | None]
    sealed_fnol_link: Mapped[bytes | None]
    sealed_sign_up_url: Mapped[bytes | None]
    sealed_rest: Mapped[bytes | None] = mapped_column(
        doc="JSON, by path: unknown fields, and values that did not fit their field"
    )

    recorded_at: Mapped[datetime]

    __table_args__ = (
        Index("ix_bookings_id", "id"),
        # A booking belongs to one confirmation.
        _partial_index("ix_bookings_partner_id_id", "partner_id", "id", where="partner_id is not null", unique=True),
    )


class EarlierBooking(Base):
    """What was stored of a booking until it changed at XONE."""

    __tablename__ = "earlier_bookings"

    confirmation_id: Mapped[UUID] = mapped_column(ForeignKey("bookings.confirmation_id"), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False, doc="from 1, the oldest")
    status: Mapped[str | None] = mapped_column(Text)
    changed_at: Mapped[datetime] = mapped_column(doc="when the change was recorded")
    sealed_booking: Mapped[bytes | None] = mapped_column(doc="JSON: booking, policyholder and policies as stored")


class FollowUp(Base):
    """The readings of a partner's list of bookings while some of its bookings are pending, and the lease on them."""

    __tablename__ = "follow_ups"

    partner_id: Mapped[str] = mapped_column(String(128), primary_key=True)
    read_at: Mapped[datetime | None] = mapped_column(doc="when the last reading began; null before the first")
    due_at: Mapped[datetime] = mapped_column(doc="when the list is read next")
    lease_token: Mapped[UUID | None] = mapped_column(doc="fencing token: its holder may read the list and record")
    leased_until: Mapped[datetime | None]


class Policyholder(Base):
    """The policyholder as XONE returned it."""

    __tablename__ = "policyholders"

    confirmation_id: Mapped[UUID] = mapped_column(ForeignKey("bookings.confirmation_id"), primary_key=True)
    id: Mapped[str | None] = mapped_column(Text)
    created_at: Mapped[datetime | None]
    updated_at: Mapped[datetime | None]
    sealed_person: Mapped[bytes | None] = mapped_column(doc="JSON of models.booking.Person: names, e-mail, address …")


class Policy(Base):
    """A policy of a booking, in the order of the answer."""

    __tablename__ = "policies"

    confirmation_id: Mapped[UUID] = mapped_column(ForeignKey("bookings.confirmation_id"), primary_key=True)
    position: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    id: Mapped[str | None] = mapped_column(Text)
    parent_id: Mapped[str | None] = mapped_column(Text)
    status: Mapped[str | None] = mapped_column(Text)
    policy_type: Mapped[str | None] = mapped_column(Text)
    policy_code: Mapped[str | None] = mapped_column(Text)
    policy_version: Mapped[str | None] = mapped_column(Text)
    policy_start_date: Mapped[datetime | None]
    policy_start_date_tz_offset: Mapped[str | None] = mapped_column(Text)
    policy_end_date: Mapped[datetime | None]
    policy_end_date_tz_offset: Mapped[str | None] = mapped_column(Text)
    price: Mapped[Decimal | None]
    tax: Mapped[Decimal | None]
    commission: Mapped[Decimal | None]
    cover_amount: Mapped[Decimal | None]
    claim_selector_id: Mapped[str | None] = mapped_column(Text)
    pds_url: Mapped[str | None] = mapped_column(Text)
    confirmed_at: Mapped[datetime | None]
    cancelled_at: Mapped[datetime | None]
    created_at: Mapped[datetime | None]
    updated_at: Mapped[datetime | None]
    policy_content: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    extra_fields: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True), doc="money as decimal strings")


class OutboxEvent(Base):
    """An event, written in the transaction that it is about. Debezium's outbox event router expects these columns."""

    __tablename__ = "outbox"

    id: Mapped[UUID] = mapped_column(primary_key=True)
    aggregatetype: Mapped[str] = mapped_column(String(32))
    aggregateid: Mapped[str] = mapped_column(String(257), doc="<partner_id>/<offer_id>")
    type: Mapped[str] = mapped_column(String(64))
    payload: Mapped[str] = mapped_column(Text, doc="the CloudEvent, exactly as it is published")

    confirmation_id: Mapped[UUID] = mapped_column(ForeignKey("confirmations.id"))
    sequence: Mapped[int]
    correlation_id: Mapped[str | None] = mapped_column(String(255))
    traceparent: Mapped[str | None] = mapped_column(String(255))
    created_at: Mapped[datetime]
    claimed_until: Mapped[datetime | None] = mapped_column(doc="an outbox relay is publishing it until then")
    published_at: Mapped[datetime | None]

    __table_args__ = (
        UniqueConstraint("confirmation_id", "sequence"),
        _partial_index("ix_outbox_unpublished", "created_at", where="published_at is null"),
    )


class WorkerVitals(Base):
    """What a worker process notes of itself every few seconds, for people. Nothing that workers do depends on it."""

    __tablename__ = "workers"

    id: Mapped[UUID] = mapped_column(primary_key=True, doc="of the process, from its start to its end")
    worker_id: Mapped[UUID] = mapped_column(doc="of the worker; another one only for processes of the prefork pool")
    host: Mapped[str] = mapped_column(String(255))
    pid: Mapped[int]
    version: Mapped[str] = mapped_column(String(64))
    started_at: Mapped[datetime]
    seen_at: Mapped[datetime]
    vitals: Mapped[dict[str, Any]] = mapped_column(doc="concurrency, unwell parts, what keeps calls from passing")
