"""Accepting a job: its confirmation stands in the database, claimed, or the job is rejected."""

import json
import time
from dataclasses import dataclass
from typing import Any
from uuid import UUID, uuid4

from sqlalchemy import Connection, Row, bindparam, delete, select, update
from uuid_utils.compat import uuid7

from models.job import Job, JobRejected
from models.states import State
from models.tables import Attempt, Confirmation, FurtherEmail
from tasks import emails
from tasks.claim import Claim, claim, claim_of, open_attempt
from worker.database import DIALECTS, insert_if_absent, locked, now, now_plus
from worker.vault import Vault


@dataclass(frozen=True)
class Delivery:
    """What came with the job's message and goes with its events."""

    correlation_id: str | None = None
    traceparent: str | None = None


def accept(
    connection: Connection,
    vault: Vault,
    job: Job,
    delivery: Delivery,
    token: UUID,
    lease: float,
    queue_for: float | None = None,
) -> Claim | None:
    """Stores the job and claims its confirmation; None where there is nothing to do now for this message.

    The same job again is harmless. Raises JobRejected ``conflicting-job`` for other content of an offer that has not
    failed. Where personal data was purged there is nothing to compare with: a job for a confirmation that has failed
    is then taken as new content, one for a booked offer as the same.

    token: the fencing token to claim with, the same when this is repeated; lease: seconds; queue_for: where XONE can't
    be called now, the seconds in which the job is queued and not claimed.
    """
    leased_at = time.monotonic()
    confirmation_id = uuid7()
    body = job.request_body()
    hashes = emails.of_request(vault, body)
    claims = queue_for is None
    content = {
        **_content(job, delivery, vault, confirmation_id, body, hashes[0]),
        "state": State.CONFIRMING if claims else State.QUEUED,
        "lease_token": token if claims else None,
        "wait": lease if queue_for is None else queue_for,
    }
    row = connection.execute(
        _INSERT[connection.dialect.name],
        {
            "id": confirmation_id,
            "partner_id": job.partner_id,
            "offer_id": job.offer_id,
            "attempts": int(claims),
            **content,
        },
    ).one_or_none()
    if row is None:
        standing = connection.execute(_STANDING, {"partner": job.partner_id, "offer": job.offer_id}).one()
        if _same(standing, vault, job, body):
            return claim(connection, vault, standing.id, token, lease) if claims else None
        if standing.state != State.FAILED:
            raise JobRejected(
                "conflicting-job",
                f"this offer was published before with other content; its confirmation is {standing.state}",
            )
        _forget_content(connection, standing.id)
        content["sealed_body"] = vault.seal(standing.id, "body", body)
        row = connection.execute(_REPLACE, {"this": standing.id, "claims": int(claims), **content}).one()
    emails.note(connection, row.id, hashes[1:])
    if not claims:
        return None
    open_attempt(connection, row)
    return claim_of(row, body, 0.0, leased_at)


def _content(
    job: Job, delivery: Delivery, vault: Vault, confirmation_id: UUID, body: bytes, email_hash: bytes
) -> dict[str, Any]:
    """The columns that a new or a corrected job sets."""
    return {
        "order_reference": job.order_reference,
        "echo": job.metadata,
        "correlation_id": delivery.correlation_id,
        "traceparent": delivery.traceparent,
        "idempotency_key": uuid4(),
        "sealed_body": vault.seal(confirmation_id, "body", body),
        "email_hash": email_hash,
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
    """What is left of replaced content: answers to it, which no e-mail of the new content would find."""
    connection.execute(delete(FurtherEmail).where(FurtherEmail.confirmation_id == confirmation_id))
    connection.execute(update(Attempt).where(Attempt.confirmation_id == confirmation_id).values(sealed_answer=None))


def _same(standing: Row[Any], vault: Vault, job: Job, body: bytes) -> bool:
    """Whether the job says what the standing one said, whatever the order of its keys."""
    if standing.sealed_body is None:  # its personal data was purged
        return bool(standing.state != State.FAILED)
    stored = vault.open(standing.id, "body", standing.sealed_body)
    same_body = stored == body or json.loads(stored) == json.loads(body)
    return same_body and (standing.order_reference, standing.echo) == (job.order_reference, job.metadata)


# Built once: to build a statement costs more than to execute it.
_row, _columns = Confirmation.__table__, Confirmation.__table__.c
_STANDING = locked(
    select(_row).where(_columns.partner_id == bindparam("partner"), _columns.offer_id == bindparam("offer"))
)
_TIMES = {"due_at": now_plus(bindparam("wait")), "dispatched_until": None, "queued_at": now(), "updated_at": now()}
_INSERT = {
    dialect: insert_if_absent(dialect, _row, "partner_id", "offer_id")
    .values(created_at=now(), **_TIMES)
    .returning(_row)
    for dialect in DIALECTS
}
_REPLACE = (
    update(_row)
    .where(_columns.id == bindparam("this"))
    .values(attempts=_columns.attempts + bindparam("claims"), **_TIMES)
    .returning(_row)
)
