"""The rate limit that all workers share in the database."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import Engine, update

from models.tables import RateLimit
from worker.storage import database
from worker.storage.database import now_plus
from worker.storage.rate_limiter import MAX_WAIT, reserve_slot


def reserve(engine: Engine, rate: float) -> float | None:
    with engine.begin() as connection:
        return reserve_slot(connection, rate)


def test_slots_are_one_interval_apart(engine: Engine) -> None:
    waits = [reserve(engine, 2.0) for _ in range(6)]

    assert [wait is not None and round(wait, 1) for wait in waits] == [
        pytest.approx(0.5 * number, abs=0.3) for number in range(6)
    ]


def test_slots_beyond_the_maximum_wait_are_not_reserved(engine: Engine) -> None:
    waits = [reserve(engine, 2.0) for _ in range(20)]

    reserved = [wait for wait in waits if wait is not None]
    assert max(reserved) <= MAX_WAIT + 0.5
    assert waits[-1] is None
    assert len(reserved) == pytest.approx(2 * MAX_WAIT + 1, abs=1)


def test_unused_time_is_not_saved(engine: Engine) -> None:
    reserve(engine, 2.0)
    with engine.begin() as connection:
        connection.execute(update(RateLimit).values(next_at=now_plus(-100.0)))

    assert [round(reserve(engine, 2.0) or 0.0, 1) for _ in range(3)] == pytest.approx([0.0, 0.5, 1.0], abs=0.3)


def test_no_slot_is_reserved_twice(database_url: str) -> None:
    engines = [database.connect(database_url) for _ in range(2)]
    with ThreadPoolExecutor(8) as pool:
        waits = list(pool.map(lambda number: reserve(engines[number % 2], 100.0), range(200)))
    for engine in engines:
        engine.dispose()

    assert None not in waits
    assert max(wait for wait in waits if wait is not None) > 0.5, "200 slots at 100 per second reach far ahead"
