"""Batches: selected once, fed at a rate and within a bound, each item done once."""

import json
import math
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from threading import Event
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import Connection, Engine, select, text, update
from sqlalchemy.exc import DBAPIError

from models.states import BatchState, State
from models.tables import AuditEntry, Batch, BatchItem, Confirmation
from tasks import confirm
from tasks.due_times import DISPATCH_LEASE
from tasks.operations import batches, pauses
from tasks.operations.failures import Selection, match
from tests.support.confirming import rows
from tests.support.stored import insert_confirmation
from tests.support.system import job
from worker.messaging import broker, topology
from worker.runtime import Runtime
from worker.services.scheduler import FEEDING, Scheduler
from worker.settings import WorkerSettings
from worker.storage.database import now_plus
from worker.storage.pause_cache import ALL

BODY = json.dumps({name: job("any")[name] for name in ("quotes", "policyholder")}).encode()
DEFAULTS = {
    "state": State.FAILED,
    "error_code": "http-500",
    "partner_id": "P-100",
    "updated_at": now_plus(-60.0),
}


@pytest.fixture
def failed(runtime: Runtime) -> Callable[..., UUID]:
    """Makes a failed confirmation whose body can be decrypted."""

    def make(offer_id: str, **values: Any) -> UUID:
        confirmation_id = uuid4()
        body = runtime.encryption.encrypt(confirmation_id, "body", BODY)
        content = {"id": confirmation_id, "offer_id": offer_id, "sealed_body": body}
        return insert_confirmation(runtime.engine, **{**content, **DEFAULTS, **values})

    return make


def make_batch(runtime: Runtime, selection: Selection | None = None, rate: float | None = None) -> int:
    with runtime.engine.begin() as connection:
        selection_or_all = selection or Selection()
        ids = match(connection, selection_or_all).ids
        return batches.create(connection, ids, selection_or_all, "a test", "tester@here", rate)


def feed(runtime: Runtime, batch_id: int, limit: int = 100, paused: tuple[str, ...] = ()) -> list[UUID]:
    with runtime.engine.begin() as connection:
        return batches.feed(connection, batch_id, limit, paused, DISPATCH_LEASE)


def progress(runtime: Runtime, batch_id: int) -> dict[str, Any]:
    with runtime.engine.connect() as connection:
        batch = batches.progress(connection, batch_id)
        assert batch is not None
        return asdict(batch)


def make_attempt(runtime: Runtime, confirmation_id: UUID) -> None:
    lease = confirm.lease_due(confirmation_id, runtime)
    assert lease is not None
    confirm.attempt(lease, runtime)


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        (Selection(), {"a", "b", "c"}),
        (Selection(partner="P-200"), {"c"}),
        (Selection(code="http-422"), {"b"}),
        (Selection(limit=2), {"a", "b"}),
        (Selection(include_needs_review=True), {"a", "b", "c", "r"}),
        (Selection(offers=((None, "a"), ("P-100", "b"), ("P-100", "c"), (None, "nowhere"), (None, "ok"))), {"a", "b"}),
    ],
)
def test_a_batch_selects_failures(
    runtime: Runtime, failed: Callable[..., UUID], selection: Selection, expected: set[str]
) -> None:
    ids = {
        failed("a", updated_at=now_plus(-100.0)): "a",
        failed("b", error_code="http-422", updated_at=now_plus(-90.0)): "b",
        failed("c", partner_id="P-200", updated_at=now_plus(-80.0)): "c",
        failed("r", state=State.NEEDS_REVIEW): "r",
        failed("ok", state=State.CONFIRMED): "ok",
    }
    with runtime.engine.connect() as connection:
        assert {ids[id_] for id_ in match(connection, selection).ids} == expected


def test_items_are_fed_within_the_bound_and_end_with_their_confirmations(
    runtime: Runtime, failed: Callable[..., UUID]
) -> None:
    for number in range(5):
        failed(f"offer-{number}" + ("~http-422" if number == 4 else ""))
    batch_id = make_batch(runtime)

    first = feed(runtime, batch_id, limit=3)
    assert len(first) == 3
    assert Counter({"waiting": 2, "running": 3}).items() <= progress(runtime, batch_id).items()
    second = feed(runtime, batch_id, limit=100)
    for confirmation_id in [*first, *second]:
        make_attempt(runtime, confirmation_id)
    feed(runtime, batch_id)

    done = progress(runtime, batch_id)
    assert {name: done[name] for name in ("state", "waiting", "running", "confirmed", "failed", "skipped")} == {
        "state": BatchState.DONE, "waiting": 0, "running": 0, "confirmed": 4, "failed": 1, "skipped": 0,
    }  # fmt: skip
    assert done["ended_at"] is not None


def test_the_rate_is_kept_and_little_unused_time_is_saved(runtime: Runtime, failed: Callable[..., UUID]) -> None:
    for number in range(50):
        failed(f"offer-{number}")
    batch_id = make_batch(runtime, rate=10.0)
    assert feed(runtime, batch_id) == [], "a new batch has saved no time"

    with runtime.engine.begin() as connection:
        connection.execute(update(Batch).values(fed_until=now_plus(-60.0)))
    assert len(feed(runtime, batch_id)) == 10
    assert len(feed(runtime, batch_id)) <= 2


def test_a_confirmation_that_another_batch_took_up_is_skipped(runtime: Runtime, failed: Callable[..., UUID]) -> None:
    ids = [failed(f"offer-{number}") for number in range(3)]
    first, second = make_batch(runtime), make_batch(runtime)

    assert set(feed(runtime, first)) == set(ids)
    assert feed(runtime, second) == []
    feed(runtime, second)

    assert progress(runtime, second)["skipped"] == 3
    assert progress(runtime, second)["state"] == BatchState.DONE


def test_a_corrected_job_takes_its_confirmation_from_a_batch(runtime: Runtime, failed: Callable[..., UUID]) -> None:
    failed("offer-1")
    batch_id = make_batch(runtime)
    lease = confirm.accept_job(json.dumps(job("offer-1")).encode(), confirm.Delivery(), runtime)
    assert lease is not None

    assert feed(runtime, batch_id) == []
    assert progress(runtime, batch_id)["skipped"] == 1


def test_a_paused_or_cancelled_batch_is_not_fed(runtime: Runtime, failed: Callable[..., UUID]) -> None:
    for number in range(4):
        failed(f"offer-{number}")
    batch_id = make_batch(runtime)
    feed(runtime, batch_id, limit=1)
    with runtime.engine.begin() as connection:
        assert batches.move(connection, batch_id, BatchState.PAUSED, "tester@here")
    assert feed(runtime, batch_id) == []
    with runtime.engine.begin() as connection:
        assert batches.move(connection, batch_id, BatchState.RUNNING, "tester@here")
    assert len(feed(runtime, batch_id, limit=1)) == 1
    with runtime.engine.begin() as connection:
        assert batches.move(connection, batch_id, BatchState.CANCELLED, "tester@here")
        assert not batches.move(connection, batch_id, BatchState.RUNNING, "tester@here")
    assert feed(runtime, batch_id) == []

    with runtime.engine.connect() as connection:
        left = connection.execute(select(Confirmation.state).where(Confirmation.state == State.FAILED)).all()
        assert len(left) == 2
        commands = list(connection.execute(select(AuditEntry.command).order_by(AuditEntry.id)).scalars())
    assert commands == ["reprocess", "batch paused", "batch running", "batch cancelled"]


def test_needs_review_is_fed_only_on_request(runtime: Runtime, failed: Callable[..., UUID]) -> None:
    confirmation_id = failed("offer-1")
    batch_id = make_batch(runtime)
    with runtime.engine.begin() as connection:
        connection.execute(update(Confirmation).values(state=State.NEEDS_REVIEW))
    assert feed(runtime, batch_id) == []

    batch_with_review = make_batch(runtime, Selection(include_needs_review=True))

    assert feed(runtime, batch_with_review) == [confirmation_id]


def test_items_of_a_paused_partner_wait(runtime: Runtime, failed: Callable[..., UUID]) -> None:
    failed("offer-1")
    other = failed("offer-2", partner_id="P-200")
    batch_id = make_batch(runtime)

    assert feed(runtime, batch_id, paused=("P-100",)) == [other]
    assert progress(runtime, batch_id)["waiting"] == 1


def test_a_pause_keeps_jobs_as_rows_without_an_attempt(runtime: Runtime) -> None:
    with runtime.engine.begin() as connection:
        assert pauses.pause(connection, "P-100", "maintenance", "tester@here")
        assert not pauses.pause(connection, "P-100", "again", "tester@here")
    body = json.dumps(job("offer-1")).encode()

    assert confirm.accept_job(body, confirm.Delivery(), runtime) is None

    with runtime.engine.connect() as connection:
        row = connection.execute(select(Confirmation.__table__)).one()
    assert (row.state, row.attempts) == (State.QUEUED, 0)
    assert confirm.lease_due(row.id, runtime) is None
    with runtime.engine.begin() as connection:
        assert pauses.resume_calls(connection, "P-100", "tester@here") == ["P-100"]
    runtime.pauses._read_at = float("-inf")
    lease = confirm.lease_due(row.id, runtime)
    assert lease is not None
    assert lease.number == 1


def test_a_confirmation_is_one_item_of_a_batch(runtime: Runtime, failed: Callable[..., UUID]) -> None:
    failed("offer-1")
    batch_id = make_batch(runtime)
    with runtime.engine.connect() as connection:
        rows = connection.execute(select(BatchItem.position).where(BatchItem.batch_id == batch_id)).all()
    assert len(rows) == 1


def test_an_item_that_waits_for_its_retry_does_not_count_as_at_work(
    runtime: Runtime, failed: Callable[..., UUID]
) -> None:
    first, second = failed("offer-1~http-500~1"), failed("offer-2")
    batch_id = make_batch(runtime)
    assert set(feed(runtime, batch_id)) == {first, second}
    assert under_way(runtime) == (2, 2)

    make_attempt(runtime, first)
    assert under_way(runtime) == (2, 1), "one item waits for its retry"
    make_attempt(runtime, second)

    assert under_way(runtime) == (1, 0)
    assert progress(runtime, batch_id)["running"] == 1


def under_way(runtime: Runtime) -> tuple[int, int]:
    with runtime.engine.connect() as connection:
        return tuple(batches.under_way(connection))


@pytest.mark.parametrize("rate", [0.1, 0.3, 49.0])
def test_the_lowest_rate_feeds_items(runtime: Runtime, failed: Callable[..., UUID], rate: float) -> None:
    failed("offer-1")
    batch_id = make_batch(runtime, rate=rate)
    with runtime.engine.begin() as connection:
        connection.execute(update(Batch).values(fed_until=now_plus(-1.01 / rate)))

    assert len(feed(runtime, batch_id)) == 1


def test_the_duration_of_a_feed_does_not_lower_the_rate(runtime: Runtime, failed: Callable[..., UUID]) -> None:
    for number in range(10):
        failed(f"offer-{number}")
    batch_id = make_batch(runtime, rate=100.0)
    with runtime.engine.begin() as connection:
        connection.execute(update(Batch).values(fed_until=now_plus(-0.025)))
    with runtime.engine.connect() as connection:
        before = connection.execute(select(Batch.fed_until)).scalar_one()
    fed = len(feed(runtime, batch_id))
    with runtime.engine.connect() as connection:
        after = connection.execute(select(Batch.fed_until)).scalar_one()

    assert fed >= 2
    assert abs((after - before).total_seconds() - fed / 100.0) < 0.005


def test_a_pause_of_another_partner_does_not_keep_a_batch_open(runtime: Runtime, failed: Callable[..., UUID]) -> None:
    confirmation_id = failed("offer-1")
    batch_id = make_batch(runtime)
    feed(runtime, batch_id, paused=("P-200",))
    make_attempt(runtime, confirmation_id)
    feed(runtime, batch_id, paused=("P-200",))

    assert progress(runtime, batch_id)["state"] == BatchState.DONE


@pytest.mark.parametrize("rate", [math.inf, 1e300, 1e-300, math.nan])
def test_no_rate_that_is_stored_stops_the_scheduler(runtime: Runtime, failed: Callable[..., UUID], rate: float) -> None:
    """As an older version took them from people."""
    failed("offer")
    batch_id = make_batch(runtime)
    with runtime.engine.begin() as connection:
        connection.execute(update(Batch).values(rate=rate))

    for _ in range(3):
        feed(runtime, batch_id)


def test_a_batch_that_can_not_be_fed_stops_no_other(
    runtime: Runtime, failed: Callable[..., UUID], monkeypatch: pytest.MonkeyPatch
) -> None:
    failed("first")
    broken = make_batch(runtime)
    failed("second")
    sound = make_batch(runtime)
    real, reported = batches.feed, []

    def feed_sound(connection: Connection, batch_id: int, *others: Any) -> list[UUID]:
        if batch_id == broken:
            raise OverflowError
        return real(connection, batch_id, *others)

    monkeypatch.setattr(batches, "feed", feed_sound)
    monkeypatch.setattr("worker.services.scheduler.report", lambda _error, **facts: reported.append(facts["batch"]))
    scheduler = Scheduler(runtime)
    fed: list[UUID] = []
    for _ in range(3):
        scheduler._feed(fed, [broken, sound], 10, [])
    scheduler.close()

    assert len(fed) == 2
    assert reported == [broken]


def refuse_to_queue(engine: Engine, condition: str) -> None:
    """Lets the database refuse to put some confirmations back to ``queued``. condition: of ``new``."""
    when = f"when (new.state = 'queued' and {condition})"
    begins = "create trigger refuse before update on confirmations for each row"
    with engine.begin() as connection:
        if engine.dialect.name == "sqlite":
            connection.execute(text(f"{begins} {when} begin select raise(abort, 'no'); end"))
            return
        raising = "create function refuse() returns trigger language plpgsql as $$ begin raise 'no'; end $$"
        connection.execute(text(raising))
        connection.execute(text(f"{begins} {when} execute function refuse()"))


def test_one_item_that_the_database_refuses_stops_no_other(runtime: Runtime, failed: Callable[..., UUID]) -> None:
    for number in range(8):
        failed(f"offer-{number}")
    batch_id = make_batch(runtime)
    refuse_to_queue(runtime.engine, "new.offer_id like '%5%'")

    fed = feed(runtime, batch_id)

    refused = [row.offer_id for row in rows(runtime, Confirmation) if row.id not in fed]
    assert (len(fed), len(refused)) == (7, 1)
    assert "5" in refused[0]
    (item,) = [item for item in rows(runtime, BatchItem) if item.confirmation_id not in fed]
    assert item.outcome == "skipped"


def test_no_item_is_skipped_while_the_database_refuses_all(runtime: Runtime, failed: Callable[..., UUID]) -> None:
    for number in range(4):
        failed(f"offer-{number}")
    batch_id = make_batch(runtime)
    refuse_to_queue(runtime.engine, "1 = 1")

    with pytest.raises(DBAPIError):
        feed(runtime, batch_id)

    assert [item.ended_at for item in rows(runtime, BatchItem)] == [None] * 4


def test_the_scheduler_counts_retries_in_the_bound_of_batches(runtime: Runtime, failed: Callable[..., UUID]) -> None:
    runtime.worker_settings = WorkerSettings(WORKER_CONCURRENCY=8)  # at most 4 items of batches at work
    with broker.connect("memory://") as connection:
        topology.declare(connection)
    for number in range(12):
        failed(f"offer-{number}")
    batch_id = make_batch(runtime)
    scheduler = Scheduler(runtime)
    scheduler.run_once()
    assert under_way(runtime) == (4, 4)
    scheduler.run_once()
    assert under_way(runtime) == (4, 4)
    assert scheduler.interval == FEEDING, "there is more to feed soon"

    retrying = {"state": State.RETRYING, "dispatched_until": None, "due_at": now_plus(60.0)}
    with runtime.engine.begin() as connection:
        connection.execute(update(Confirmation).where(Confirmation.batch_id == batch_id).values(**retrying))
    scheduler.run_once()
    assert under_way(runtime) == (8, 4)
    with runtime.engine.begin() as connection:
        connection.execute(
            update(Confirmation).where(Confirmation.state == State.RETRYING).values(due_at=now_plus(-1.0))
        )
    scheduler.run_once()
    scheduler.close()

    assert under_way(runtime) == (8, 4), "retries that are due count in the bound as well"


def test_a_busy_worker_feeds_less(runtime: Runtime, failed: Callable[..., UUID]) -> None:
    runtime.worker_settings = WorkerSettings(WORKER_CONCURRENCY=20)  # at most 10 items of batches at work
    with broker.connect("memory://") as connection:
        topology.declare(connection)
    for number in range(30):
        failed(f"offer-{number}")
    make_batch(runtime)
    scheduler = Scheduler(runtime)

    scheduler.lag = 1.0
    scheduler.run_once()
    assert under_way(runtime) == (9, 9)
    scheduler.run_once()
    assert under_way(runtime) == (9, 9), "at most 8 may be at work, so none is fed"
    scheduler.lag = 0.0
    for _ in range(40):
        scheduler.run_once()
    scheduler.close()

    assert under_way(runtime) == (10, 10)


def test_all_threads_of_a_new_process_see_a_pause(runtime: Runtime) -> None:
    """While one thread reads the pauses for the first time, another thread must not take them for none."""
    with runtime.engine.begin() as connection:
        pauses.pause(connection, ALL, "maintenance", "tester@here")
    batch_with_review = Event()

    class SlowRead:
        def __init__(self, connection: Any) -> None:
            self._connection = connection

        def execute(self, query: Any) -> Any:
            batch_with_review.wait(10)
            return self._connection.execute(query)

    def is_paused_slowly() -> bool:
        with runtime.engine.connect() as connection:
            return runtime.pauses.is_paused(SlowRead(connection), "P-100")  # type: ignore[arg-type]

    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(is_paused_slowly)
        with runtime.engine.connect() as connection:
            is_paused = runtime.pauses.is_paused(connection, "P-100")
        batch_with_review.set()
        assert is_paused
        assert slow.result()
