"""Sequences of events after a database that lost its last commits: consumers take each new event for a new one."""

import time

import pytest
from sqlalchemy import select, update

from models.tables import Confirmation, OutboxEvent, Server
from tests.support.confirming import only, rows, run
from tests.support.servers import PostgreSQL
from worker.runtime import Runtime
from worker.storage import sequence_floor
from worker.storage.sequence_floor import EPOCH, MIN_STEP, note_server

on_postgresql = pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)


def promote(runtime: Runtime) -> None:
    """As far as the tables show it: the server that events were written on is another one."""
    with runtime.engine.begin() as connection:
        connection.execute(update(Server).values(name=Server.name + "of the past"))


def test_events_count_from_1_until_a_server_is_another_one(runtime: Runtime) -> None:
    run(runtime, "offer-1")
    run(runtime, "offer-2")
    assert [event.sequence for event in rows(runtime, OutboxEvent)] == [1, 1]
    seconds = int(time.time() - EPOCH.timestamp())

    promote(runtime)
    run(runtime, "offer-3")
    run(runtime, "offer-4")

    first, second = [event.sequence for event in rows(runtime, OutboxEvent)][2:]
    assert seconds <= first - 1 <= seconds + 60
    assert second == first, "each confirmation counts for itself"
    assert [row.sequence for row in rows(runtime, Confirmation)] == [1, 1, first, first]


def test_floors_grow_though_the_clock_is_set_back(runtime: Runtime) -> None:
    ahead = int(time.time() - EPOCH.timestamp()) + 1_000_000_000
    with runtime.engine.begin() as connection:
        connection.execute(update(Server).values(sequence_floor=ahead))
    promote(runtime)
    with runtime.engine.begin() as connection:
        note_server(connection)
        note_server(connection)
        floors = connection.execute(select(Server.sequence_floor).order_by(Server.sequence_floor)).scalars().all()

    assert floors == [ahead, ahead + MIN_STEP]


@on_postgresql
def test_a_promoted_standby_is_another_server(postgresql: PostgreSQL, runtime: Runtime) -> None:
    """The name holds the timeline, which each promotion raises."""
    with runtime.engine.connect() as connection:
        name = connection.execute(select(sequence_floor.this_server())).scalar_one()
        identifier = connection.exec_driver_sql("select system_identifier from pg_control_system()").scalar_one()

    assert name == f"{identifier}/00000001"
    assert only(runtime, Server).name == name
