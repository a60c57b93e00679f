"""``reconcile``: what XONE has booked and the database has lost is taken in, once, and nothing else."""

import json
import os
from subprocess import CompletedProcess
from typing import Any

import pytest
from sqlalchemy import delete, func, select, update

from models.states import State
from models.tables import (
    Attempt,
    AuditEntry,
    Booking,
    Confirmation,
    FurtherEmail,
    OutboxEvent,
    Policy,
    Policyholder,
)
from tasks import confirm, email_index
from tasks.accept import Delivery
from tasks.operations import batches
from tasks.operations.failures import Selection
from tests.support.commands import run as program
from tests.support.confirming import accepted, body_of, only, rows, run
from worker.runtime import Runtime
from worker.sandbox.server import Sandbox

on_postgresql = pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
ALL = [FurtherEmail, OutboxEvent, Policy, Policyholder, Booking, Attempt]


def lose(runtime: Runtime, *offers: str, rows_too: bool = True) -> None:
    """As a failover to a standby that lagged; without rows_too, only the last commit of each is lost."""
    ids = select(Confirmation.id).where(Confirmation.offer_id.in_(offers))
    with runtime.engine.begin() as connection:
        for table in ALL if rows_too else [OutboxEvent, Policy, Policyholder, Booking]:
            connection.execute(delete(table).where(table.confirmation_id.in_(ids)))
        if rows_too:
            connection.execute(delete(Confirmation).where(Confirmation.offer_id.in_(offers)))
        else:
            lost = {"state": State.RETRYING, "due_at": func.now(), "sequence": 0}
            connection.execute(update(Confirmation).where(Confirmation.offer_id.in_(offers)).values(**lost))


def called(*options: str) -> CompletedProcess[str]:
    return program("reconcile", "--since", "1h", *options, **os.environ)


def reconcile(*options: str, code: int = 0) -> Any:
    done = called(*options, "--json")
    assert done.returncode == code, done.stderr
    return json.loads(done.stdout)


def counts(runtime: Runtime) -> list[int]:
    return [len(rows(runtime, table)) for table in (Confirmation, Booking, Policy, Policyholder, OutboxEvent)]


def test_lost_bookings_are_taken_in_once(runtime: Runtime, sandbox: Sandbox) -> None:
    sandbox.page_size = 2
    for number in range(1, 6):
        run(runtime, f"offer-{number}")
    complete = counts(runtime)
    lose(runtime, "offer-1", "offer-4")
    lose(runtime, "offer-2", rows_too=False)

    looked = reconcile("--dry-run")
    assert (looked["listed"], looked["missing"], looked["taken_in"]) == (5, 3, 0)
    assert looked["names"]["unknown_offer"] == ["offer offer-1 of P-100", "offer offer-4 of P-100"]
    assert looked["names"]["not_booked"] == ["offer offer-2 of P-100"]
    assert counts(runtime) < complete, "a dry run changes nothing"
    assert rows(runtime, AuditEntry) == []

    done = reconcile("--yes", "--reason", "failover")
    assert (done["missing"], done["taken_in"], done["found"]["stored"]) == (0, 3, 2)
    assert counts(runtime) == complete
    assert {row.state for row in rows(runtime, Confirmation)} == {State.CONFIRMED}
    assert {row.id for row in rows(runtime, Booking)} == {booking["id"] for booking in sandbox.bookings.values()}
    events = {event.aggregateid: json.loads(event.payload) for event in rows(runtime, OutboxEvent)}
    assert set(events) == {f"P-100/offer-{number}" for number in range(1, 6)}
    assert events["P-100/offer-1"]["data"]["booking"]["id"] == sandbox.bookings["P-100", "offer-1"]["id"]
    entry = only(runtime, AuditEntry)
    assert (entry.command, entry.reason, entry.count) == ("reconcile", "failover", 3)

    again = reconcile("--yes")
    assert (again["missing"], again["taken_in"]) == (0, 0)
    assert counts(runtime) == complete


def test_a_job_that_comes_again_finds_its_offer_booked(runtime: Runtime, sandbox: Sandbox) -> None:
    run(runtime, "offer-1")
    lose(runtime, "offer-1")
    reconcile("--yes", "--partner", "P-100")
    calls = len(sandbox.calls)

    assert confirm.accept_job(body_of("offer-1"), Delivery(), runtime) is None
    assert confirm.accept_job(body_of("offer-1", order_reference="SO-2"), Delivery(), runtime) is None

    assert only(runtime, Confirmation).state == State.CONFIRMED
    assert len(sandbox.calls) == calls
    assert len(rows(runtime, OutboxEvent)) == 1


@pytest.mark.slow
@on_postgresql
def test_a_booking_that_was_taken_in_is_found_by_its_persons_email(runtime: Runtime) -> None:
    run(runtime, "offer-1")
    email = json.loads(body_of("offer-1"))["policyholder"]["email"]
    lose(runtime, "offer-1")
    reconcile("--yes", "--partner", "P-100")

    (digest,) = email_index.of_person(runtime.encryption, email)
    assert digest in {row.email_hash for row in rows(runtime, FurtherEmail)}


@pytest.mark.slow
@on_postgresql
def test_what_a_worker_has_in_hand_and_what_is_older_is_left(runtime: Runtime, sandbox: Sandbox) -> None:
    run(runtime, "old")
    lose(runtime, "old")
    sandbox.bookings["P-100", "old"]["created_at"] = "2020-01-01T00:00:00Z"
    lease = accepted(runtime, "in-hand")
    runtime.xone.confirm("P-100", "in-hand", lease.body, lease.idempotency_key)

    found = reconcile("--yes")

    assert (found["listed"], found["found"]["in_hand"], found["taken_in"]) == (1, 1, 0)
    assert only(runtime, Confirmation).state == State.CONFIRMING


@pytest.mark.slow
@on_postgresql
def test_another_booking_of_an_offer_is_for_a_person(runtime: Runtime, sandbox: Sandbox) -> None:
    run(runtime, "offer-1")
    sandbox.bookings["P-100", "offer-1"] = {**sandbox.bookings["P-100", "offer-1"], "id": "INS-other"}

    done = called("--yes")

    assert done.returncode == 1
    assert "offer offer-1 of P-100 has another booking" in " ".join(done.stderr.split())
    assert only(runtime, Booking).id != "INS-other"


@pytest.mark.slow
@on_postgresql
def test_a_list_without_offers_shows_what_it_can_not_say(runtime: Runtime, sandbox: Sandbox) -> None:
    run(runtime, "offer-1")
    run(runtime, "offer-2")
    lose(runtime, "offer-2")
    sandbox.bookings_mode = "nameless"

    found = reconcile("--yes", code=1)["found"]

    assert (found["stored"], found["without_offer"], found["unknown_offer"]) == (1, 1, 0)


@pytest.mark.slow
@on_postgresql
def test_a_list_that_can_not_be_read_is_named_and_the_others_are_taken_in(runtime: Runtime, sandbox: Sandbox) -> None:
    run(runtime, "offer-1")
    sandbox.bookings_mode = "failing"

    done = reconcile("--yes", code=1)

    assert list(done["unread"]) == ["P-100"]
    assert "503" in done["unread"]["P-100"]


@pytest.mark.slow
@on_postgresql
def test_only_its_booking_is_known_so_that_it_is_never_sent_again(runtime: Runtime) -> None:
    run(runtime, "offer-1")
    lose(runtime, "offer-1")
    reconcile("--yes", "--partner", "P-100")
    with runtime.engine.begin() as connection:
        only_id = connection.execute(
            update(Confirmation).values(state=State.NEEDS_REVIEW).returning(Confirmation.id)
        ).scalar_one()
        batch = batches.create(connection, [only_id], Selection(include_needs_review=True), None, "me", None)
        assert batches.feed(connection, batch, 10, [], 30.0) == []
