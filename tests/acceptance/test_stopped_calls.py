"""While calls to XONE are stopped, everything that a person may look at says so: for what, and since when."""

import json
from datetime import timedelta
from uuid import uuid4

import pytest
from sqlalchemy import Engine, insert, select, update

from models.states import State
from models.tables import WorkerVitals
from tasks.operations import workers
from tests.support.commands import run
from tests.support.stored import fail
from tests.support.system import System, job, until
from worker.cli.ui.batch_progress import Pace, read_progress
from worker.storage.database import now_plus


@pytest.mark.slow
@pytest.mark.parametrize("pool", ["threads", "prefork"])
def test_an_open_circuit_breaker_is_shown_everywhere(system: System, pool: str) -> None:
    url, settings = system.database_url, system.environment
    fail(url, settings["DATA_KEYS"], ["again"])
    system.sandbox.status_for_all = 502
    system.start_worker(WORKER_POOL=pool, WORKER_CONCURRENCY="8")
    system.publish(job(f"offer-{number}") for number in range(12))

    def stopped() -> str:
        with system.engine.connect() as connection:
            rows = workers.running(connection)
        return "; ".join(map(str, workers.stopped_calls(rows)))

    sentence = until(stopped)
    assert sentence.startswith("calls to XONE stopped since ")
    assert "(http-502), one probe every " in sentence

    reprocessed = run("reprocess", "--yes", DATABASE_URL=url)
    assert reprocessed.returncode == 0, reprocessed.stderr
    _, why = read_progress(system.engine, 1, Pace())
    assert why.startswith("Calls to XONE stopped since ")
    for command in (["failed"], ["show", "offer-11"], ["doctor"], ["health"]):
        done = run(*command, **{**settings, "COLUMNS": "200"})
        assert "calls to XONE stopped since " in done.stdout, (command, done.stdout, done.stderr)
        assert "(http-502), one probe every " in done.stdout
        assert "a worker takes it next" not in done.stdout
    (worker,) = json.loads(run("health", "--json", **settings).stdout)["workers"]
    assert (worker["well"], [stop["code"] for stop in worker["stopped"]]) == (True, ["http-502"])

    run("pause", "--reason", "maintenance", DATABASE_URL=url)
    until(lambda: "calls to XONE paused for all partners since" in run("health", **settings).stdout)
    run("resume", DATABASE_URL=url)
    system.sandbox.status_for_all = None
    until(lambda: system.states() == {State.CONFIRMED: 13})
    until(lambda: not stopped())
    until(lambda: "XONE" not in run("health", **settings).stdout)
    system.workers[0].stop()
    with system.engine.connect() as connection:
        assert connection.execute(select(WorkerVitals.id)).all() == []


def test_of_several_workers_it_is_said_how_many(engine: Engine) -> None:
    stop = {"code": "http-429", "seconds": 60.0, "ends_in": 9.5}
    with engine.begin() as connection:
        for number, stops in enumerate([[], [stop], []]):
            row = {"id": uuid4(), "worker_id": uuid4(), "host": "host", "pid": number, "version": "1"}
            times = {"started_at": now_plus(number), "seen_at": now_plus(0.0)}
            connection.execute(insert(WorkerVitals).values(**row, **times, vitals={"stops": stops}))
    with engine.begin() as connection:
        connection.execute(update(WorkerVitals).where(WorkerVitals.pid == 2).values(seen_at=now_plus(-31.0)))
        rows = workers.running(connection)

    (stopped,) = workers.stopped_calls(rows)
    assert not stopped.is_total
    assert str(stopped).endswith(", in 1 of 2 workers")
    seen_at = rows[1].seen_at
    assert (stopped.since, stopped.until) == (seen_at - timedelta(seconds=60), seen_at + timedelta(seconds=9.5))
