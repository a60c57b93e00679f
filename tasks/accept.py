"""Accepting a job: stores its confirmation and leases it, or rejects the job."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, Row, bindparam, case, delete, or_, select, update
from uuid_utils.compat import uuid4, uuid7

from models.job import Job, JobRejected, as_rounded_before, has_same_content
from models.same import as_uuid, canonical_id, spellings
from models.states import State
from models.tables import Attempt, Confirmation, FurtherEmail
from tasks import email_index
from tasks.lease import History, Lease, acquire, lease_from_row, open_attempts
from worker.storage.database import DIALECTS, StatementBatch, insert_if_absent, locked, now, now_plus
from worker.storage.encryption import Encryption


@dataclass(frozen=True)
class Delivery:
    """Properties of the job's message that its events carry on."""

    correlation_id: str | None = None
    traceparent: str | None = None
    published_at: datetime | None = None  # when the checkout published it; without a timestamp, when it came


@dataclass(frozen=True)
class NewJob:
    """A job ready to be stored, encrypted and hashed: what takes time is done before the transaction."""

    id: UUID  # of its confirmation, unless there is one already
    job: Job
    delivery: Delivery
    body: bytes = field(repr=False)
    sealed_body: bytes = field(repr=False)
    email_hashes: list[bytes] = field(repr=False)
    idempotency_key: UUID

    @classmethod
    def of(cls, job: Job, delivery: Delivery, encryption: Encryption) -> "NewJob":
        confirmation_id, body = uuid7(), job.request_body()
        sealed = encryption.encrypt(confirmation_id, "body", body)
        return cls(confirmation_id, job, delivery, body, sealed, email_index.of_request(encryption, body), uuid4())


def accept_new_batch(
    connection: Connection, jobs: Sequence[NewJob], token: UUID, lease_seconds: float
) -> dict[UUID, Lease]:
    """Stores and leases the jobs whose offers have no confirmation yet. Leaves the others for ``accept``.

    Returns the leases by the id of the NewJob. token, lease_seconds: as in ``accept``. Repeatable.
    """
    leased_at = time.monotonic()
    leased = {"state": State.CONFIRMING, "lease_token": token, "wait": lease_seconds, "attempts": 1}
    jobs = _of_unknown_offers(connection, jobs)
    if not jobs:
        return {}
    # In one order, so that no two transactions wait for each other.
    in_order = sorted(jobs, key=lambda new: (new.job.partner_id, canonical_id(new.job.offer_id)))
    insert = _INSERT[connection.dialect.name]
    connection.execute(insert, [{**_identity(new), **_content(new), **leased} for new in in_order])
    stored = set(open_attempts(connection, [new.id for new in jobs], token))
    leases = {}
    batch = StatementBatch(connection)
    for new in jobs:
        if new.id in stored:
            email_index.add(batch, new.id, new.email_hashes[1:])
            leases[new.id] = _first_lease(new, token, leased_at)
    batch.flush()
    return leases


def accept(
    connection: Connection,
    encryption: Encryption,
    new: NewJob,
    token: UUID,
    lease_seconds: float,
    queue_for: float | None = None,
) -> Lease | None:
    """Stores the job and returns the lease on its confirmation; None if there is nothing to do now.

    The same job again is harmless. Raises JobRejected ``conflicting-job`` for other content of an offer that has not
    failed. If its personal data was purged, there is nothing to compare with: a job for a failed confirmation is then
    taken as new content, and a job for a booked offer as the same.

    token: the fencing token of the lease, the same if this is repeated. lease_seconds: how long the lease runs.
    queue_for: if XONE can't be called now, the seconds until the job is due; it is then queued and not leased.
    """
    leased_at = time.monotonic()
    job, takes_lease = new.job, queue_for is None
    content = {
        **_content(new),
        "state": State.CONFIRMING if takes_lease else State.QUEUED,
        "lease_token": token if takes_lease else None,
        "wait": lease_seconds if queue_for is None else queue_for,
    }
    offer = {
        "partner": job.partner_id,
        "offer": job.offer_id,
        "spellings": spellings(job.offer_id),
        "uuid": as_uuid(job.offer_id),
    }
    row = connection.execute(_BY_OFFER, offer).one_or_none() if _is_unusual(job.offer_id) else None
    if row is None:
        insert = _INSERT[connection.dialect.name]
        connection.execute(insert, {**_identity(new), **content, "attempts": int(takes_lease)})
        row = connection.execute(_BY_OFFER, offer).one()
    if row.id != new.id:
        if _has_same_content(row, encryption, job, new.body):
            if not takes_lease:
                return None
            return acquire(connection, encryption, [row.id], token, lease_seconds).get(row.id)
        if row.state != State.FAILED:
            raise JobRejected(
                "conflicting-job",
                f"this offer was published before with other content; its confirmation is {row.state}",
            )
        _forget_content(connection, row.id)
        content["sealed_body"] = encryption.encrypt(row.id, "body", new.body)
        row = connection.execute(_REPLACE, {"row_id": row.id, "takes_lease": int(takes_lease), **content}).one()
    batch = StatementBatch(connection)
    email_index.add(batch, row.id, new.email_hashes[1:])
    batch.flush()
    if not takes_lease:
        return None
    open_attempts(connection, [row.id], token)
    return lease_from_row(row, new.body, 0.0, leased_at)


def restore(connection: Connection, encryption: Encryption, lease: Lease, lease_seconds: float) -> None:
    """Stores a confirmation again that the database has lost, such as by a failover to a replica that lagged.

    It is as when it was leased: with the same id, request, idempotency key and fencing token. Does nothing if its offer
    has a confirmation.
    """
    history, emails = lease.history, email_index.of_request(encryption, lease.body)
    values = {
        "id": lease.id,
        "partner_id": lease.partner_id,
        "offer_id": lease.offer_id,
        "offer_uuid": as_uuid(lease.offer_id),
        "order_reference": lease.order_reference,
        "echo": lease.echo,
        "correlation_id": lease.correlation_id,
        "traceparent": lease.traceparent,
        "idempotency_key": lease.idempotency_key,
        "sealed_body": encryption.encrypt(lease.id, "body", lease.body),
        "quote_ids": json.dumps(sorted(lease.quote_ids)),
        "email_hash": emails[0],
        "state": State.CONFIRMING,
        "lease_token": lease.token,
        "wait": lease_seconds,
        "attempts": lease.number,
        "attempts_used": history.attempts_used,
        "read_backs": history.read_backs,
        "crashes": lease.crashes,
        "answer_unknown": history.answer_unknown,
        "error_code": history.code,
        "error_http_status": history.http_status,
        "error_detail": history.detail,
    }
    connection.execute(_INSERT[connection.dialect.name], values)
    if open_attempts(connection, [lease.id], lease.token):
        batch = StatementBatch(connection)
        email_index.add(batch, lease.id, emails[1:])
        batch.flush()


def newest_id(connection: Connection) -> UUID | None:
    """The greatest id of a confirmation; None if there is none. Ids are UUIDs of version 7: they grow with time."""
    newest: UUID | None = connection.execute(select(_columns.id).order_by(_columns.id.desc()).limit(1)).scalar()
    return newest


def try_sample(connection: Connection, encryption: Encryption) -> None:
    """Stores a valid job that nobody has published, to see whether the database takes any. The caller rolls back."""
    job = Job.model_validate({**_SAMPLE, "offer_id": str(uuid4())})
    accept_new_batch(connection, [NewJob.of(job, Delivery(), encryption)], uuid4(), 1.0)


def _is_unusual(offer_id: str) -> bool:
    return canonical_id(offer_id) != offer_id


def _of_unknown_offers(connection: Connection, jobs: Sequence[NewJob]) -> Sequence[NewJob]:
    """Leaves out jobs whose offer an earlier version stored in the usual form of its UUID. No unique index finds it."""
    unusual = [new for new in jobs if _is_unusual(new.job.offer_id)]
    if not unusual:
        return jobs
    written = {offer for new in unusual for offer in spellings(new.job.offer_id)}
    stored = {(row.partner_id, canonical_id(row.offer_id)) for row in connection.execute(_STORED, {"written": written})}
    is_known = {new.id for new in unusual if (new.job.partner_id, canonical_id(new.job.offer_id)) in stored}
    return [new for new in jobs if new.id not in is_known]


def _first_lease(new: NewJob, token: UUID, leased_at: float) -> Lease:
    return Lease(
        id=new.id,
        token=token,
        partner_id=new.job.partner_id,
        offer_id=new.job.offer_id,
        order_reference=new.job.order_reference,
        echo=new.job.metadata,
        correlation_id=new.delivery.correlation_id,
        traceparent=new.delivery.traceparent,
        body=new.body,
        idempotency_key=new.idempotency_key,
        number=1,
        crashes=0,
        history=History(),
        leased_at=leased_at,
    )


def _identity(new: NewJob) -> dict[str, Any]:
    job = new.job
    return {
        "id": new.id,
        "partner_id": job.partner_id,
        "offer_id": job.offer_id,
        "offer_uuid": as_uuid(job.offer_id),
    }


def _content(new: NewJob) -> dict[str, Any]:
    """Values of the columns that a new or a corrected job sets."""
    return {
        "order_reference": new.job.order_reference,
        "echo": new.job.metadata,
        "correlation_id": new.delivery.correlation_id,
        "traceparent": new.delivery.traceparent,
        "job_published_at": new.delivery.published_at,
        "idempotency_key": new.idempotency_key,
        "sealed_body": new.sealed_body,
        "quote_ids": json.dumps(new.job.canonical_quote_ids()),
        "email_hash": new.email_hashes[0],
        "purged_at": None,
        "attempts_used": 0,
        "read_backs": 0,
        "crashes": 0,
        "answer_unknown": False,
        "error_code": None,
        "error_http_status": None,
        "error_detail": None,
    }


def _forget_content(connection: Connection, confirmation_id: UUID) -> None:
    """Deletes what belongs to replaced content: its further e-mails, and XONE's answers to it."""
    connection.execute(delete(FurtherEmail).where(FurtherEmail.confirmation_id == confirmation_id))
    connection.execute(update(Attempt).where(Attempt.confirmation_id == confirmation_id).values(sealed_answer=None))


def _has_same_content(row: Row[Any], encryption: Encryption, job: Job, body: bytes) -> bool:
    """Whether a job has the content of the stored one, whatever the order of keys."""
    if row.sealed_body is None:  # its personal data was purged
        return bool(row.state != State.FAILED)
    stored = encryption.decrypt(row.id, "body", row.sealed_body)
    same_body = has_same_content(stored, body)
    if not same_body and row.quote_ids is None:  # stored by a version that rounded numbers
        same_body = has_same_content(stored, as_rounded_before(body))
    return same_body and (row.order_reference, row.echo) == (job.order_reference, job.metadata)


_SAMPLE = {
    "partner_id": "confirm-offer.sample",
    "quotes": [{"id": "quote"}],
    "policyholder": {"first_name": "A", "last_name": "B", "country": "GB", "email": "a@example.com"},
}

# Built once: to build a statement costs more than to execute it.
_row, _columns = Confirmation.__table__, Confirmation.__table__.c
_STORED = select(_columns.partner_id, _columns.offer_id).where(_columns.offer_id.in_(bindparam("written")))
_is_written_so = _columns.offer_id == bindparam("offer")
_has_uuid = _columns.offer_uuid == bindparam("uuid", type_=_columns.offer_uuid.type)
_BY_OFFER = locked(  # there are two only if an earlier version stored both forms of one UUID
    select(_row)
    .where(
        _columns.partner_id == bindparam("partner"),
        or_(_columns.offer_id.in_(bindparam("spellings")), _has_uuid),
    )
    .order_by(case((_is_written_so, 0), (_has_uuid, 1), else_=2))
    .limit(1)
)
_TIMES = {"due_at": now_plus(bindparam("wait")), "dispatched_until": None, "queued_at": now(), "updated_at": now()}
_INSERT = {dialect: insert_if_absent(dialect, _row).values(created_at=now(), **_TIMES) for dialect in DIALECTS}
_REPLACE = (
    update(_row)
    .where(_columns.id == bindparam("row_id"))
    .values(attempts=_columns.attempts + bindparam("takes_lease"), **_TIMES)
    .returning(_row)
)
