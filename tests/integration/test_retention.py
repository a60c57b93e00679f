"""Rekey, purge, erase, and the search for a person, on both databases."""

import json
import time
from datetime import UTC, datetime, timedelta
from threading import Thread
from typing import Any
from uuid import UUID

import pytest
from cryptography.fernet import Fernet
from sqlalchemy import Engine, delete, select, update

from models import booking as xone
from models.states import State
from models.tables import (
    Attempt,
    Base,
    BatchItem,
    Booking,
    Confirmation,
    FurtherEmail,
    OutboxEvent,
    Policyholder,
    RateLimit,
)
from tasks import confirm, email_index
from tasks.accept import Delivery
from tasks.decide import RetryPolicy, decide
from tasks.lease import Lease
from tasks.operations import batches, failures, pauses
from tasks.operations.failures import Selection
from tasks.privacy import purge, rekey
from tasks.privacy.rekey import Rekeyed
from tasks.privacy.sealed_columns import SEALED
from tasks.record import RecordedAttempt, record
from tests.support.confirming import accepted, body_of, only, rows, run
from tests.support.query_plans import fill, plan_of
from tests.support.system import until
from worker.errors import DecryptionError, Unknown
from worker.runtime import Runtime
from worker.sandbox.server import Sandbox
from worker.services.retention import INITIAL_BACKOFF, Retention
from worker.settings import EncryptionSettings, read
from worker.storage.database import locked, now, now_plus
from worker.storage.encryption import Encryption
from worker.storage.pause_cache import ALL, PauseCache
from worker.storage.rate_limiter import MAX_WAIT
from worker.xone.answers import BookingReceived

ADA, GRACE, OTHER = "ada@example.com", "grace@example.com", "someone@else.example"
TO_COME = datetime.now(UTC) + timedelta(days=1)
INSURED = [{"id": "q", "insured": [{"first_name": "Grace", "email": GRACE}, {"email": ADA.upper()}]}]


@pytest.fixture
def new_encryption(runtime: Runtime) -> Encryption:
    """An encryption with a new key before the keys of the process."""
    return Encryption([Fernet.generate_key().decode(), *read(EncryptionSettings).keys])


def run_rekey(runtime: Runtime, encryption: Encryption, step: int = 2) -> Rekeyed:
    return sum(rekey.rekey(runtime.engine, encryption, step), Rekeyed())


def found(runtime: Runtime, encryption: Encryption, email: str) -> set[str]:
    with runtime.engine.connect() as connection:
        return {row.offer_id for row in purge.of_person(connection, encryption, email)}


def publish_events(runtime: Runtime) -> None:
    with runtime.engine.begin() as connection:
        connection.execute(update(OutboxEvent).values(published_at=now()))


def run_purge(runtime: Runtime, before: datetime = TO_COME) -> int:
    with runtime.engine.begin() as connection:
        return purge.purge(connection, before)


def encrypted_values(runtime: Runtime) -> list[bytes]:
    """All encrypted values in the database."""
    with runtime.engine.connect() as connection:
        return [
            bytes(value)
            for columns in SEALED.values()
            for column in columns
            for value in connection.execute(select(column).where(column.is_not(None))).scalars()
        ]


def business_data(runtime: Runtime) -> list[Any]:
    """All columns that are not personal, of all rows."""
    personal = {"email_hash", "purged_at"}
    with runtime.engine.connect() as connection:
        return [
            row
            for table in Base.metadata.sorted_tables
            if table.name != "further_emails"
            for row in connection.execute(
                select(*(c for c in table.c if c.name not in personal and not c.name.startswith("sealed_"))).order_by(
                    *table.primary_key
                )
            )
        ]


def decrypt_all(runtime: Runtime, encryption: Encryption, confirmation_id: UUID) -> None:
    for column in ("security_token", "coi_url", "coi_pdf", "account_url", "fnol_link", "sign_up_url", "rest"):
        encryption.decrypt(confirmation_id, column, only(runtime, Booking)._mapping[f"sealed_{column}"])
    encryption.decrypt(confirmation_id, "person", only(runtime, Policyholder).sealed_person)
    encryption.decrypt(confirmation_id, "body", only(runtime, Confirmation).sealed_body)
    encryption.decrypt(confirmation_id, "answer 1", rows(runtime, Attempt)[0].sealed_answer)


def record_booking(runtime: Runtime, lease: Lease, email: str | None) -> None:
    """Records a booking with this e-mail address of the policyholder."""
    ids = {"id": f"INS-{lease.offer_id}", "offer_id": lease.offer_id}
    answer = {**ids, "status": "CONFIRMED", "policyholder": {"email": email}}
    decision = decide(BookingReceived(xone.Booking.model_validate(answer), 201), lease.history, RetryPolicy(), 0.0)
    with runtime.engine.begin() as connection:
        record(connection, runtime.encryption, [RecordedAttempt(lease, decision, 0.1)], False)


def record_error(runtime: Runtime, lease: Lease) -> None:
    decision = decide(Unknown("http-500", "no", 500, answer=b"Ada"), lease.history, RetryPolicy(), 0.0)
    with runtime.engine.begin() as connection:
        record(connection, runtime.encryption, [RecordedAttempt(lease, decision, 0.1)], False)


def pause_calls(runtime: Runtime) -> None:
    with runtime.engine.begin() as connection:
        pauses.pause(connection, ALL, "a test", "tester@here")
    runtime.pauses = PauseCache()  # reads the pauses again


# --- Search for a person ---


def test_a_person_is_found_by_the_emails_of_job_or_booking(runtime: Runtime) -> None:
    record_booking(runtime, accepted(runtime, "a", quotes=INSURED), OTHER)
    record_booking(runtime, accepted(runtime, "b"), "ADA@example.com ")
    record_booking(runtime, accepted(runtime, "c"), None)

    assert found(runtime, runtime.encryption, " Ada@Example.com") == {"a", "b", "c"}
    assert found(runtime, runtime.encryption, GRACE) == {"a"}
    assert found(runtime, runtime.encryption, OTHER) == {"a"}
    assert found(runtime, runtime.encryption, "nobody@example.com") == set()
    assert len(rows(runtime, FurtherEmail)) == 2, "an e-mail that all persons share needs no row"


def test_a_corrected_job_is_found_by_its_new_emails_only(runtime: Runtime) -> None:
    run(runtime, "a~http-422~1", quotes=INSURED)
    assert rows(runtime, Attempt)[0].sealed_answer is not None

    accepted(runtime, "a~http-422~1", quotes=[{"id": "q", "insured": [{"email": OTHER}]}])

    assert found(runtime, runtime.encryption, OTHER) == found(runtime, runtime.encryption, ADA) == {"a~http-422~1"}
    assert found(runtime, runtime.encryption, GRACE) == set()
    assert rows(runtime, Attempt)[0].sealed_answer is None, "it was the answer to the earlier job"


def test_a_waiting_job_is_found(runtime: Runtime) -> None:
    pause_calls(runtime)

    assert confirm.accept_job(body_of("a", quotes=INSURED), Delivery(), runtime) is None

    assert found(runtime, runtime.encryption, ADA) == found(runtime, runtime.encryption, GRACE) == {"a"}


# --- Rekey ---


def test_all_encrypted_values_decrypt_with_the_new_key_alone(runtime: Runtime, new_encryption: Encryption) -> None:
    run(runtime, "a~html~1")
    resume(runtime)
    accepted(runtime, "b")
    accepted(runtime, "c")
    before, facts = len(encrypted_values(runtime)), business_data(runtime)

    done = run_rekey(runtime, new_encryption)

    assert (done.confirmations, done.values, done.resealed, done.indexed) == (3, before, before, 3)
    assert done.unreadable == []
    assert all(new_encryption.is_current(value) for value in encrypted_values(runtime))
    assert business_data(runtime) == facts
    again = run_rekey(runtime, new_encryption)
    assert (again.values, again.resealed, again.indexed) == (before, 0, 0)


def resume(runtime: Runtime) -> None:
    with runtime.engine.begin() as connection:
        due = connection.execute(update(Confirmation).values(due_at=now_plus(-1.0)).returning(Confirmation.id))
        confirmation_id = due.scalar_one()
    lease = confirm.lease_due(confirmation_id, runtime)
    assert lease is not None
    confirm.attempt(lease, runtime)


def test_each_value_stays_bound_to_its_place(runtime: Runtime, new_encryption: Encryption) -> None:
    run(runtime, "a~html~1")
    resume(runtime)
    run_rekey(runtime, new_encryption)

    decrypt_all(runtime, new_encryption, only(runtime, Confirmation).id)


def test_persons_are_found_during_and_after_a_rekey(runtime: Runtime, new_encryption: Encryption) -> None:
    record_booking(runtime, accepted(runtime, "a", quotes=INSURED), OTHER)
    runtime.encryption, old = new_encryption, runtime.encryption
    record_booking(runtime, accepted(runtime, "b"), ADA)

    assert found(runtime, new_encryption, ADA) == {"a", "b"}
    assert found(runtime, old, ADA) == {"a"}
    run_rekey(runtime, new_encryption)

    for email in (ADA, GRACE, OTHER):
        assert "a" in found(runtime, new_encryption, email)
        assert found(runtime, old, email) == set()


def test_persons_stored_by_an_earlier_version_are_found_after_a_rekey(runtime: Runtime) -> None:
    record_booking(runtime, accepted(runtime, "a", quotes=INSURED), OTHER)
    with runtime.engine.begin() as connection:
        connection.execute(update(Confirmation).values(email_hash=None))
        connection.execute(delete(FurtherEmail))
        assert email_index.count_unsearched(connection) == 1

    done = run_rekey(runtime, runtime.encryption)

    assert (done.resealed, done.indexed) == (0, 1)
    assert {email for email in (ADA, GRACE, OTHER) if found(runtime, runtime.encryption, email)} == {ADA, GRACE, OTHER}
    with runtime.engine.connect() as connection:
        assert email_index.count_unsearched(connection) == 0


def test_a_value_that_no_key_decrypts_is_named_and_never_overwritten(
    runtime: Runtime, new_encryption: Encryption
) -> None:
    run(runtime, "a")
    run(runtime, "b")
    with runtime.engine.begin() as connection:
        lost = connection.execute(select(Confirmation.id).where(Confirmation.offer_id == "b")).scalar_one()
        foreign = Encryption([Fernet.generate_key().decode()]).encrypt(lost, "body", b"{}")
        connection.execute(update(Confirmation).where(Confirmation.id == lost).values(sealed_body=foreign))

    done = run_rekey(runtime, new_encryption)

    assert done.unreadable == [(lost, "body")]
    assert [value for value in encrypted_values(runtime) if not new_encryption.is_current(value)] == [foreign]


def test_keys_that_decrypt_nothing_change_nothing(runtime: Runtime) -> None:
    run(runtime, "a")
    before = encrypted_values(runtime)
    wrong = Encryption([Fernet.generate_key().decode()])

    done = run_rekey(runtime, wrong)

    assert (done.resealed, len(done.unreadable), encrypted_values(runtime)) == (0, len(before), before)
    runtime.encryption = wrong
    with pytest.raises(DecryptionError, match="no key of DATA_KEYS"):
        confirm.accept_job(body_of("a"), Delivery(), runtime)
    assert encrypted_values(runtime) == before


def test_an_interrupted_rekey_continues(runtime: Runtime, new_encryption: Encryption) -> None:
    for number in range(5):
        run(runtime, f"offer-{number}")
    first = next(iter(rekey.rekey(runtime.engine, new_encryption, 2)))

    again = run_rekey(runtime, new_encryption)

    assert (first.confirmations, again.confirmations) == (2, 5)
    assert first.resealed + again.resealed == again.values


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_a_leased_confirmation_is_rekeyed_last_and_keeps_its_new_values(
    runtime: Runtime, new_encryption: Encryption
) -> None:
    """Not on SQLite, which allows one writer at a time."""
    lease = accepted(runtime, "a")
    run(runtime, "b")
    done: list[Rekeyed] = []
    changed = json.loads(body_of("changed"))

    def run_in_background() -> None:
        done.extend(rekey.rekey(runtime.engine, new_encryption, 10))

    with runtime.engine.begin() as connection:
        connection.execute(locked(select(Confirmation.id).where(Confirmation.id == lease.id)))
        program = Thread(target=run_in_background)
        program.start()
        until(lambda: done)
        assert [step.confirmations for step in done] == [1]
        answer = runtime.encryption.encrypt(lease.id, "body", json.dumps(changed).encode())
        connection.execute(update(Confirmation).where(Confirmation.id == lease.id).values(sealed_body=answer))
    program.join(30)

    assert [step.confirmations for step in done] == [1, 1]
    stored = next(row for row in rows(runtime, Confirmation) if row.id == lease.id).sealed_body
    assert new_encryption.is_current(stored)
    assert json.loads(new_encryption.decrypt(lease.id, "body", stored)) == changed


# --- Purge ---


def test_a_purge_removes_personal_data_and_keeps_the_rest(runtime: Runtime) -> None:
    run(runtime, "a", quotes=INSURED)
    run(runtime, "b~http-422")
    publish_events(runtime)
    facts = business_data(runtime)
    assert encrypted_values(runtime)

    assert run_purge(runtime) == 2

    assert encrypted_values(runtime) == []
    assert rows(runtime, FurtherEmail) == []
    assert business_data(runtime) == facts
    assert {row.email_hash for row in rows(runtime, Confirmation)} == {None}
    assert all(row.purged_at is not None for row in rows(runtime, Confirmation))
    assert found(runtime, runtime.encryption, ADA) == set()
    assert run_purge(runtime) == 0
    assert run_rekey(runtime, runtime.encryption).values == 0


def test_only_confirmations_that_ended_before_and_are_published_are_purged(runtime: Runtime, sandbox: Sandbox) -> None:
    run(runtime, "confirmed")
    run(runtime, "pending~pending")
    run(runtime, "failed~http-422")
    run(runtime, "retrying~http-500")
    accepted(runtime, "confirming")
    run(runtime, "review~drop-after")
    with runtime.engine.begin() as connection:
        review = update(Confirmation).where(Confirmation.offer_id == "review~drop-after")
        connection.execute(review.values(state=State.NEEDS_REVIEW, due_at=None))
    assert run_purge(runtime) == 0, "no event is published yet"
    publish_events(runtime)
    assert run_purge(runtime, datetime.now(UTC) - timedelta(hours=1)) == 0, "they ended just now"

    assert run_purge(runtime) == 3

    left = {row.offer_id for row in rows(runtime, Confirmation) if row.purged_at is None}
    assert left == {"retrying~http-500", "confirming", "review~drop-after"}
    assert all(row.sealed_body for row in rows(runtime, Confirmation) if row.offer_id in left)


def test_links_are_removed_from_stored_events(runtime: Runtime, sandbox: Sandbox) -> None:
    runtime.event_links = True
    run(runtime, "a")
    publish_events(runtime)
    before = json.loads(only(runtime, OutboxEvent).payload)

    run_purge(runtime)

    after = json.loads(only(runtime, OutboxEvent).payload)
    removed_links = {
        name: before["data"]["booking"].pop(name) for name in ("coi", "account_url", "fnol_link", "sign_up_url")
    }
    assert all(removed_links.values())
    assert after == before


def test_steps_are_bounded_and_begin_with_the_earliest_end(runtime: Runtime) -> None:
    for number in range(3):
        run(runtime, f"offer-{number}")
    publish_events(runtime)
    with runtime.engine.begin() as connection:
        first = update(Confirmation).where(Confirmation.offer_id == "offer-2")
        connection.execute(first.values(updated_at=now_plus(-100.0)))
        assert purge.purge(connection, TO_COME, 1) == 1

    assert [row.offer_id for row in rows(runtime, Confirmation) if row.purged_at] == ["offer-2"]


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_a_locked_confirmation_is_skipped(runtime: Runtime) -> None:
    run(runtime, "a")
    run(runtime, "b")
    publish_events(runtime)
    with runtime.engine.begin() as connection:
        connection.execute(locked(select(Confirmation.id).where(Confirmation.offer_id == "a")))
        assert run_purge(runtime) == 1

    assert run_purge(runtime) == 1


def test_a_repeat_of_a_purged_booking_is_ignored(runtime: Runtime, sandbox: Sandbox) -> None:
    run(runtime, "a")
    publish_events(runtime)
    run_purge(runtime)
    facts = business_data(runtime)

    assert confirm.accept_job(body_of("a"), Delivery(), runtime) is None
    assert confirm.accept_job(body_of("a", quotes=INSURED), Delivery(), runtime) is None, (
        "there is no content to compare with"
    )

    assert (business_data(runtime), encrypted_values(runtime), len(sandbox.calls)) == (facts, [], 1)


@pytest.mark.parametrize("changes", [{}, {"quotes": [{"id": "corrected"}]}])
def test_a_job_for_a_purged_failure_is_new_content(runtime: Runtime, sandbox: Sandbox, changes: dict[str, Any]) -> None:
    run(runtime, "a~http-422~1")
    publish_events(runtime)
    run_purge(runtime)
    before = only(runtime, Confirmation)

    run(runtime, "a~http-422~1", **changes)

    after = only(runtime, Confirmation)
    assert (after.state, after.purged_at, after.sequence) == (State.CONFIRMED, None, 2)
    assert after.idempotency_key != before.idempotency_key
    assert found(runtime, runtime.encryption, ADA) == {"a~http-422~1"}
    assert [call.idempotency_key for call in sandbox.calls] == [
        str(before.idempotency_key), str(after.idempotency_key),
    ]  # fmt: skip


def test_a_job_for_a_purged_failure_is_queued_while_calls_are_paused(runtime: Runtime) -> None:
    run(runtime, "a~http-422~1")
    publish_events(runtime)
    run_purge(runtime)
    pause_calls(runtime)

    assert confirm.accept_job(body_of("a~http-422~1"), Delivery(), runtime) is None

    row = only(runtime, Confirmation)
    assert (row.state, row.purged_at, row.sealed_body is not None) == (State.QUEUED, None, True)


def test_reprocess_leaves_out_purged_confirmations(runtime: Runtime) -> None:
    run(runtime, "a~http-422")
    run(runtime, "b~http-422")
    publish_events(runtime)
    ids = [row.id for row in rows(runtime, Confirmation)]
    with runtime.engine.begin() as connection:
        batch = batches.create(connection, ids, Selection(), None, "tester@here", None)
        first = connection.execute(select(Confirmation.id).where(Confirmation.offer_id == "a~http-422")).scalar_one()
        purge.blank(connection, [first])

    with runtime.engine.begin() as connection:
        chosen = Selection(purged=False)
        assert [row.offer_id for row in failures.match(connection, chosen).confirmations] == ["b~http-422"]
        assert failures.purged(connection, chosen) == 1
        (left,) = failures.match(connection, Selection(purged=False, offers=((None, "a~http-422"),))).left_out
        assert (left.partner_id, left.offer_id, left.state) == (None, "a~http-422", State.FAILED)
        assert left.purged_at is not None
        assert len(batches.feed(connection, batch, 10, (), 60.0)) == 1
    outcomes = {item.confirmation_id: item.outcome for item in rows(runtime, BatchItem)}
    assert outcomes[first] == batches.SKIPPED


def test_a_late_booking_is_stored_and_purged_later(runtime: Runtime) -> None:
    run(runtime, "a~http-422")
    publish_events(runtime)
    run_purge(runtime)
    lease = late_lease(runtime)

    record_booking(runtime, lease, OTHER)

    assert (only(runtime, Confirmation).state, only(runtime, Confirmation).purged_at) == (State.CONFIRMED, None)
    assert found(runtime, runtime.encryption, OTHER) == {"a~http-422"}
    run_rekey(runtime, runtime.encryption)
    assert found(runtime, runtime.encryption, OTHER) == {"a~http-422"}
    publish_events(runtime)
    assert run_purge(runtime) == 1
    assert encrypted_values(runtime) == []
    assert found(runtime, runtime.encryption, OTHER) == set()


def test_a_late_answer_restores_no_personal_data(runtime: Runtime) -> None:
    run(runtime, "a~http-422")
    publish_events(runtime)
    run_purge(runtime)

    record_error(runtime, late_lease(runtime))

    assert encrypted_values(runtime) == []


def late_lease(runtime: Runtime) -> Lease:
    """The lease of a worker on a confirmation that was purged meanwhile."""
    lease = accepted(runtime, "late-offer")
    row = next(row for row in rows(runtime, Confirmation) if row.offer_id == "a~http-422")
    with runtime.engine.begin() as connection:
        connection.execute(delete(Attempt).where(Attempt.confirmation_id == lease.id))
        connection.execute(delete(Confirmation).where(Confirmation.id == lease.id))
    lease.id, lease.offer_id = row.id, row.offer_id
    return lease


def test_erasing_one_person_keeps_the_data_of_another(runtime: Runtime) -> None:
    run(runtime, "a~http-422~1")
    publish_events(runtime)
    with runtime.engine.connect() as connection:
        (row,) = purge.of_person(connection, runtime.encryption, ADA)
    other = {"first_name": "B", "last_name": "C", "country": "GB", "email": OTHER}
    run(runtime, "a~http-422~1", policyholder=other)
    publish_events(runtime)

    with runtime.engine.begin() as connection:
        assert not purge.erase(connection, runtime.encryption, ADA, row.id)
        assert purge.erase(connection, runtime.encryption, OTHER, row.id)


def test_retention_purges_one_step_at_a_time_across_workers(
    runtime: Runtime,
) -> None:
    run(runtime, "a")
    publish_events(runtime)
    with runtime.engine.begin() as connection:
        connection.execute(update(Confirmation).values(updated_at=now_plus(-2 * 86400.0)))

    assert Retention(runtime, 3.0).run_once() is False, "it is not three days old"
    assert only(runtime, Confirmation).purged_at is None
    with runtime.engine.begin() as connection:
        connection.execute(update(RateLimit).values(next_at=now_plus(MAX_WAIT + 1.5)))  # more: a clock set back
    assert Retention(runtime, 1.0).run_once() is False, "the next slots belong to other workers"
    assert only(runtime, Confirmation).purged_at is None
    with runtime.engine.begin() as connection:
        connection.execute(update(RateLimit).values(next_at=now()))
    assert Retention(runtime, 1.0).run_once() is True
    assert only(runtime, Confirmation).purged_at is not None


def test_one_that_can_not_be_encrypted_again_stops_no_other(runtime: Runtime, new_encryption: Encryption) -> None:
    """Its policyholder is no object."""
    for name in "abcde":
        run(runtime, name)
    broken = sorted(row.id for row in rows(runtime, Confirmation))[2]
    sealed = runtime.encryption.encrypt(broken, "person", b"[]")
    with runtime.engine.begin() as connection:
        theirs = Policyholder.confirmation_id == broken
        connection.execute(update(Policyholder).where(theirs).values(sealed_person=sealed))

    done = run_rekey(runtime, new_encryption, step=5)

    assert done.confirmations == 5
    assert done.unreadable == [(broken, "AttributeError")]
    current = {row.id for row in rows(runtime, Confirmation) if new_encryption.is_current(row.sealed_body)}
    assert current == {row.id for row in rows(runtime, Confirmation)} - {broken}


def test_one_that_can_not_be_purged_stops_no_other(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "abcde":
        run(runtime, name)
    publish_events(runtime)
    broken = sorted(row.id for row in rows(runtime, Confirmation))[2]
    with runtime.engine.begin() as connection:
        connection.execute(update(Confirmation).values(updated_at=now_plus(-2 * 86400.0)))
        connection.execute(update(OutboxEvent).where(OutboxEvent.confirmation_id == broken).values(payload="broken"))
    reported: list[str] = []
    monkeypatch.setattr(
        "worker.services.retention.report", lambda _error, **facts: reported.append(facts["confirmation"])
    )
    retention = Retention(runtime, 1.0)

    for _ in range(3):
        with runtime.engine.begin() as connection:
            connection.execute(update(RateLimit).values(next_at=now()))
        retention.run_once()

    assert {row.id for row in rows(runtime, Confirmation) if row.purged_at is None} == {broken}
    assert reported == [str(broken)], "once"

    with runtime.engine.begin() as connection:
        mended = '{"data": {"booking": {}}}'
        connection.execute(update(OutboxEvent).where(OutboxEvent.confirmation_id == broken).values(payload=mended))
    monkeypatch.setattr(retention._failing, "_clock", lambda: time.monotonic() + INITIAL_BACKOFF)
    with runtime.engine.begin() as connection:
        connection.execute(update(RateLimit).values(next_at=now()))

    assert retention.run_once(), "it was mended, and is tried again"


def test_confirmations_to_purge_are_found_by_an_index(engine: Engine) -> None:
    fill(engine)
    plan = plan_of(engine, purge.past_query(datetime(2020, 1, 1, tzinfo=UTC)))

    assert "ix_confirmations_to_purge" in plan


def test_rekey_has_a_limit_for_the_answers_that_it_holds_at_once(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(4):
        run(runtime, f"offer-{number}~many-policies")
    size = len(rows(runtime, Attempt)[0].sealed_answer)
    monkeypatch.setattr(rekey, "MAX_STEP_BYTES", 3 * size - 1)

    steps = list(rekey.rekey(runtime.engine, runtime.encryption))

    assert [step.confirmations for step in steps] == [2, 2]
