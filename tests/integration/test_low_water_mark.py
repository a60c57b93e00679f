"""The low-water mark of a queue: it passes what has ended, and finds what appears below it."""

import time

import pytest
from sqlalchemy import select, update

from models.tables import OutboxEvent
from tests.support.confirming import run
from worker.runtime import Runtime
from worker.services.outbox_relay import _OLDEST
from worker.storage import low_water_mark
from worker.storage.database import now_plus, seconds_since
from worker.storage.low_water_mark import BEGINNING, LowWaterMark


def age(runtime: Runtime, mark: LowWaterMark) -> float:
    """Seconds from the mark to now."""
    with runtime.engine.connect() as connection:
        at = mark.read(connection)
        return float(connection.execute(select(seconds_since(at))).scalar_one()) if at != BEGINNING else float("inf")


def change(runtime: Runtime, **values: object) -> None:
    with runtime.engine.begin() as connection:
        connection.execute(update(OutboxEvent).values(**values))


def test_the_mark_passes_what_has_ended_and_looks_back(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [time.monotonic()]
    monkeypatch.setattr(low_water_mark.time, "monotonic", lambda: clock[0])
    run(runtime)
    change(runtime, created_at=now_plus(-900.0), published_at=None)
    mark = LowWaterMark(_OLDEST)
    assert age(runtime, mark) == pytest.approx(900.0, abs=5.0)

    change(runtime, published_at=now_plus(0.0))
    clock[0] += low_water_mark.ADVANCE_EVERY
    assert age(runtime, mark) == pytest.approx(5.0, abs=4.0)

    change(runtime, published_at=None)  # as a transaction that took long commits it
    clock[0] += low_water_mark.LOOK_BACK_EVERY
    assert age(runtime, mark) == pytest.approx(900.0, abs=5.0)


def test_an_event_that_was_set_aside_holds_nothing_up(runtime: Runtime) -> None:
    run(runtime)
    change(runtime, created_at=now_plus(-900.0), published_at=None, claimed_until=now_plus(60.0))

    assert age(runtime, LowWaterMark(_OLDEST)) == pytest.approx(5.0, abs=4.0)

    change(runtime, claimed_until=now_plus(20.0))  # may come due before the next look back
    assert age(runtime, LowWaterMark(_OLDEST)) == pytest.approx(900.0, abs=5.0)
