"""Operations from outside: see what failed and why, reprocess it, pause and resume."""

import csv
import json
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from cryptography.fernet import Fernet
from sqlalchemy import Engine, select, update

from models.states import State
from models.tables import AuditEntry, Confirmation
from tasks.operations.batches import progress
from tests.support.commands import environment_of, on_a_terminal, run
from tests.support.stored import fail
from tests.support.system import PROJECT, System, job, until
from worker.cli.app import cli
from worker.cli.ui.batch_progress import Pace, read_progress
from worker.storage import database

pytestmark = pytest.mark.slow

BATCH_KEYS = {
    "id", "state", "reason", "by", "created_at", "ended_at", "total", "waiting", "running", "confirmed", "failed",
    "skipped", "rate",
}  # fmt: skip


def run_json(url: str, *arguments: str) -> Any:
    """Runs a command with --json. Returns what it prints."""
    done = run(*arguments, "--json", DATABASE_URL=url)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def run_here(url: str, *arguments: str) -> Result:
    """Runs a command in this process, which is faster."""
    return CliRunner().invoke(cli, arguments, env={"DATABASE_URL": url})


def batch_of(engine: Engine, batch_id: int) -> dict[str, Any]:
    with engine.connect() as connection:
        batch = progress(connection, batch_id)
        assert batch is not None
        return asdict(batch)


def audit_of(engine: Engine) -> list[tuple[str, str | None, int]]:
    with engine.connect() as connection:
        rows = connection.execute(
            select(AuditEntry.command, AuditEntry.reason, AuditEntry.count).order_by(AuditEntry.id)
        )
        return [tuple(row) for row in rows]


def calls_of(system: System) -> Counter[str]:
    return Counter(call.offer_id for call in system.sandbox.calls)


def fail_many(system: System, number: int) -> list[str]:
    offers = [f"offer-{count}" for count in range(number)]
    fail(system.database_url, system.environment["DATA_KEYS"], offers)
    return offers


def until_ended(system: System, batch_id: int, seconds: float = 40.0) -> dict[str, Any]:
    def has_ended() -> bool:
        return batch_of(system.engine, batch_id)["state"] in ("done", "cancelled")

    until(has_ended, seconds)
    return batch_of(system.engine, batch_id)


def test_after_an_outage_one_group_is_reprocessed_and_the_other_fails_again(system: System) -> None:
    url, sandbox = system.database_url, system.sandbox
    system.start_worker()
    sandbox.status_for_all = 422
    outage = [f"offer-{number}" for number in range(12)]
    system.publish(job(offer) for offer in outage)
    system.publish(job(f"gone-{number}~http-404", partner_id="P-200") for number in range(2))
    until(lambda: system.states() == {State.FAILED: 14})
    sandbox.status_for_all = None

    (group,) = run_json(url, "failed")["groups"]
    assert set(group) == {
        "code", "http_status", "detail", "count", "partners", "first_seen", "last_seen", "sample",
    }  # fmt: skip
    assert (group["code"], group["http_status"], group["count"]) == ("http-422", 422, 14)
    assert group["detail"].endswith(": this offer has expired")
    assert group["partners"] == ["P-100", "P-200"]
    assert group["first_seen"] <= group["last_seen"]
    assert group["last_seen"].endswith("Z")

    reprocess = "reprocess --partner P-100 --code http-422 --rate 50 --reason fixed --follow"
    code, shown = on_a_terminal(url, *reprocess.split(), answer="y\n")
    assert code == 0, shown
    assert "Try 12 confirmations again at 50 a second? [y/N]" in shown
    assert "Batch 1 is done: 12 confirmed." in shown
    assert {offer: calls_of(system)[offer] for offer in outage} == dict.fromkeys(outage, 2)
    assert set(calls_of(system).values()) == {1, 2}

    again = run("reprocess", "--yes", "--follow", DATABASE_URL=url)
    assert again.returncode == 1
    assert "Batch 2 is done: 0 confirmed, 2 failed again." in again.stdout
    assert max(len(line) for line in again.stdout.splitlines()) <= 80
    assert "\x1b" not in again.stdout
    newest, first = run_json(url, "batches")["batches"]
    assert set(newest) == BATCH_KEYS
    assert (newest["id"], newest["failed"], newest["rate"]) == (2, 2, None)
    assert (first["state"], first["reason"], first["confirmed"], first["rate"]) == ("done", "fixed", 12, 50)
    assert [group["code"] for group in run_json(url, "failed")["groups"]] == ["http-404"]
    assert audit_of(system.engine) == [("reprocess", "fixed", 12), ("reprocess", None, 2)]
    assert len(system.until_events(14 + 12 + 2)) == 28


def test_a_batch_survives_its_workers_and_each_item_is_done_once(system: System) -> None:
    offers = fail_many(system, 80)
    system.sandbox.latency = 0.2
    worker = system.start_worker(WORKER_CONCURRENCY="16")
    batch = run_json(system.database_url, "reprocess", "--yes")
    assert set(batch) == BATCH_KEYS
    until(lambda: 10 <= len(system.sandbox.bookings) <= 60)

    worker.kill()
    assert batch_of(system.engine, batch["id"])["state"] == "running"
    system.end_leases()
    with system.engine.begin() as connection:  # as if the minute had passed after which messages are dispatched again
        connection.execute(update(Confirmation).values(dispatched_until=None))
    system.start_worker()

    ended = until_ended(system, batch["id"])
    assert (ended["confirmed"], ended["skipped"], ended["failed"]) == (80, 0, 0)
    assert system.states() == {State.CONFIRMED: 80}
    assert {offer for _, offer in system.sandbox.bookings} == set(offers)
    assert system.sandbox.overlapping == set()
    events = system.until_events(80)
    assert Counter(event["data"]["offer_id"] for event in events) == dict.fromkeys(offers, 1)


def test_a_batch_is_paused_resumed_and_cancelled(system: System) -> None:
    url = system.database_url
    fail_many(system, 60)
    system.start_worker()
    assert run("reprocess", "--yes", "--rate", "3", DATABASE_URL=url).returncode == 0
    until(lambda: system.states()[State.CONFIRMED] >= 2)

    assert run_json(url, "batch", "pause", "1")["state"] == "paused"
    until(lambda: system.states()[State.QUEUED] + system.states()[State.CONFIRMING] == 0)
    when_paused = batch_of(system.engine, 1)
    resumed = run("batch", "resume", "1", DATABASE_URL=url)
    assert resumed.stdout.startswith(f"Batch 1 is running: {when_paused['confirmed']} confirmed, "), "no item was fed"
    until(lambda: system.states()[State.CONFIRMED] > when_paused["confirmed"])
    cancelled = run("batch", "cancel", "1", "--reason", "enough", DATABASE_URL=url)
    until(lambda: system.states()[State.QUEUED] + system.states()[State.CONFIRMING] == 0)

    assert cancelled.stdout.startswith("Batch 1 is cancelled: ")
    rows = list(csv.DictReader(run("batch", "show", "1", "--csv", DATABASE_URL=url).stdout.splitlines()))
    outcomes = Counter(row["outcome"] for row in rows)
    assert set(outcomes) == {"confirmed", "cancelled"}
    assert outcomes["cancelled"] == system.states()[State.FAILED]
    ended = run("batch", "resume", "1", DATABASE_URL=url)
    assert ended.returncode == 1
    assert ended.stderr.startswith("confirm-offer: batch 1 has ended: it is cancelled since ")
    assert run("batch", "pause", "7", DATABASE_URL=url).stderr.startswith("confirm-offer: there is no batch 7;")
    assert [command for command, _, _ in audit_of(system.engine)] == [
        "reprocess", "batch paused", "batch running", "batch cancelled",
    ]  # fmt: skip


def test_two_batches_of_the_same_offers_do_the_work_once(system: System) -> None:
    offers = fail_many(system, 30)
    batches = [run_json(system.database_url, "reprocess", "--yes")["id"] for _ in range(2)]
    system.start_worker()
    ended = [until_ended(system, batch_id) for batch_id in batches]

    assert sum(batch["confirmed"] for batch in ended) == 30
    assert sum(batch["skipped"] for batch in ended) == 30
    assert calls_of(system) == dict.fromkeys(offers, 1)


def test_a_pause_outlasts_a_restart_until_resume(system: System) -> None:
    url = system.database_url
    paused = run("pause", "--reason", "XONE's maintenance", DATABASE_URL=url)
    assert "Calls to XONE are paused for all partners." in paused.stdout
    run_json(url, "pause", "--partner", "P-200", "--reason", "they asked")
    system.start_worker()
    system.publish(job(f"offer-{number}") for number in range(30))
    system.publish(job(f"offer-{number}", partner_id="P-200") for number in range(5))
    until(lambda: system.states() == {State.QUEUED: 35})

    shown = run("failed", DATABASE_URL=url).stdout
    assert "Nothing has failed." in shown
    assert "35 wait to be tried, the oldest since " in shown
    assert "XONE's maintenance" in shown
    with system.engine.connect() as connection:
        assert set(connection.execute(select(Confirmation.attempts)).scalars()) == {0}
    assert system.sandbox.calls == []
    ended = run("resume", DATABASE_URL=url)
    assert "partner P-200" in ended.stdout
    system.until_events(30)
    assert {call.partner_id for call in system.sandbox.calls} == {"P-100"}
    assert system.states() == {State.CONFIRMED: 30, State.QUEUED: 5}

    assert run_json(url, "resume", "--partner", "P-200") == {"changed": True, "paused": []}
    assert run_json(url, "resume") == {"changed": False, "paused": []}
    system.until_events(35)
    assert calls_of(system) == {**{f"offer-{n}": 2 for n in range(5)}, **{f"offer-{n}": 1 for n in range(5, 30)}}
    assert [entry[:2] for entry in audit_of(system.engine)[:3]] == [
        ("pause", "XONE's maintenance"), ("pause", "they asked"), ("resume", None),
    ]  # fmt: skip


@pytest.fixture
def keys() -> str:
    return Fernet.generate_key().decode()


@pytest.fixture
def failures(sqlite_url: str, keys: str) -> Iterator[tuple[str, Engine]]:
    fail(sqlite_url, keys, ["a", "b", "c"])
    fail(sqlite_url, keys, ["old"], code="timeout", age=7200.0)
    fail(sqlite_url, keys, ["review"], code="timeout", state=State.NEEDS_REVIEW)
    fail(sqlite_url, keys, ["fine"], state=State.CONFIRMED, error_code=None, error_detail=None)
    engine = database.connect(sqlite_url)
    yield sqlite_url, engine
    engine.dispose()


def test_reprocess_changes_nothing_without_a_confirmation(failures: tuple[str, Engine]) -> None:
    url, engine = failures

    plan = run_here(url, "reprocess", "--dry-run")
    unconfirmed = run("reprocess", "--code", "http-422", DATABASE_URL=url)
    nothing = run_here(url, "reprocess", "--code", "http-418", "--yes")
    with_both_filters = run_here(url, "reprocess", "--code", "http-422", "--offers", "-")
    code, shown = on_a_terminal(url, "reprocess", answer="n\n")

    assert plan.exit_code == 0
    assert "4 confirmations, 2 causes" in plan.stdout
    assert unconfirmed.returncode == 2
    assert unconfirmed.stderr.splitlines()[-1].endswith("add --yes")
    assert (nothing.exit_code, nothing.stdout) == (0, "Nothing matches; nothing was changed.\n")
    assert with_both_filters.exit_code == 2
    assert code == 1
    assert "nothing was changed" in shown
    assert json.loads(run_here(url, "batches", "--json").stdout) == {"batches": []}
    assert audit_of(engine) == []


def test_failures_are_filtered_listed_and_exported(failures: tuple[str, Engine]) -> None:
    url, _ = failures

    listed = json.loads(run_here(url, "failed", "--list", "--since", "1h", "--json").stdout)["confirmations"]
    as_csv = list(csv.DictReader(run_here(url, "failed", "--list", "--csv", "--until", "1h").stdout.splitlines()))
    text = run_here(url, "failed").stdout

    assert {row["offer_id"] for row in listed} == {"a", "b", "c"}
    assert [(row["offer_id"], row["code"], row["state"]) for row in as_csv] == [("old", "timeout", "failed")]
    assert "1 more waits for a review" in text
    assert max(map(len, text.splitlines())) <= 80
    assert run_here(url, "failed", "--since", "yesterday").exit_code == 2


@pytest.mark.parametrize(
    "content",
    [
        "a\nP-100 review\nP-200,b\ntypo\nfine\n",
        "\ufeffoffer_id,code,partner_id\r\na,x,\r\nreview,,P-100\r\nb,,P-200\r\ntypo,,\r\nfine,,\r\n",
        '{"offer_id": "a"}\n{"partner_id": "P-100", "offer_id": "review"}\n{"partner_id": "P-200", "offer_id": "b"}\n'
        '{"offer_id": "typo"}\n\n{"offer_id": "fine"}\n',
    ],
    ids=["words", "csv", "json"],
)
def test_offers_of_a_file_that_are_left_out_are_named(
    failures: tuple[str, Engine], content: str, tmp_path: Path
) -> None:
    url, engine = failures
    file = tmp_path / "offers"
    file.write_bytes(content.encode())

    done = run_here(url, "reprocess", "--offers", str(file), "--yes", "--json")

    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["total"] == 1
    assert done.stderr.splitlines() == [
        "left out: P-100 review: needs_review (--include-needs-review takes it)",
        "left out: P-200 b: unknown",
        "left out: typo: unknown",
        "left out: fine: confirmed",
    ]
    with engine.connect() as connection:
        details = connection.execute(select(AuditEntry.details)).scalar_one()
    assert details["offers"] == 5


def test_an_invalid_line_of_a_file_is_named(failures: tuple[str, Engine]) -> None:
    url, engine = failures

    done = run("reprocess", "--offers", "-", "--yes", stdin="a\nP-100 b c\n", DATABASE_URL=url)

    assert (done.returncode, done.stderr) == (2, "confirm-offer: line 2 of the file of offers names no offer\n")
    assert audit_of(engine) == []


def test_interrupting_follow_does_not_stop_the_batch(failures: tuple[str, Engine], tmp_path: Path) -> None:
    url, _ = failures
    shown = tmp_path / "shown"
    with shown.open("w") as output:
        program = subprocess.Popen(
            [sys.executable, "-m", "worker", "reprocess", "--yes", "--follow"],
            env=environment_of(url), cwd=PROJECT, stdout=output, stderr=output,
        )  # fmt: skip
        until(lambda: "waiting 4" in shown.read_text())
        program.send_signal(signal.SIGINT)
        assert program.wait(20) == 1

    assert "Batch 1 goes on." in shown.read_text()
    assert "confirm-offer batch show 1 --follow" in shown.read_text()
    assert json.loads(run_here(url, "batch", "show", "1", "--json").stdout)["state"] == "running"


def test_follow_shows_a_pause_that_delays_the_batch(failures: tuple[str, Engine]) -> None:
    url, engine = failures
    assert run_here(url, "reprocess", "--yes").exit_code == 0

    run_here(url, "pause", "--partner", "P-7", "--reason", "they asked")
    _, of_another = read_progress(engine, 1, Pace())
    run_here(url, "pause", "--reason", "maintenance")
    _, of_all = read_progress(engine, 1, Pace())

    assert of_another == "No worker runs, or none has noted anything in this database for 30 s."
    assert of_all == "Calls to XONE are paused for all partners: maintenance"
