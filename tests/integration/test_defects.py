"""A defect at any step, with personal data in its frames: neither Sentry nor the log gets any of it."""

import io
import json
from typing import Any
from uuid import uuid4

import pytest
from cryptography.fernet import Fernet
from sqlalchemy import select, update

from models.booking import Booking
from models.job import JobRejected, read_job
from models.tables import Confirmation
from tasks import celery_tasks, confirm
from tasks.accept import Delivery
from tests.support.sentry import Capturing
from tests.support.system import job
from worker import errors
from worker.messaging import broker, topology
from worker.observability import logs
from worker.runtime import Runtime
from worker.services.outbox_relay import OutboxRelay
from worker.settings import LogSettings
from worker.storage.database import now_plus, seconds_since
from worker.storage.encryption import Encryption

MARK = "Quxomat"
MARKED = {
    "policyholder": {"first_name": MARK, "last_name": MARK, "country": "GB", "email": f"{MARK}@mail.example"},
    "quotes": [{"id": "quote-1", "insured": [{"first_name": MARK}]}],
}
STEPS = {
    "validation": "tasks.confirm.read_job",
    "accept": "tasks.confirm.accept_new_batch",
    "token": "worker.xone.client.Xone._request_token",
    "call": "worker.xone.transport.Transport.open",
    "parse": "worker.xone.client.read_confirm_answer",
    "decide": "tasks.confirm.decide",
    "record": "tasks.record.store_booking",
    "relay": "worker.services.outbox_relay.message_of",
}


def fail(*arguments: Any, **named: Any) -> Any:
    """Raises an error with the arguments in its frame, its text and its cause."""
    local = {"job": MARKED, "arguments": arguments, "named": named}
    try:
        raise KeyError(MARK)
    except KeyError as cause:
        raise RuntimeError(f"insert {MARK}", {"email": MARK}, ValueError(f"{MARK}: {local}")) from cause


def run_task(body: bytes) -> None:
    """Runs the Celery task on a message of the jobs queue."""
    celery_tasks.confirm_offer.push_request(deliveries=0, correlation_id=None, traceparent=None, properties={})
    try:
        celery_tasks.confirm_offer.run(body)
    finally:
        celery_tasks.confirm_offer.pop_request()


@pytest.fixture
def log(logging_restored: None) -> io.StringIO:
    stream = io.StringIO()
    logs.configure(LogSettings(LOG_FORMAT="json", LOG_LEVEL="DEBUG"), stream)
    return stream


@pytest.mark.parametrize("step", STEPS)
def test_a_report_of_a_defect_has_no_personal_data(
    step: str, runtime: Runtime, sentry: Capturing, log: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.runtime._current", runtime)
    with broker.connect("memory://") as connection:
        topology.declare(connection)
    monkeypatch.setattr(STEPS[step], fail)

    run_task(json.dumps(job(f"offer-{uuid4()}", **MARKED)).encode())
    if step == "relay":
        OutboxRelay(runtime)._run_guarded()

    assert len(sentry.sent) == 1
    assert MARK not in sentry.sent[0].decode()
    assert "RuntimeError" in sentry.sent[0].decode()
    assert '"defect"' in log.getvalue()
    assert MARK not in log.getvalue()


def test_a_confirmation_that_no_key_decrypts_is_postponed(
    runtime: Runtime, sentry: Capturing, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise it would stay the oldest due confirmation for ever, before all others."""
    monkeypatch.setattr("worker.runtime._current", runtime)
    lease = confirm.accept_job(json.dumps(job("offer-1")).encode(), Delivery(), runtime)
    assert lease is not None
    with runtime.engine.begin() as connection:
        connection.execute(update(Confirmation).values(due_at=now_plus(-1.0)))
    runtime.encryption = Encryption([Fernet.generate_key().decode()])

    celery_tasks.resume.run(str(lease.id).encode())

    with runtime.engine.connect() as connection:
        wait = connection.execute(select(-seconds_since(Confirmation.due_at))).scalar_one()
        attempts = connection.execute(select(Confirmation.attempts)).scalar_one()
    assert wait > 200

    with runtime.engine.begin() as connection:  # an hour later
        hour_ago = now_plus(-3600.0)
        connection.execute(update(Confirmation).values(due_at=now_plus(-1.0), updated_at=hour_ago))
    celery_tasks.resume.run(str(lease.id).encode())
    with runtime.engine.connect() as connection:
        assert connection.execute(select(-seconds_since(Confirmation.due_at))).scalar_one() > 3500
    assert len(sentry.sent) == 1, "reported once"
    assert attempts == 1
    assert "DecryptionError" in sentry.sent[0].decode()


def test_repr_and_str_show_no_personal_data(runtime: Runtime) -> None:
    body = json.dumps(job("offer-1", **MARKED)).encode()
    lease = confirm.accept_job(body, Delivery(), runtime)
    booking = Booking.model_validate(
        {"id": "INS-1", "offer_id": "offer-1", "security_token": MARK, "policyholder": MARKED["policyholder"]}
    )
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.XoneError)]
    xone_errors = [kind("code", "detail", 500, body) for kind in kinds if kind is not errors.OrderEnded]  # fixed texts
    with pytest.raises(JobRejected) as rejected:
        read_job(json.dumps({**MARKED, "partner_id": MARK, "offer_id": [MARK], MARK: 1}).encode())

    for value in (
        read_job(body),
        lease,
        booking,
        booking.policyholder,
        rejected.value,
        runtime.encryption,
        *xone_errors,
    ):
        assert MARK not in f"{value!r} {value!s}", type(value)
