"""The rate limit that all workers share through the database."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import Engine, update

from models.tables import RateLimit
from worker.storage import database
from worker.storage.database import now_plus
from worker.storage.rate_limiter import MAX_WAIT, reserve_slot


def take(engine: Engine, rate: float) -> float | None:
    with engine.begin() as connection:
        return reserve_slot(connection, rate)


def test_turns_are_a_step_apart(engine: Engine) -> None:
    waits = [take(engine, 2.0) for _ in range(6)]

    assert [wait is not None and round(wait, 1) for wait in waits] == [
        pytest.approx(0.5 * number, abs=0.3) for number in range(6)
    ]


def test_turns_beyond_the_horizon_are_not_given_out(engine: Engine) -> None:
    waits = [take(engine, 2.0) for _ in range(20)]

    given = [wait for wait in waits if wait is not None]
    assert max(given) <= MAX_WAIT + 0.5
    assert waits[-1] is None
    assert len(given) == pytest.approx(2 * MAX_WAIT + 1, abs=1)


def test_time_that_passed_unused_is_not_saved_up(engine: Engine) -> None:
    take(engine, 2.0)
    with engine.begin() as connection:
        connection.execute(update(RateLimit).values(next_at=now_plus(-100.0)))

    assert [round(take(engine, 2.0) or 0.0, 1) for _ in range(3)] == pytest.approx([0.0, 0.5, 1.0], abs=0.3)


def test_no_turn_is_given_out_twice(database_url: str) -> None:
    engines = [database.connect(database_url) for _ in range(2)]
    with ThreadPoolExecutor(8) as pool:
        waits = list(pool.map(lambda number: take(engines[number % 2], 100.0), range(200)))
    for engine in engines:
        engine.dispose()

    assert None not in waits
    assert max(wait for wait in waits if wait is not None) > 0.5, "200 turns at 100 a second reach far ahead"
