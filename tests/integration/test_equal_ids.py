"""Ids and e-mails that are written differently and mean the same, against both databases and XONE's stand-in."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any
from uuid import UUID, uuid4

import pytest
from alembic import command
from sqlalchemy import Engine, insert, select, text, update

from models.booking import Booking as XoneBooking
from models.job import JobRejected, read_job
from models.states import BookingStatuses, State
from models.tables import Attempt, Booking, Confirmation
from tasks import confirm
from tasks.accept import Delivery, NewJob
from tasks.decide import RetryPolicy, decide
from tasks.lease import Lease
from tasks.operations import lookup
from tasks.operations.failures import Selection, match
from tasks.operations.resolve import read_booking, resolve_booked
from tasks.privacy import purge, rekey
from tasks.record import RecordedAttempt
from tests.support.confirming import accepted, body_of, only, rows, run
from worker.errors import ResolveError
from worker.runtime import Runtime
from worker.sandbox.server import Sandbox
from worker.storage import migrator
from worker.storage.database import now, now_plus
from worker.xone.answers import BookingReceived

OFFER = "5c7e1f00-0000-4000-8000-00000000abcd"
CAPITALS = OFFER.upper()
HEX = OFFER.replace("-", "")
OTHER = "0a7e1f00-0000-4000-8000-00000000abcd"
QUOTES: dict[str, Any] = {"quotes": [{"id": "shared"}]}


def states(runtime: Runtime) -> dict[str, str]:
    return {row.offer_id: row.state for row in rows(runtime, Confirmation)}


def resume(runtime: Runtime, offer_id: str) -> None:
    is_meant = Confirmation.offer_id == offer_id
    with runtime.engine.begin() as connection:
        connection.execute(update(Confirmation).where(is_meant).values(due_at=now_plus(-1.0)))
        id_ = connection.execute(select(Confirmation.id).where(is_meant)).scalar_one()
    lease = confirm.lease_due(id_, runtime)
    assert lease is not None
    confirm.attempt(lease, runtime)


# --- Offers ---


def test_an_offer_in_capitals_is_confirmed_though_xone_answers_in_small_letters(runtime: Runtime) -> None:
    run(runtime, CAPITALS)

    assert states(runtime) == {CAPITALS: State.CONFIRMED}
    assert only(runtime, Booking).offer_id == OFFER


def test_an_offer_in_capitals_is_found_in_the_list(runtime: Runtime, sandbox: Sandbox) -> None:
    run(runtime, OFFER, quotes=[{"id": "q"}])
    with runtime.engine.begin() as connection:  # as after a restore: XONE has booked, and we do not know it
        for table in ("outbox", "policies", "policyholders", "bookings", "attempts", "further_emails", "confirmations"):
            connection.execute(text(f"delete from {table}"))
    run(runtime, CAPITALS)

    assert states(runtime) == {CAPITALS: State.CONFIRMED}
    assert len(sandbox.bookings) == 1


@pytest.mark.parametrize("form", [CAPITALS, HEX, HEX.upper()])
def test_one_offer_written_in_two_forms_is_one_confirmation(runtime: Runtime, sandbox: Sandbox, form: str) -> None:
    run(runtime, OFFER)
    quotes = [{"id": f"quote-{OFFER}", "insured": [{"first_name": "Ada"}]}]
    again = body_of(form, order_reference=f"SO-{OFFER}", quotes=quotes)

    assert confirm.accept_job(again, Delivery(), runtime) is None
    assert states(runtime) == {OFFER: State.CONFIRMED}
    assert len(sandbox.calls) == 1
    with pytest.raises(JobRejected, match="conflicting-job"):
        confirm.accept_job(body_of(form, metadata={}), Delivery(), runtime)


def test_both_forms_at_once_are_leased_once(runtime: Runtime) -> None:
    barrier = Barrier(2)

    def accept(offer: str) -> Lease | None:
        barrier.wait(10)
        return confirm.accept_job(body_of(offer, order_reference="SO", **QUOTES), Delivery(), runtime)

    with ThreadPoolExecutor(2) as pool:
        leases = [lease for lease in pool.map(accept, (OFFER, CAPITALS)) if lease]

    assert len(leases) == 1
    assert len(rows(runtime, Confirmation)) == 1


def test_both_forms_in_one_group_are_leased_once(runtime: Runtime) -> None:
    jobs = [NewJob.of(read_job(body_of(offer)), Delivery(), runtime.encryption) for offer in (CAPITALS, OFFER, HEX)]

    assert [bool(lease) for lease in confirm.accept_job_batch(runtime, jobs)].count(True) == 1
    assert len(rows(runtime, Confirmation)) == 1


def test_quotes_written_in_another_form_are_the_same_content(runtime: Runtime) -> None:
    run(runtime, "offer-1", quotes=[{"id": OFFER}])

    assert confirm.accept_job(body_of("offer-1", quotes=[{"id": CAPITALS}]), Delivery(), runtime) is None


def test_a_corrected_job_may_write_the_offer_in_another_form(runtime: Runtime, sandbox: Sandbox) -> None:
    sandbox.status_for_all = 422
    run(runtime, CAPITALS)
    sandbox.status_for_all = None
    run(runtime, OFFER, metadata={"corrected": "yes"})

    assert states(runtime) == {CAPITALS: State.CONFIRMED}


def test_operators_find_an_offer_in_any_form(runtime: Runtime, sandbox: Sandbox) -> None:
    sandbox.status_for_all = 422
    run(runtime, CAPITALS)

    for form in (OFFER, CAPITALS, HEX):
        (found,) = lookup.find(runtime.engine, form, "P-100")
        assert found.details.offer_id == CAPITALS
        with runtime.engine.connect() as connection:
            matched = match(connection, Selection(offers=(("P-100", form),)))
        assert (len(matched.ids), matched.left_out) == (1, [])


# --- Bookings ---


def test_a_shared_quote_does_not_make_anothers_booking_ours(runtime: Runtime, sandbox: Sandbox) -> None:
    """The list names no offers, and XONE booked the first offer only."""
    sandbox.bookings_mode = "nameless"
    run(runtime, "offer-1", **QUOTES)
    run(runtime, "offer-2~drop-before~1", **QUOTES)
    sandbox.status_for_all = 422
    resume(runtime, "offer-2~drop-before~1")

    assert states(runtime) == {"offer-1": State.CONFIRMED, "offer-2~drop-before~1": State.NEEDS_REVIEW}
    assert only(runtime, Booking).id == sandbox.bookings["P-100", "offer-1"]["id"]


@pytest.mark.parametrize("stored_by", ["this version", "an earlier version"])
def test_while_two_offers_with_a_quote_in_common_are_undecided_the_booking_is_nobodys(
    runtime: Runtime, sandbox: Sandbox, stored_by: str
) -> None:
    sandbox.bookings_mode = "nameless"
    run(runtime, "offer-1~drop-after~1", **QUOTES)  # XONE has booked it
    run(runtime, "offer-2~drop-before~1", **QUOTES)  # it has not
    if stored_by == "an earlier version":
        with runtime.engine.begin() as connection:
            connection.execute(update(Confirmation).values(quote_ids=None))
    resume(runtime, "offer-2~drop-before~1")
    assert states(runtime)["offer-2~drop-before~1"] == State.CONFIRMED  # sent again, and booked by itself
    resume(runtime, "offer-1~drop-after~1")

    assert set(states(runtime).values()) == {State.CONFIRMED}
    stored = {row.offer_id: row.id for row in rows(runtime, Booking)}
    assert stored == {offer: booking["id"] for (_, offer), booking in sandbox.bookings.items()}
    assert sandbox.double_bookings == 0


def test_a_quote_of_ones_own_finds_the_booking(runtime: Runtime, sandbox: Sandbox) -> None:
    sandbox.bookings_mode = "nameless"
    run(runtime, "offer-1", quotes=[{"id": "other"}])
    run(runtime, "offer-2~drop-after~1", **QUOTES)
    resume(runtime, "offer-2~drop-after~1")

    assert set(states(runtime).values()) == {State.CONFIRMED}
    assert len(sandbox.calls) == 2


def answered(runtime: Runtime, lease: Lease, booking_id: str) -> RecordedAttempt:
    policy = RetryPolicy.of(runtime.retry_settings, runtime.xone_settings)
    booking = XoneBooking.model_validate({"id": booking_id, "offer_id": lease.offer_id, "status": "CONFIRMED"})
    return RecordedAttempt(lease, decide(BookingReceived(booking, 201), lease.history, policy, 0.0), 0.1)


def test_a_booking_belongs_to_one_confirmation(runtime: Runtime) -> None:
    first, second, third = (accepted(runtime, f"offer-{number}") for number in range(3))
    confirm.record_batch(runtime, [answered(runtime, first, "INS-1")])

    recorded = confirm.record_batch(runtime, [answered(runtime, second, "INS-1"), answered(runtime, third, "INS-3")])

    assert recorded == [State.NEEDS_REVIEW, State.CONFIRMED]
    review = next(row for row in rows(runtime, Confirmation) if row.id == second.id)
    assert (review.error_code, review.answer_unknown) == ("wrong-offer", True)
    assert "offer-0" in review.error_detail
    (attempt,) = (row for row in rows(runtime, Attempt) if row.confirmation_id == second.id)
    assert b"INS-1" in runtime.encryption.decrypt(second.id, f"answer {second.number}", attempt.sealed_answer)


def test_two_confirmations_with_one_booking_at_once_have_it_once(runtime: Runtime) -> None:
    leases = [accepted(runtime, f"offer-{number}") for number in range(4)]
    barrier = Barrier(4)

    def store(lease: Lease) -> State | None:
        barrier.wait(10)
        return confirm.record_batch(runtime, [answered(runtime, lease, "INS-1")])[0]

    with ThreadPoolExecutor(4) as pool:
        recorded = sorted(pool.map(store, leases))  # type: ignore[type-var]

    assert recorded == [State.CONFIRMED, *[State.NEEDS_REVIEW] * 3]


def test_the_same_booking_id_of_another_partner_is_another_booking(runtime: Runtime) -> None:
    for partner in ("P-1", "P-2"):
        lease = accepted(runtime, "offer-1", partner_id=partner)
        assert confirm.record_batch(runtime, [answered(runtime, lease, "INS-1")]) == [State.CONFIRMED]


def test_a_person_can_not_give_a_booking_to_two_offers(runtime: Runtime, sandbox: Sandbox) -> None:
    run(runtime, "offer-1")
    sandbox.bookings_mode = "forbidden"
    run(runtime, f"{OFFER}")
    with runtime.engine.begin() as connection:
        connection.execute(update(Confirmation).where(Confirmation.offer_id == OFFER).values(state="needs_review"))
        connection.execute(text("delete from policies"))
        connection.execute(text("delete from policyholders"))
        connection.execute(text(f"delete from bookings where offer_id = '{OFFER}'"))
    taken = sandbox.bookings["P-100", "offer-1"]["id"]
    shown = b'{"id": "%s", "offer_id": "' + CAPITALS.encode() + b'"}'

    def resolve(booking_id: str) -> None:
        booking = read_booking(shown.replace(b"%s", booking_id.encode()), OFFER)
        with runtime.engine.begin() as connection:
            resolve_booked(connection, runtime.encryption, "P-100", booking, BookingStatuses(), False, "me", None)

    with pytest.raises(ResolveError, match=f"booking {taken} is stored for offer offer-1 already"):
        resolve(taken)
    resolve("INS-9")
    assert states(runtime)[OFFER] == State.PENDING


# --- E-mails ---


def holder(email: str) -> dict[str, Any]:
    return {"policyholder": {"first_name": "A", "last_name": "B", "country": "GB", "email": email}}


def test_a_person_is_found_by_an_email_in_another_form(runtime: Runtime) -> None:
    run(runtime, "offer-1", **holder("René@bücher.example"))

    for email in ("rene\u0301@xn--bcher-kva.example", "RENÉ@BÜCHER.example."):
        with runtime.engine.connect() as connection:
            assert len(purge.of_person(connection, runtime.encryption, email)) == 1


def test_a_person_of_an_earlier_version_is_found_and_rekey_makes_the_hash_anew(runtime: Runtime) -> None:
    email, other = "rené@bücher.example", "rené@xn--bcher-kva.example"
    run(runtime, "offer-1", **holder(email))
    old = runtime.encryption.email_hashes(email)[-1]
    assert old != runtime.encryption.email_hash(email)
    with runtime.engine.begin() as connection:
        connection.execute(update(Confirmation).values(email_hash=old))
        connection.execute(text("delete from further_emails"))

    def found(written: str) -> int:
        with runtime.engine.connect() as connection:
            return len(purge.of_person(connection, runtime.encryption, written))

    assert (found(email), found("RENÉ@bücher.example"), found(other)) == (1, 1, 0)
    assert sum(step.indexed for step in rekey.rekey(runtime.engine, runtime.encryption)) == 1
    assert (found(email), found(other)) == (1, 1)


# --- Rows of an earlier version ---


def stored_before(engine: Engine, partner: str, offer: str, state: str, booking: str | None = None) -> UUID:
    """A row of version 0004."""
    id_, columns = uuid4(), Confirmation.__table__.c
    row = {
        columns.id: id_, columns.partner_id: partner, columns.offer_id: offer, columns.state: state,
        columns.echo: {}, columns.idempotency_key: uuid4(), columns.attempts: 1, columns.attempts_used: 1,
        columns.crashes: 0, columns.read_backs: 0, columns.answer_unknown: False, columns.sequence: 1,
        columns.queued_at: now(), columns.created_at: now(), columns.updated_at: now(),
    }  # fmt: skip
    with engine.begin() as connection:
        connection.execute(insert(Confirmation.__table__).values({c.name: value for c, value in row.items()}))
        if booking:
            values = {"confirmation_id": id_, "id": booking, "offer_id": offer, "recorded_at": now()}
            connection.execute(insert(Booking.__table__).values(values))
    return id_


def test_rows_of_an_earlier_version_are_found_and_its_duplicates_stay(runtime: Runtime, engine: Engine) -> None:
    with engine.begin() as connection:
        command.downgrade(migrator.config(connection), "0004")
    capitals = stored_before(engine, "P-1", CAPITALS, "failed")
    stored_before(engine, "P-2", CAPITALS, "failed")
    booked = stored_before(engine, "P-2", OFFER, "confirmed", "I-2")
    stored_before(engine, "P-2", HEX, "needs_review")
    stored_before(engine, "P-3", OTHER, "confirmed", "I-3")  # in the usual form
    stored_before(engine, "P-1", "offer-1", "confirmed", "I-1")
    stored_before(engine, "P-1", "offer-2", "confirmed", "I-1")

    migrator.upgrade(engine)

    uuids = {row.id: row.offer_uuid for row in rows(runtime, Confirmation) if row.offer_uuid}
    assert uuids == {capitals: UUID(OFFER), booked: UUID(OFFER)}
    assert len(lookup.find(engine, OFFER, "P-2")) == 3
    run(runtime, OFFER, partner_id="P-1")  # replaces what failed
    for partner, form in (("P-2", OFFER.replace("c", "C")), ("P-3", OTHER), ("P-3", OTHER.upper())):
        assert confirm.accept_job(body_of(form, partner_id=partner), Delivery(), runtime) is None
    assert len(rows(runtime, Confirmation)) == 7


def test_a_booking_that_an_earlier_version_stored_belongs_to_its_confirmation(runtime: Runtime, engine: Engine) -> None:
    stored_before(engine, "P-100", "before", "confirmed", "INS-1")
    stored_before(engine, "P-1", "before", "confirmed", "INS-2")
    first, second = accepted(runtime, "offer-1"), accepted(runtime, "offer-2")

    recorded = confirm.record_batch(runtime, [answered(runtime, first, "INS-1"), answered(runtime, second, "INS-2")])

    assert recorded == [State.NEEDS_REVIEW, State.CONFIRMED]


def test_rekey_completes_what_an_earlier_version_stored(runtime: Runtime) -> None:
    run(runtime, CAPITALS, **QUOTES)
    with runtime.engine.begin() as connection:
        connection.execute(update(Confirmation).values(offer_uuid=None, quote_ids=None))
        connection.execute(update(Booking).values(partner_id=None))
    assert len(lookup.find(runtime.engine, OFFER)) == 1  # by its usual forms

    list(rekey.rekey(runtime.engine, runtime.encryption))

    row = only(runtime, Confirmation)
    assert (row.offer_uuid, row.quote_ids) == (UUID(OFFER), '["shared"]')
    assert only(runtime, Booking).partner_id == "P-100"


def test_rekey_leaves_the_second_of_two_equal_ones_as_it_is(runtime: Runtime, engine: Engine) -> None:
    run(runtime, OFFER)
    second = stored_before(engine, "P-100", CAPITALS, "confirmed", only(runtime, Booking).id)

    list(rekey.rekey(runtime.engine, runtime.encryption))

    assert {row.id: row.offer_uuid for row in rows(runtime, Confirmation)}[second] is None
    assert {row.confirmation_id: row.partner_id for row in rows(runtime, Booking)}[second] is None


def test_a_body_that_an_earlier_version_stored_with_rounded_numbers_is_the_same_job(runtime: Runtime) -> None:
    exact = body_of("offer-1", quotes=[{"id": "q", "n": 0}]).replace(b'"n": 0', b'"n": 9007199254740993.0')
    rounded = exact.replace(b"993.0", b"992.0")
    assert confirm.accept_job(rounded, Delivery(), runtime) is not None
    with pytest.raises(JobRejected, match="conflicting-job"):
        confirm.accept_job(exact, Delivery(), runtime)
    with runtime.engine.begin() as connection:
        connection.execute(update(Confirmation).values(quote_ids=None))

    assert confirm.accept_job(exact, Delivery(), runtime) is None
