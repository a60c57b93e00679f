"""Metrics of open work: correct on both databases, read by indexes, and without waiting for a slow database."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest
from prometheus_client import Metric
from sqlalchemy import Connection, Engine, event, insert, text

from models.states import BatchState, State
from models.tables import Batch, BatchItem, Confirmation, OutboxEvent, Pause
from tests.support.servers import free_port
from tests.support.stored import batch_row
from tests.support.system import until
from worker.services import backlog_metrics
from worker.services.backlog_metrics import BacklogCollector, read_backlog
from worker.storage import database

AGO = timedelta(seconds=500)


def confirmations(connection: Connection, state: State, number: int, **columns: Any) -> list[Any]:
    """Inserts confirmations in a state, queued 500 s ago. Open ones were due 500 s ago."""
    then = datetime.now(UTC) - AGO
    is_open = state in (State.QUEUED, State.CONFIRMING, State.RETRYING)
    ids = [uuid4() for _ in range(number)]
    common = {"partner_id": "P-100", "echo": {}, "idempotency_key": uuid4(), "state": state}
    times = {"due_at": then if is_open else None, "queued_at": then, "created_at": then, "updated_at": then}
    rows = [{"id": id_, "offer_id": str(id_), **common, **times, **columns} for id_ in ids]
    connection.execute(insert(Confirmation), rows)
    return ids


def event_row(confirmation: Any, published: bool) -> dict[str, Any]:
    then = datetime.now(UTC) - AGO
    return {
        "id": uuid4(),
        "aggregatetype": "confirmation",
        "aggregateid": "P-100/offer",
        "type": "booking.confirmed",
        "payload": "{}",
        "confirmation_id": confirmation,
        "sequence": 1,
        "created_at": then,
        "published_at": then if published else None,
    }


def samples(families: Iterator[Metric]) -> dict[str, float]:
    """Values by name and labels, as in a scrape."""
    return {
        f"{sample.name.removeprefix('confirm_offer_')}{sorted(sample.labels.values()) or ''}": sample.value
        for family in families
        for sample in family.samples
    }


def test_all_open_work_is_counted(engine: Engine) -> None:
    with engine.begin() as connection:
        confirmations(connection, State.QUEUED, 3)
        confirmations(connection, State.RETRYING, 2, due_at=datetime.now(UTC) + AGO)
        confirmations(connection, State.NEEDS_REVIEW, 1)
        ended = confirmations(connection, State.CONFIRMED, 4)
        confirmations(connection, State.FAILED, 5)
        connection.execute(insert(OutboxEvent), [event_row(id_, published=id_ in ended[:1]) for id_ in ended])
        connection.execute(insert(Batch), [batch_row(BatchState.PAUSED, 4), batch_row(BatchState.DONE, 1)])
        progress: list[dict[str, Any]] = [{}, {"fed_at": datetime.now(UTC)}]
        progress += [{"fed_at": datetime.now(UTC), "ended_at": datetime.now(UTC)}] * 2
        for position, (id_, times) in enumerate(zip(ended, progress, strict=True)):
            item = {"batch_id": 1, "position": position, "confirmation_id": id_}
            connection.execute(insert(BatchItem), {**item, **times})
        for partner in ("", "P-100", "P-200"):
            connection.execute(
                insert(Pause), {"partner_id": partner, "reason": "?", "by": "me", "created_at": datetime.now(UTC)}
            )

    values = samples(BacklogCollector(engine).collect())

    assert values.pop("database_scrape_duration_seconds") > 0
    for name in ("oldest_confirmation_seconds['queued']", "oldest_confirmation_seconds['needs_review']"):
        assert 499 < values.pop(name) < 600
    for name in ("oldest_confirmation_seconds['retrying']", "overdue_seconds", "outbox_lag_seconds"):
        assert 499 < values.pop(name) < 600
    assert values == {
        "database_scrape_failed": 0,
        "confirmations['queued']": 3,
        "confirmations['confirming']": 0,
        "confirmations['retrying']": 2,
        "confirmations['pending']": 0,
        "oldest_confirmation_seconds['pending']": 0,
        "confirmations['needs_review']": 1,
        "oldest_confirmation_seconds['confirming']": 0,
        "outbox_events": 3,
        "oldest_transaction_seconds": 0,
        "batch_items['1', 'waiting']": 1,
        "batch_items['1', 'running']": 1,
        "batch_items['1', 'ended']": 2,
        "pauses['all']": 1,
        "pauses['partner']": 2,
    }


def test_ended_rows_are_not_read(postgresql_url: str) -> None:
    engine = database.connect(postgresql_url)
    with engine.begin() as connection:
        ended = confirmations(connection, State.CONFIRMED, 1)
        confirmations(connection, State.RETRYING, 5)
        connection.execute(insert(OutboxEvent), [event_row(ended[0], published=True)])
        connection.execute(insert(Batch), [batch_row(BatchState.RUNNING, 20_000)])
        copy(connection, "confirmations", 20_000, "id, offer_id", "gen_random_uuid(), 'offer-' || n")
        copy(connection, "outbox", 20_000, "id, sequence", "gen_random_uuid(), n + 1")
        connection.execute(
            text(
                "insert into batch_items (batch_id, position, confirmation_id, fed_at, ended_at)"
                " select 1, row_number() over (), id, now(), now() from confirmations where state = 'confirmed'"
            )
        )
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("vacuum analyze"))

    with engine.begin() as connection, explained(connection) as plans:
        read = read_backlog(connection)

    engine.dispose()
    assert read["confirmations"]["retrying",] == 5
    assert len(plans) >= 7
    scans = [line.strip() for plan in plans for line in plan if "Seq Scan" in line]
    small = (" on batches ", " on pauses", " on pg_")
    assert [scan for scan in scans if not any(table in scan for table in small)] == []


def copy(connection: Connection, table: str, number: int, changed: str, values: str) -> None:
    """Copies the one ended row of a table, with some columns changed."""
    names = connection.execute(text(f"select * from {table} limit 0")).keys()
    kept = ", ".join(f'"{name}"' for name in names if name not in changed.split(", "))
    ended = "where state = 'confirmed'" if table == "confirmations" else ""
    connection.execute(
        text(
            f"insert into {table} ({changed}, {kept}) select {values}, {kept}"
            f" from (select * from {table} {ended} limit 1) as template, generate_series(1, {number}) as n"
        )
    )


@contextmanager
def explained(connection: Connection) -> Iterator[list[list[str]]]:
    """The plans of all statements executed in this context."""
    plans: list[list[str]] = []

    def explain(_connection: Any, cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        with cursor.connection.cursor() as other:
            other.execute(f"EXPLAIN {statement}", parameters)
            plans.append([line for (line,) in other.fetchall()])

    event.listen(connection, "before_cursor_execute", explain)
    yield plans
    event.remove(connection, "before_cursor_execute", explain)


def test_an_unavailable_database_is_shown_and_nothing_else() -> None:
    engine = database.connect(f"postgresql+psycopg://postgres@127.0.0.1:{free_port()}/none")

    assert samples(BacklogCollector(engine).collect()) == {"database_scrape_failed": 1}


def test_a_database_that_does_not_answer_is_not_waited_for(
    postgresql_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last values are shown until they are stale."""
    engine = database.connect(postgresql_url)
    collector = BacklogCollector(engine)

    def holds(condition: Callable[[dict[str, float]], bool]) -> bool:
        return condition(samples(collector.collect()))

    with engine.connect() as other:
        until(lambda: holds(lambda now: now["database_scrape_failed"] == 0 and now["outbox_events"] == 0))
        monkeypatch.setattr(backlog_metrics, "TIMEOUT", 0.3)
        monkeypatch.setattr(backlog_metrics, "MIN_AGE", 0.0)
        other.execute(text("lock table outbox in access exclusive mode"))
        until(lambda: holds(lambda now: now["database_scrape_failed"] == 1))
        assert holds(lambda now: now["outbox_events"] == 0)
        monkeypatch.setattr(backlog_metrics, "MAX_AGE", 0.0)
        assert holds(lambda now: "outbox_events" not in now)
        monkeypatch.undo()
        other.rollback()

    until(lambda: holds(lambda now: now["database_scrape_failed"] == 0 and now["outbox_events"] == 0))
    engine.dispose()
