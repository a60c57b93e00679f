"""Query plans: no statement of a worker or of operators reads a growing table from end to end."""

import json
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import Connection, event, func, insert, select, text, update

from benchmarks.seed import seed
from models.tables import Confirmation, OutboxEvent
from tasks import confirm
from tasks.accept import Delivery
from tasks.booking_owner import may_be_anothers
from tasks.operations import batches, deletion, event_replay, failures, lookup, pauses
from tasks.order_end import expire
from tasks.privacy import purge
from tests.support.system import job
from worker.doctor import work
from worker.runtime import Runtime
from worker.services.deletion import Deletion
from worker.services.outbox_relay import OutboxRelay
from worker.services.scheduler import Scheduler
from worker.settings import EncryptionSettings, read
from worker.storage.database import now, now_plus

pytestmark = pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)

SEEDED = 20_000
GROWING = {"confirmations", "attempts", "bookings", "policyholders", "policies", "outbox", "further_emails"}

Statements = dict[str, Any]


@pytest.fixture
def runtime(runtime: Runtime) -> Runtime:
    seed(runtime.engine, SEEDED)
    return runtime


@contextmanager
def recorded(runtime: Runtime) -> Iterator[Statements]:
    """Records each statement with its parameters."""
    found: Statements = {}

    def keep(_connection: Any, _cursor: Any, text: str, parameters: Any, _context: Any, executemany: bool) -> None:
        if "SAVEPOINT" not in text:
            found[text] = parameters[0] if executemany else parameters

    event.listen(runtime.engine, "before_cursor_execute", keep)
    yield found
    event.remove(runtime.engine, "before_cursor_execute", keep)


def full_scans(
    runtime: Runtime, statements: Statements, growing: AbstractSet[str] = frozenset(GROWING)
) -> set[tuple[str, str]]:
    """The growing tables that a statement reads from end to end, each with the statement."""

    def tables(node: dict[str, Any]) -> Iterator[str]:
        if node["Node Type"] == "Seq Scan":
            yield node["Relation Name"]
        for child in node.get("Plans", []):
            yield from tables(child)

    found = set()
    with runtime.engine.connect() as connection:
        for text, parameters in statements.items():
            (plan,) = connection.exec_driver_sql(f"EXPLAIN (FORMAT JSON) {text}", parameters).one()
            root = (json.loads(plan) if isinstance(plan, str) else plan)[0]["Plan"]
            found |= {(table, " ".join(text.split())[:300]) for table in tables(root) if table in growing}
        connection.rollback()
    return found


def confirm_one(runtime: Runtime, offer: str) -> None:
    lease = confirm.accept_job(json.dumps(job(offer, partner_id="P-1")).encode(), Delivery(), runtime)
    assert lease is not None
    confirm.attempt(lease, runtime)


def test_no_statement_of_a_job_reads_a_growing_table(runtime: Runtime) -> None:
    with recorded(runtime) as statements:
        confirm_one(runtime, "new-1")
        confirm_one(runtime, "new-2~http-500~1")
        with runtime.engine.begin() as connection:
            connection.execute(update(Confirmation).where(Confirmation.state == "retrying").values(due_at=now_plus(-1)))
            waiting = connection.execute(update(Confirmation).where(Confirmation.offer_id == "new-2~http-500~1").values(
                crashes=0).returning(Confirmation.id)).scalar_one()  # fmt: skip
        for text in list(statements):
            if text.startswith("UPDATE confirmations SET due_at") or "SET crashes" in text:
                del statements[text]  # statements of this test
        Scheduler(runtime).run_once()
        lease = confirm.lease_due(waiting, runtime)
        assert lease is not None
        confirm.attempt(lease, runtime)
        confirm.accept_job(json.dumps(job("new-1", partner_id="P-1")).encode(), Delivery(), runtime)  # a repeat
        runtime.commit(lambda connection: may_be_anothers(connection, runtime.encryption, lease, "INS-of-nobody"))
        relay = OutboxRelay(runtime)
        while relay.run_once():
            pass

    assert len(statements) > 15
    assert not full_scans(runtime, statements)


def test_no_statement_of_operators_reads_a_growing_table(runtime: Runtime) -> None:
    since = datetime.now(UTC) - timedelta(days=1)
    chosen = failures.Selection(code="http-503", since=since - timedelta(days=400), limit=50)
    with recorded(runtime) as statements, runtime.engine.begin() as connection:
        failures.groups(connection, failures.Selection())
        failures.groups(connection, chosen)
        ids = failures.match(connection, chosen).ids
        assert len(ids) == 50
        batch = batches.create(connection, ids, chosen, "test", "me", None)
        fed = batches.feed(connection, batch, 20, [], 30.0)
        assert len(fed) == 20
        batches.under_way(connection)
        batches.progress(connection, batch)
        batches.overview(connection)
        assert lookup.find(runtime.engine, "seeded-7")
        assert lookup.find(runtime.engine, "SO-8")
        assert (
            list(
                event_replay.pages(
                    runtime.engine, event_replay.EventSelection(since, datetime.now(UTC), offer_id="seeded-9")
                )
            )
            == []
        )
        purge.of_person(connection, runtime.encryption, "ada@example.com")
        assert purge.purge(connection, since - timedelta(days=3), 10) == 10

    assert len(statements) > 15
    assert not full_scans(runtime, statements)


def test_no_statement_of_deletion_reads_a_growing_table(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor the items of batches, of which each confirmation that is deleted is asked for."""
    old = now_plus(-200 * 86400.0)
    with runtime.engine.begin() as connection:
        ids = connection.execute(select(Confirmation.id)).scalars().all()
        batch = batches.create(connection, ids, failures.Selection(), "test", "me", None)
        connection.execute(text("update batches set state = 'done'"))
        connection.execute(update(Confirmation).values(created_at=old, updated_at=old))
        connection.execute(update(OutboxEvent).values(created_at=old, published_at=old))
    with runtime.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("vacuum analyze"))
    monkeypatch.setattr(deletion, "WINDOW", 20)  # of 2 million rows, WINDOW is a smaller share
    running = Deletion(runtime, 90.0, 90.0)

    with recorded(runtime) as statements:
        assert running.run_once()

    assert len(statements) > 10
    assert not full_scans(runtime, statements, GROWING | {"batch_items"})
    with runtime.engine.connect() as connection:
        assert connection.execute(select(func.count()).select_from(Confirmation)).scalar_one() == SEEDED - 20
        progress = batches.progress(connection, batch)
    assert progress is not None


def test_expiry_reads_only_what_has_expired(runtime: Runtime) -> None:
    with recorded(runtime) as statements, runtime.engine.begin() as connection:
        expire(connection, {})

    assert not full_scans(runtime, statements)


def test_no_statement_of_the_doctor_reads_a_growing_table(runtime: Runtime) -> None:
    with runtime.engine.begin() as connection:
        late = select(Confirmation.id).where(Confirmation.state == "confirmed").limit(5)
        connection.execute(
            update(Confirmation).where(Confirmation.id.in_(late)).values(state="retrying", due_at=now_plus(-600))
        )
        unsent = select(OutboxEvent.id).limit(5)
        connection.execute(
            update(OutboxEvent).where(OutboxEvent.id.in_(unsent)).values(published_at=None, created_at=now_plus(-600))
        )
    with recorded(runtime) as statements, runtime.engine.connect() as connection:
        found = {finding.check: finding.level for finding in work.check(connection, read(EncryptionSettings))}

    assert (found["due"], found["outbox"]) == ("warning", "warning")
    assert len(statements) > 8
    assert not full_scans(runtime, statements)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["scheduler", "paused partner", "relay", "old of a paused partner"])
def test_what_has_ended_under_an_open_transaction_is_not_looked_at(runtime: Runtime, way: str) -> None:
    """The entries of its index stay until the transaction ends, and each costs a look at its row."""
    ids = [uuid4() for _ in range(3000)]
    with runtime.engine.connect() as holder, runtime.engine.connect() as connection:
        holder.execute(text("set transaction isolation level repeatable read"))
        holder.execute(select(1).select_from(Confirmation).limit(1))
        times = {"queued_at": now(), "created_at": now(), "updated_at": now(), "due_at": now_plus(-600.0)}
        values = {"partner_id": "P-1", "echo": {}, "state": "retrying", "answer_unknown": False}
        rows = [{**values, "id": id_, "offer_id": str(id_), "idempotency_key": id_} for id_ in ids]
        due = {**rows[0], "id": uuid4(), "partner_id": "P-2"}
        connection.execute(insert(Confirmation).values(**times), [*rows, due])
        connection.execute(update(Confirmation).where(Confirmation.id == due["id"]).values(due_at=now_plus(-2.0)))
        event = {"aggregatetype": "confirmation", "aggregateid": "P-1/x", "type": "x", "payload": "{}", "sequence": 1}
        events = [{**event, "id": id_, "confirmation_id": id_} for id_ in ids]
        connection.execute(insert(OutboxEvent).values(created_at=now_plus(-600.0)), events)
        connection.commit()
        pauses.pause(connection, "P-0" if way == "old of a paused partner" else "P-1", "test", "me")
        if way == "old of a paused partner":
            old = {**rows[0], "id": uuid4(), "offer_id": "old", "partner_id": "P-0"}
            connection.execute(insert(Confirmation).values({**times, "due_at": now_plus(-900.0)}), [old])
        if way != "paused partner":
            connection.execute(
                update(Confirmation).where(Confirmation.id.in_(ids)).values(due_at=None, state="confirmed")
            )
        connection.execute(update(OutboxEvent).where(OutboxEvent.id.in_(ids)).values(published_at=now()))
        connection.commit()

        connection.execute(text("analyze confirmations, outbox"))
        connection.commit()
        service = OutboxRelay(runtime) if way == "relay" else Scheduler(runtime)
        service.run_once()  # looks back
        with recorded(runtime) as statements:
            service.run_once()
        with runtime.engine.connect() as connection:
            blocks = {
                sql: blocks_read(connection, sql, parameters)
                for sql, parameters in statements.items()
                if "anon_1.rank" in sql or "ready" in sql or "dispatched_until >" in sql
            }
            connection.rollback()
    assert len(blocks) == (1 if way == "relay" else 4)
    assert max(blocks.values()) < 600, blocks  # those of 3,000 rows are 1,000 and more


def test_doctor_names_the_oldest_open_transaction(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "OLD_TRANSACTION", 0.0)
    with runtime.engine.connect() as holder, runtime.engine.connect() as connection:
        holder.execute(text("set application_name to 'a report'"))
        process = holder.execute(text("select pg_backend_pid()")).scalar_one()

        (finding,) = [finding for finding in work.check(connection, None) if finding.check == "transactions"]

    assert f"(a report, process {process})" in finding.message
    assert f"pg_terminate_backend({process})" in (finding.remedy or "")


def blocks_read(connection: Connection, sql: str, parameters: Any) -> int:
    """How many blocks of tables and indexes a statement looks at."""
    (plan,) = connection.exec_driver_sql(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {sql}", parameters).one()
    root = (json.loads(plan) if isinstance(plan, str) else plan)[0]["Plan"]
    return int(root["Shared Hit Blocks"] + root["Shared Read Blocks"])
