"""Every command that changes something writes an audit row: who, when, what, why, how many."""

import json
import os
import pwd
import socket
from datetime import UTC, datetime, timedelta
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from cryptography.fernet import Fernet
from sqlalchemy import select, update

from models.states import State
from models.tables import AuditEntry, Confirmation, OutboxEvent
from tests.support.command_tree import COMMANDS
from tests.support.queues import dead_letter, put
from tests.support.stored import fail
from tests.support.system import job
from worker.cli.app import cli
from worker.storage import database
from worker.storage.database import now

pytestmark = pytest.mark.slow

WHY = "ticket 7"
# "demo" has its own database, and a worker does what was decided elsewhere.
CHANGE_NOTHING = {
    ("audit",), ("batch", "show"), ("batches",), ("broker", "declare"), ("confirmations",), ("db", "check"),
    ("dead-letters", "list"), ("demo",), ("doctor",), ("events", "show"), ("failed",), ("health",), ("keygen",),
    ("sandbox",), ("schema", "asyncapi"), ("schema", "event"), ("schema", "job"), ("show",), ("worker",),
}  # fmt: skip
NEED_XONE = {("reconcile",), ("refresh",)}  # audited, too: test_reconcile.py, test_follow_up.py


def test_each_command_that_changes_something_is_audited(broker_url: str, tmp_path: Path) -> None:
    url, keys = f"sqlite:///{tmp_path}/confirm-offer.db", Fernet.generate_key().decode()
    settings = {"DATABASE_URL": url, "BROKER_URL": broker_url, "DATA_KEYS": keys}
    engine = database.connect(url)
    commands_run: set[tuple[str, ...]] = set()

    def run(*command: str) -> None:
        done = CliRunner().invoke(cli, command, env=settings)
        assert done.exit_code == 0, done.output
        commands_run.add(next(path for n in (2, 1) if (path := command[:n]) in COMMANDS))

    run("db", "upgrade")
    fail(url, keys, ["a", "b"])
    fail(url, keys, ["c", "d"], state=State.NEEDS_REVIEW)
    (tmp_path / "jobs.jsonl").write_text("".join(json.dumps(job(f"offer-{n}")) + "\n" for n in range(3)))
    put(broker_url, [dead_letter(n, b"{}") for n in range(2)])

    run("enqueue", str(tmp_path / "jobs.jsonl"), "--reason", WHY)
    run("dead-letters", "replay", "--limit", "1", "--yes", "--reason", WHY)
    run("dead-letters", "drop", "--yes", "--reason", WHY)
    run("pause", "--reason", WHY)
    run("resume", "--reason", WHY)
    run("reprocess", "--yes", "--reason", WHY)
    run("batch", "pause", "1", "--reason", WHY)
    run("batch", "resume", "1", "--reason", WHY)
    run("batch", "cancel", "1", "--reason", WHY)
    run("resolve", "c", "--partner", "P-100", "--failed", "not booked", "--reason", WHY)
    with engine.begin() as connection:
        connection.execute(update(OutboxEvent).values(published_at=now()))
    run("events", "replay", "--since", "1h", "--yes", "--reason", WHY)
    run("rekey", "--reason", WHY)
    with engine.begin() as connection:
        connection.execute(update(Confirmation).where(Confirmation.state == State.NEEDS_REVIEW).values(state="failed"))
    run("purge", "--older-than", "0s", "--yes", "--reason", WHY)
    run("erase", "--email", "ada@example.com", "--yes", "--reason", WHY)
    run("withdraw", "e", "--partner", "P-100", "--yes", "--reason", WHY)

    assert COMMANDS.keys() - CHANGE_NOTHING - NEED_XONE - groups() == commands_run
    with engine.connect() as connection:
        rows = connection.execute(select(AuditEntry.__table__).order_by(AuditEntry.id)).all()
    engine.dispose()
    assert [(row.command, row.reason, row.count) for row in rows] == [
        ("db upgrade", None, 1),
        ("enqueue", WHY, 3),
        ("dead-letters replay", WHY, 1),
        ("dead-letters drop", WHY, 1),
        ("pause", WHY, 1),
        ("resume", WHY, 1),
        ("reprocess", WHY, 2),
        ("batch paused", WHY, 1),
        ("batch running", WHY, 1),
        ("batch cancelled", WHY, 1),
        ("resolve", WHY, 1),
        ("events replay", WHY, 1),
        ("rekey", WHY, 0),
        ("purge", WHY, 4),
        ("erase", WHY, 0),
        ("withdraw", WHY, 1),
    ]
    for row in rows:
        assert row.by.startswith(f"{pwd.getpwuid(os.geteuid()).pw_name}@")
        assert abs(datetime.now(UTC) - row.at) < timedelta(minutes=5)
        assert "ada" not in json.dumps(row.details)


def groups() -> set[tuple[str, ...]]:
    return {path for path, command in COMMANDS.items() if isinstance(command, click.Group)}


def test_the_name_is_the_systems_and_the_claimed_one_is_kept_beside_it(
    broker_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOGNAME", "somebody-else")
    settings = {"DATABASE_URL": f"sqlite:///{tmp_path}/confirm-offer.db", "BROKER_URL": broker_url}
    for command in (["db", "upgrade"], ["pause", "--reason", "x", "--by", "Ana"], ["resume"]):
        assert CliRunner().invoke(cli, command, env=settings).exit_code == 0
    refused = CliRunner().invoke(cli, ["resume", "--by", "\x1b[31m"], env=settings)

    with database.connect(settings["DATABASE_URL"]).connect() as connection:
        names = list(connection.execute(select(AuditEntry.by).order_by(AuditEntry.id)).scalars())
    user = f"{pwd.getpwuid(os.geteuid()).pw_name}@{socket.gethostname()}"
    assert names == [user, f"Ana ({user})", user]
    assert refused.exit_code == 2
