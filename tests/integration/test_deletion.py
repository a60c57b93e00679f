"""Rows past their time are deleted, on both databases."""

import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from threading import Barrier
from typing import Any

import pytest
from click.testing import CliRunner
from sqlalchemy import func, select, text, update

from models.states import BatchState, State
from models.tables import AuditEntry, Base, Batch, Confirmation, OutboxEvent
from tasks import confirm
from tasks.accept import Delivery
from tasks.operations import batches, deletion, event_replay
from tasks.operations.deletion import CONFIRMATIONS, EVENTS, PARTS, DailyCount, memory_begins
from tasks.operations.event_replay import EventSelection
from tasks.operations.failures import Selection
from tasks.privacy import purge
from tests.support.confirming import accepted, body_of, only, rows, run
from tests.support.sentry import Capturing
from worker.cli.app import cli
from worker.runtime import Runtime
from worker.sandbox.server import Sandbox
from worker.services import deletion as service
from worker.services.deletion import Deletion
from worker.storage.database import now_plus

DAY = 86400.0
OLD = now_plus(-100 * DAY)
DAYS = 90.0


def make_old(runtime: Runtime, offers: Iterable[str] | None = None) -> None:
    """All confirmations, or those of these offers, ended and were published 100 days ago."""
    with runtime.engine.begin() as connection:
        chosen = Confirmation.offer_id.in_(list(offers)) if offers is not None else True
        ids = select(Confirmation.id).where(chosen)
        connection.execute(update(Confirmation).where(Confirmation.id.in_(ids)).values(created_at=OLD, updated_at=OLD))
        of_them = OutboxEvent.confirmation_id.in_(ids)
        connection.execute(update(OutboxEvent).where(of_them).values(created_at=OLD, published_at=OLD))


def run_deletion(runtime: Runtime, days: float | None = DAYS, events_days: float | None = None) -> None:
    """Until a sweep has ended."""
    running = Deletion(runtime, days, events_days)
    while running.run_once():
        pass


def left(runtime: Runtime) -> set[str]:
    return {row.offer_id for row in rows(runtime, Confirmation)}


def audited(runtime: Runtime) -> list[tuple[str, int]]:
    return [(row.command, row.count) for row in rows(runtime, AuditEntry)]


@pytest.fixture(autouse=True)
def _at_full_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "STEPS_PER_SECOND", 1000.0)


def test_what_ended_long_ago_goes_with_all_that_hangs_on_it(runtime: Runtime, sandbox: Sandbox) -> None:
    insured = [{"id": "q", "insured": [{"email": "grace@example.com"}]}]
    for offer_id in ("confirmed", "failed~http-422", "late"):
        run(runtime, offer_id, quotes=insured)
    with runtime.engine.begin() as connection:
        id_ = connection.execute(select(Confirmation.id).where(Confirmation.offer_id == "failed~http-422")).scalar_one()
        batch = batches.create(connection, [id_], Selection(), None, "me", None)
        connection.execute(update(Batch).values(state=BatchState.DONE))
    make_old(runtime, ["confirmed", "failed~http-422"])

    run_deletion(runtime)

    assert left(runtime) == {"late"}
    remaining = only(runtime, Confirmation).id
    assert all(row.confirmation_id == remaining for table in PARTS for row in all_rows(runtime, table))
    assert rows(runtime, OutboxEvent)
    with runtime.engine.connect() as connection:
        assert batches.progress(connection, batch) is not None
    assert audited(runtime)[1:] == [(CONFIRMATIONS, 2)]
    assert rows(runtime, AuditEntry)[1].details == {"day": datetime.now(UTC).date().isoformat(), "after_days": DAYS}


def all_rows(runtime: Runtime, table: Any) -> list[Any]:
    with runtime.engine.connect() as connection:
        return list(connection.execute(select(table)))


def test_every_table_of_a_confirmation_is_deleted_from() -> None:
    owned = {
        table
        for table in Base.metadata.sorted_tables
        if any(key.column.table.name in ("confirmations", "bookings") for key in table.foreign_keys)
    }

    assert owned == set(PARTS)


def test_what_has_not_ended_wholly_stays(runtime: Runtime, sandbox: Sandbox) -> None:
    accepted(runtime, "confirming")
    for offer_id in (
        "pending~pending",
        "retrying~http-503",
        "unpublished",
        "young",
        "review~http-422",
        "batch~http-422",
    ):
        run(runtime, offer_id)
    with runtime.engine.begin() as connection:
        is_meant = Confirmation.offer_id == "review~http-422"
        connection.execute(update(Confirmation).where(is_meant).values(state=State.NEEDS_REVIEW))
        of_batch = select(Confirmation.id).where(Confirmation.offer_id == "batch~http-422")
        ids = connection.execute(of_batch).scalars().all()
        batches.create(connection, ids, Selection(), None, "me", None)
    everything = left(runtime)
    make_old(runtime, everything - {"young"})
    with runtime.engine.begin() as connection:
        of_it = select(Confirmation.id).where(Confirmation.offer_id == "unpublished").scalar_subquery()
        connection.execute(update(OutboxEvent).where(OutboxEvent.confirmation_id == of_it).values(published_at=None))

    run_deletion(runtime)

    assert left(runtime) == everything
    assert CONFIRMATIONS not in dict(audited(runtime))


def test_published_events_go_and_their_confirmations_stay(runtime: Runtime) -> None:
    for offer_id in ("old", "young", "unpublished"):
        run(runtime, offer_id)
    make_old(runtime, ["old", "unpublished"])
    with runtime.engine.begin() as connection:
        of_it = select(Confirmation.id).where(Confirmation.offer_id == "unpublished").scalar_subquery()
        connection.execute(update(OutboxEvent).where(OutboxEvent.confirmation_id == of_it).values(published_at=None))

    run_deletion(runtime, None, DAYS)

    assert {row.aggregateid for row in rows(runtime, OutboxEvent)} == {"P-100/young", "P-100/unpublished"}
    assert left(runtime) == {"old", "young", "unpublished"}
    assert audited(runtime) == [(EVENTS, 1)]


def test_the_audit_says_where_the_memory_of_events_begins(runtime: Runtime) -> None:
    with runtime.engine.begin() as connection:
        assert memory_begins(connection) is None
        DailyCount(EVENTS, 30.0).add(connection, 1)
        DailyCount(EVENTS, 90.0).add(connection, 1)  # the setting was changed
        begins = memory_begins(connection)

    assert begins is not None
    assert datetime.now(UTC) - begins == pytest.approx(timedelta(days=30), abs=timedelta(seconds=10))


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_replay_says_where_the_memory_begins(runtime: Runtime) -> None:
    with runtime.engine.begin() as connection:
        DailyCount(EVENTS, 30.0).add(connection, 1)

    early, late = (
        CliRunner().invoke(cli, ["events", "replay", "--since", since, "--json"]) for since in ("40d", "20d")
    )

    assert (early.exit_code, late.exit_code) == (0, 0)
    begins = json.loads(early.stdout)["memory_begins"]
    assert datetime.now(UTC) - datetime.fromisoformat(begins) == pytest.approx(
        timedelta(days=30), abs=timedelta(minutes=1)
    )
    assert "have been deleted" in early.stderr
    assert late.stderr == ""


def test_the_audit_has_one_row_a_day_and_counts_what_is_committed(runtime: Runtime) -> None:
    first, second = DailyCount(EVENTS, DAYS), DailyCount(EVENTS, DAYS)
    with runtime.engine.connect() as connection:
        first.add(connection, 5)  # and is rolled back
    for count in (first, second, first):
        with runtime.engine.begin() as connection:
            count.add(connection, 7)

    assert audited(runtime) == [(EVENTS, 21)]


def test_a_sweep_passes_what_stays_and_begins_anew(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deletion, "WINDOW", 2)
    for number in range(3):
        accepted(runtime, f"open-{number}")
    for number in range(4):
        run(runtime, f"ended-{number}")
    make_old(runtime)
    running = Deletion(runtime, DAYS, None)

    while running.run_once():
        pass
    assert left(runtime) == {f"open-{number}" for number in range(3)}
    for row in rows(runtime, Confirmation):
        with runtime.engine.begin() as connection:
            connection.execute(update(Confirmation).where(Confirmation.id == row.id).values(state=State.FAILED))
    while running.run_once():
        pass
    assert left(runtime) == set()


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_one_that_can_not_be_deleted_stops_no_other(runtime: Runtime, sentry: Capturing) -> None:
    """Such as where a newer version has a table that this one does not know."""
    for number in range(5):
        run(runtime, f"offer-{number}")
    make_old(runtime)
    with runtime.engine.begin() as connection:
        connection.execute(text("create table newer (id uuid references confirmations)"))
        connection.execute(text("insert into newer select id from confirmations where offer_id = 'offer-3'"))

    run_deletion(runtime)

    assert left(runtime) == {"offer-3"}
    assert dict(audited(runtime)) == {CONFIRMATIONS: 4}
    assert len(sentry.events()) == 1


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_deletion_beside_purge_replay_and_live_jobs(runtime: Runtime, sandbox: Sandbox) -> None:
    for number in range(60):
        run(runtime, f"old-{number}")
    make_old(runtime)
    together = Barrier(4)
    at = datetime.now(UTC)
    selection = EventSelection(at - timedelta(days=365), at + timedelta(days=1))

    def delete() -> None:
        together.wait()
        run_deletion(runtime)

    def purge_all() -> None:
        together.wait()
        while True:
            with runtime.engine.begin() as connection:
                if not purge.purge(connection, at - timedelta(days=30), 10):
                    return

    def replay() -> int:
        together.wait()
        return sum(len(page) for page in event_replay.pages(runtime.engine, selection, 7))

    def live() -> None:
        together.wait()
        for number in range(20):
            run(runtime, f"live-{number}")

    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(work) for work in (delete, purge_all, replay, live)]
        for future in futures:
            future.result(60)
    run_deletion(runtime)  # what the purge held

    assert left(runtime) == {f"live-{number}" for number in range(20)}
    assert dict(audited(runtime)) == {CONFIRMATIONS: 60}
    with runtime.engine.connect() as connection:
        assert connection.execute(select(func.count()).select_from(OutboxEvent)).scalar_one() == 20


def test_a_deleted_offer_is_a_new_one(runtime: Runtime, sandbox: Sandbox) -> None:
    run(runtime)
    make_old(runtime)
    run_deletion(runtime)

    lease = confirm.accept_job(body_of("offer-1"), Delivery(), runtime)
    assert lease is not None
    confirm.attempt(lease, runtime)

    assert only(runtime, Confirmation).state == State.CONFIRMED, "XONE refuses the second call, and the list shows it"
    assert len(sandbox.bookings) == 1
