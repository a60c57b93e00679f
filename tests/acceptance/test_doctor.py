"""``doctor``: each broken set-up is found, named, and told how to be mended; nothing changes, nothing secret shows."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import time_machine
from click.testing import CliRunner, Result
from cryptography.fernet import Fernet
from sqlalchemy import func, select, update

from models.states import State
from models.tables import AuditEntry, Base, Batch, Confirmation, OutboxEvent
from tests.support.certificates import Authority
from tests.support.commands import run
from tests.support.servers import PostgreSQL, RabbitMQ, free_port
from tests.support.system import PROJECT, System, job, until
from worker.cli.app import cli
from worker.doctor import finding
from worker.messaging import broker, topology
from worker.messaging.publisher import Message, Publisher
from worker.sandbox.server import Sandbox
from worker.settings import NAMES
from worker.storage import database

WIDTH = 80


def _finding(check: str, level: str, found: str, mend: str | None) -> finding.Finding:
    return finding.Finding(check, finding.Level(level), found, mend)


class Report:
    """What the doctor found with ``--json``."""

    def __init__(self, done: subprocess.CompletedProcess[str] | Result) -> None:
        self.code = done.returncode if isinstance(done, subprocess.CompletedProcess) else done.exit_code
        self.text = done.stdout
        assert done.stdout.startswith("{"), done.stderr
        content = json.loads(done.stdout)
        self.well = content["well"]
        self.findings = [_finding(**one) for one in content["findings"]]

    def bad(self) -> dict[str, str]:
        """check: level, what was found, what to do."""
        return {
            one.check: f"{one.level}: {one.message} → {one.remedy}"
            for one in self.findings
            if one.level != finding.Level.OK
        }

    def of(self, check: str) -> finding.Finding:
        return next(one for one in self.findings if one.check == check)


@pytest.fixture(autouse=True)
def _temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of the workers under test."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


@pytest.fixture
def settings(broker_url: str, postgresql_url: str, environment: dict[str, str], tmp_path: Path) -> dict[str, str]:
    """Of a whole system, in which no worker runs yet."""
    return {**environment, "BROKER_URL": broker_url, "DATABASE_URL": postgresql_url}


@pytest.fixture
def small(sqlite_url: str, environment: dict[str, str]) -> dict[str, str]:
    """Of a set-up without servers, quick to make, for what has nothing to do with them."""
    return {**environment, "BROKER_URL": "memory://", "DATABASE_URL": sqlite_url}


def examined(settings: dict[str, str], **changes: str) -> Report:
    """In this process, as it is quicker."""
    given = {**dict.fromkeys(NAMES), **settings, **changes}
    return Report(CliRunner().invoke(cli, ["doctor", "--json"], env=given))


NO_WORKER = {"jobs": "warning: nobody takes them, and 0 wait → confirm-offer worker (WORKER_PARTS must hold tasks)"}


# --- A set-up that is well ---


def test_all_is_well(system: System) -> None:
    system.publish([job("offer-1")])
    system.start_worker()
    system.until_events(1)

    report: Report = until(lambda: found if not (found := _report_of(system)).bad() else None, every=0.5)

    assert report.well
    assert report.code == 0
    assert {one.check for one in report.findings} == {
        "settings", "time-outs", "open files", "workers here", "Sentry", "database", "tables", "clock", "data keys",
        "due", "outbox", "broker", "queues", "jobs", "token",
    }  # fmt: skip
    assert report.of("jobs").message == "1 worker takes them, 0 wait"
    assert report.of("data keys").message == "the first opens the newest and the oldest that is stored"
    assert system.sandbox.token_requests >= 2


def _report_of(system: System) -> Report:
    return examined(system.environment)


def test_it_changes_nothing(settings: dict[str, str], sandbox: Sandbox, rabbitmq: RabbitMQ) -> None:
    """Not in the database, not in RabbitMQ; and XONE is asked for one token."""
    engine = database.connect(settings["DATABASE_URL"])
    with engine.connect() as connection:
        before = _content(connection)

    assert examined(settings).bad() == NO_WORKER

    with engine.connect() as connection:
        assert _content(connection) == before
    engine.dispose()
    with broker.connect(settings["BROKER_URL"]) as connection:
        for queue in topology.QUEUES:
            assert connection.default_channel.queue_declare(queue.name, passive=True).message_count == 0
    assert (sandbox.token_requests, len(sandbox.calls)) == (1, 0)


def _content(connection: Any) -> dict[str, int]:
    return {
        name: connection.execute(select(func.count()).select_from(table)).scalar_one()
        for name, table in Base.metadata.tables.items()
    }


def test_its_transactions_can_write_nothing(database_url: str) -> None:
    engine = database.read_only(database_url)
    with engine.connect() as connection, pytest.raises(Exception, match=r"read-?only"):
        connection.execute(update(Confirmation).values(attempts=1))
    engine.dispose()


def test_with_sqlite(settings: dict[str, str], sqlite_url: str) -> None:
    assert examined(settings, DATABASE_URL=sqlite_url).bad() == NO_WORKER


# --- Settings ---


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("BROKER_URL", "http://host", "BROKER_URL: should begin with amqp:"),
        ("BROKER_URL", "amqp://user:MARK/4711@host//", "BROKER_URL: should be amqp://user:password@host:port/vhost"),
        ("DATABASE_URL", "mysql://host/db", "DATABASE_URL: should be a PostgreSQL or SQLite URL"),
        ("DATA_KEYS", None, "DATA_KEYS is not set"),
        ("DATA_KEYS", "MARK", "DATA_KEYS: should be Fernet keys"),
        ("XONE_CLIENT_ID", None, "XONE_CLIENT_ID is not set"),
        ("XONE_CLIENT_SECRET", "", "XONE_CLIENT_SECRET is empty"),
        ("XONE_BASE_URL", "http://xone.example", "XONE_BASE_URL should begin with https:"),
        ("RETRY_MAX_DELAY", "0.01", "RETRY_BASE_DELAY should not exceed RETRY_MAX_DELAY"),
        ("WORKER_PARTS", "cook", "WORKER_PARTS should be some of tasks,scheduler,relay"),
        ("EVENT_LINKS", "maybe", "EVENT_LINKS: input should be 'on' or 'off'"),
        ("RETENTION_DAYS", "-1", "RETENTION_DAYS: input should be greater than 0"),
        ("LOG_LEVEL", "loud", "LOG_LEVEL: input should be 'DEBUG'"),
        ("SENTRY_DSN", "MARK", "SENTRY_DSN: should be a DSN of Sentry"),
    ],
)
def test_a_setting_that_is_missing_or_wrong(name: str, value: str | None, told: str, small: dict[str, str]) -> None:
    """It is the one thing that is wrong, all that does not hang on it is checked, and the exit code is 2."""
    report = examined({**small, name: value})

    assert report.code == 2
    assert report.bad().keys() == {"settings"} | ({"broker"} if name != "BROKER_URL" else set())
    assert told in report.bad()["settings"]
    assert "MARK" not in report.text


def test_a_misspelt_name_in_the_file(tmp_path: Path, small: dict[str, str]) -> None:
    (tmp_path / ".env").write_text("WORKER_CONCURENCY=8\nOF_ANOTHER_PROGRAM=1\n")
    done = subprocess.run(
        [sys.executable, "-m", "worker", "doctor", "--json"],
        env={**os.environ, **small, "PYTHONPATH": str(PROJECT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )

    assert Report(done).bad()["settings"] == (
        "warning: WORKER_CONCURENCY in .env is no setting → write WORKER_CONCURRENCY, if that is what is meant"
    )
    assert "ANOTHER" not in done.stdout


@pytest.mark.parametrize(
    ("changes", "check", "told"),
    [
        ({"XONE_TIMEOUT": "600"}, "time-outs", "may be held for longer than RabbitMQ allows (30 min)"),
        ({"XONE_CONNECT_TIMEOUT": "9"}, "time-outs", "XONE_CONNECT_TIMEOUT is 9 s, but XONE_TIMEOUT ends"),
    ],
)
def test_settings_that_do_not_fit_together(
    changes: dict[str, str], check: str, told: str, small: dict[str, str]
) -> None:
    report = examined(small, **changes)

    assert report.bad()[check].startswith("warning: ")
    assert told in report.bad()[check]
    assert report.code == 0


# --- The machine ---


def test_too_few_open_files(small: dict[str, str]) -> None:
    done = subprocess.run(
        ["sh", "-c", f"ulimit -n 512; exec {sys.executable} -m worker doctor --json"],
        env={**os.environ, **small, "WORKER_CONCURRENCY": "500"},
        cwd=PROJECT,
        capture_output=True,
        text=True,
    )

    told = Report(done).bad()["open files"]
    assert told.startswith("wrong: 512 are allowed, but a worker here may need 1,100 → lower WORKER_CONCURRENCY")


def test_a_pool_that_is_not_installed(small: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gevent", None)

    report = examined(small, WORKER_POOL="gevent")

    told = "wrong: WORKER_POOL=gevent, and gevent is not installed here → install confirm-offer[gevent]"
    assert report.bad()["pool"] == told
    assert "pool" not in examined(small, WORKER_POOL="threads").bad()


def test_sentry_that_can_not_be_reached(small: dict[str, str]) -> None:
    report = examined(small, SENTRY_DSN=f"http://MARK@127.0.0.1:{free_port()}/1")

    assert report.bad()["Sentry"].startswith("warning: 127.0.0.1 can't be reached")
    assert "MARK" not in report.text


@pytest.mark.slow
def test_a_worker_here_that_is_not_well(system: System) -> None:
    system.start_worker(BROKER_URL=f"amqp://127.0.0.1:{free_port()}//")
    until(lambda: "1 of 1 not well" in _report_of(system).text)

    assert _report_of(system).bad()["workers here"] == "warning: 1 of 1 not well → confirm-offer health"


# --- The database ---


@pytest.mark.parametrize(
    ("change", "told", "mend"),
    [
        (lambda url, port: url.replace(f":{urlsplit(url).port}", f":{port}"), "can't be reached", "pg_isready"),
        (lambda url, port: url.replace("127.0.0.1", "nowhere.invalid"), "no machine has this name", "name servers"),
        (lambda url, port: url + "_gone", "there is no such database", "docs/database-roles.md"),
        (lambda url, port: url.replace("postgres@", "nobody@"), "there is no such role", "docs/database-roles.md"),
    ],
    ids=["unreachable", "no-such-host", "no-database", "no-role"],
)
def test_a_database_that_can_not_be_used(change: Any, told: str, mend: str, settings: dict[str, str]) -> None:
    report = examined(settings, DATABASE_URL=change(settings["DATABASE_URL"], free_port()))

    assert report.code == 1
    assert report.bad().keys() == {"database", "jobs"}
    assert told in report.bad()["database"]
    assert mend in report.bad()["database"]


@pytest.fixture
def with_password(postgresql: PostgreSQL) -> Iterator[str]:
    """A role that has to give one: the first line of pg_hba.conf asks for it."""
    rules = postgresql.home / "data" / "pg_hba.conf"
    before = rules.read_text()
    with postgresql.connect() as connection:
        connection.execute("CREATE ROLE careful LOGIN PASSWORD 'right'")
        rules.write_text(f"host all careful 127.0.0.1/32 scram-sha-256\nhost all locked 127.0.0.1/32 reject\n{before}")
        connection.execute("SELECT pg_reload_conf()")
    yield "careful"
    rules.write_text(before)
    with postgresql.connect() as connection:
        connection.execute("SELECT pg_reload_conf()")
        connection.execute("DROP OWNED BY careful")
        connection.execute("DROP ROLE careful")


@pytest.mark.parametrize(
    ("login", "told"),
    [
        ("careful:MARK", "user or password is not accepted"),
        ("careful", "it wants a password"),
        ("locked", "it lets no such user in from here"),
    ],
)
def test_a_wrong_password_of_the_database(login: str, told: str, with_password: str, settings: dict[str, str]) -> None:
    url = settings["DATABASE_URL"].replace("postgres@", f"{login}@")
    until(lambda: told in examined(settings, DATABASE_URL=url).text)  # the rules are read anew a moment later

    report = examined(settings, DATABASE_URL=url, HOME="/nonexistent")

    assert told in report.bad()["database"]
    assert "MARK" not in report.text


@pytest.mark.slow
def test_a_database_whose_certificate_is_refused(
    postgresql: PostgreSQL, settings: dict[str, str], authority: Authority
) -> None:
    postgresql.set_tls(authority.issue("127.0.0.1"))
    try:
        url = f"{settings['DATABASE_URL']}?sslmode=verify-full&sslrootcert="
        other = Path(__file__)  # no authority of this certificate
        report = examined(settings, DATABASE_URL=url.replace("127.0.0.1", "localhost") + str(authority.file))
        assert "certificate is refused" in report.bad()["database"]
        assert "docs/tls.md" in report.bad()["database"]
        assert examined(settings, DATABASE_URL=url + str(authority.file)).bad() == NO_WORKER
        assert "certificate is refused" in examined(settings, DATABASE_URL=url + str(other)).bad()["database"]
    finally:
        postgresql.set_tls(None)


@pytest.mark.slow
def test_a_database_that_hangs(settings: dict[str, str]) -> None:
    """It takes connections and says nothing. The check is left after its time, and the others go on."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"postgresql+psycopg://postgres@127.0.0.1:{silent.getsockname()[1]}/db"
        report = examined(settings, DATABASE_URL=url)

    assert report.bad()["database"].startswith("wrong: 127.0.0.1")
    assert report.of("token").level == "ok"


def test_a_check_is_left_after_its_time() -> None:
    for_ever = threading.Event()

    def hangs() -> Iterator[finding.Finding]:
        yield finding.Finding.ok("part", "fine")
        for_ever.wait()

    found = list(finding.with_timeout("part", hangs(), 0.1))
    for_ever.set()

    assert [(one.check, one.level) for one in found] == [("part", "ok"), ("part", "wrong")]
    assert "no answer within 0.1 s" in found[1].message


@pytest.mark.parametrize(
    ("statement", "told"),
    [
        (
            "DROP TABLE alembic_version",
            "wrong: there are none, or the role may not see them → confirm-offer db upgrade",
        ),
        ("UPDATE alembic_version SET version_num = '0001'", "wrong: revision 0001 is older than"),
        ("UPDATE alembic_version SET version_num = '9999'", "warning: revision 9999 is of a newer version than this"),
        ("DROP TABLE batch_items", "wrong: gone: batch_items → restore the database from a backup"),
    ],
    ids=["none", "behind", "ahead", "gone"],
)
def test_tables_of_another_version(statement: str, told: str, database_url: str, settings: dict[str, str]) -> None:
    engine = database.connect(database_url)
    with engine.begin() as connection:
        connection.exec_driver_sql(statement)
    engine.dispose()

    report = examined(settings, DATABASE_URL=database_url)

    assert told in report.bad()["tables"]
    assert report.code == (0 if told.startswith("warning") else 1)


def test_a_role_that_lacks_rights(settings: dict[str, str], postgresql: PostgreSQL) -> None:
    name = urlsplit(settings["DATABASE_URL"]).path[1:]
    with postgresql.connect(name) as connection:
        connection.execute("CREATE ROLE lacking LOGIN")
        try:
            connection.execute("GRANT SELECT ON ALL TABLES IN SCHEMA public TO lacking")
            connection.execute("GRANT INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO lacking")
            url = settings["DATABASE_URL"].replace("postgres@", "lacking@")
            without_sequences = examined(settings, DATABASE_URL=url)
            connection.execute("GRANT USAGE ON ALL SEQUENCES IN SCHEMA public TO lacking")
            with_all = examined(settings, DATABASE_URL=url)
            connection.execute("REVOKE UPDATE ON outbox FROM lacking")
            without_one = examined(settings, DATABASE_URL=url)
            connection.execute("REVOKE SELECT ON alembic_version FROM lacking")
            without_revision = examined(settings, DATABASE_URL=url)
            connection.execute(f'REVOKE CONNECT ON DATABASE "{name}" FROM PUBLIC')
            without_connect = examined(settings, DATABASE_URL=url)
        finally:
            connection.execute("DROP OWNED BY lacking")
            connection.execute("DROP ROLE lacking")

    assert with_all.bad() == NO_WORKER
    assert without_sequences.bad()["rights"].startswith(
        "wrong: the role lacks USAGE on the sequence of audit, USAGE on the sequence of batches → docs/database"
    )
    assert without_one.bad()["rights"].startswith("wrong: the role lacks UPDATE on outbox →")
    assert without_revision.bad()["rights"].startswith("wrong: the role lacks a right")
    assert "the role may not connect to it" in without_connect.bad()["database"]


def test_keys_that_do_not_open_what_is_stored(system: System) -> None:
    system.start_worker()
    system.publish([job("offer-1")])
    system.until_events(1)
    old, new = system.environment["DATA_KEYS"], Fernet.generate_key().decode()

    alone, before, behind = (
        examined(system.environment, DATA_KEYS=keys) for keys in (new, f"{new},{old}", f"{old},{new}")
    )

    assert alone.code == 1
    assert alone.bad()["data keys"].startswith("wrong: the newest that is stored opens with none of DATA_KEYS")
    assert before.bad()["data keys"].startswith("warning: something stored opens with an older key only")
    assert "data keys" not in behind.bad()


def test_a_machine_whose_clock_is_wrong(settings: dict[str, str]) -> None:
    with time_machine.travel(datetime.now(UTC) + timedelta(hours=1), tick=True):
        report = examined(settings)

    assert report.bad()["clock"].startswith("warning: this machine is 1:00:0")
    assert "ahead of the database" in report.bad()["clock"]


@pytest.mark.slow
def test_work_that_waits(system: System) -> None:
    """Each of them a warning, with the command that helps."""
    worker = system.start_worker()
    system.publish([job("review~drop-after~9", partner_id="P-9"), job("late"), b"{"])
    system.sandbox.bookings_mode = "forbidden"
    until(lambda: sum(system.states().values()) == 2)
    until(lambda: system.queue_length(topology.DEAD_LETTERS) == 1)
    worker.stop()
    long_ago = database.now_plus(-600.0)
    with system.engine.begin() as connection:
        rows = update(Confirmation)
        connection.execute(rows.where(Confirmation.offer_id == "late").values(state=State.RETRYING, due_at=long_ago))
        connection.execute(
            rows.where(Confirmation.partner_id == "P-9").values(
                state=State.NEEDS_REVIEW, due_at=None, dispatched_until=None
            )
        )
        connection.execute(update(OutboxEvent).values(created_at=long_ago, published_at=None))
    run("reprocess", "--include-needs-review", "--yes", "--reason", "test", **system.environment)
    run("batch", "pause", "1", **system.environment)
    system.connection.default_channel.queue_delete("test.events")
    with Publisher(system.broker_url) as publisher:
        assert publisher.publish([Message(1, b"{}", topology.booking_events.name, "booking.confirmed")])
    system.publish([job("waits")])

    report = _report_of(system)
    run("pause", "--partner", "P-100", "--reason", "MARK", **system.environment)
    paused = _report_of(system)

    bad = report.bad()
    assert bad["jobs"].startswith("wrong: nobody takes them, and 1 wait")
    assert bad["dead letters"] == "warning: 1 job could not be accepted → confirm-offer dead-letters list"
    assert bad["review"].endswith(
        "1 confirmation waits for a person → confirm-offer failed --list --include-needs-review"
    )
    assert bad["batches"] == "warning: 1 batch is paused → confirm-offer batch resume 1"
    assert bad["due"].startswith("warning: 1 should have been tried before, the oldest 10:")
    assert bad["outbox"].startswith("warning: 1 event waits to be published, the oldest for 10:")
    assert bad["events"].startswith("warning: 1 had no queue to go to: see booking-events.unrouted")
    assert "calls" not in bad
    assert (
        paused.bad()["calls"] == "warning: paused by a person for partner P-100 → confirm-offer resume --partner P-100"
    )
    assert "due" not in paused.bad()
    assert "MARK" not in paused.text
    assert paused.code == 1


def test_a_sqlite_file_that_can_not_be_used(small: dict[str, str], tmp_path: Path, sqlite_url: str) -> None:
    missing = examined(small, DATABASE_URL=f"sqlite:///{tmp_path}/none.db")
    no_folder = examined(small, DATABASE_URL=f"sqlite:///{tmp_path}/none/none.db")
    (tmp_path / "text.db").write_text("no database " * 100)
    no_database = examined(small, DATABASE_URL=f"sqlite:///{tmp_path}/text.db")

    assert f"{tmp_path}/none.db does not exist" in missing.bad()["database"]
    assert "confirm-offer db upgrade" in missing.bad()["database"]
    assert not (tmp_path / "none.db").exists()
    assert "there is no folder" in no_folder.bad()["database"]
    assert "the file is no SQLite database" in no_database.bad()["database"]


def test_a_sqlite_file_in_a_folder_that_is_read_only(small: dict[str, str], tmp_path: Path) -> None:
    """Run without the right of root to write everywhere."""
    folder = tmp_path / "read-only"
    folder.mkdir()
    url = f"sqlite:///{folder}/confirm-offer.db"
    assert run("db", "upgrade", DATABASE_URL=url).returncode == 0
    folder.chmod(0o555)
    as_others = ["setpriv", "--bounding-set=-dac_override", "--inh-caps=-all"] if os.geteuid() == 0 else []
    done = subprocess.run(
        [*as_others, sys.executable, "-m", "worker", "doctor", "--json"],
        env={**os.environ, **small, "DATABASE_URL": url},
        cwd=PROJECT,
        capture_output=True,
        text=True,
    )
    folder.chmod(0o755)

    assert f"this user can't write in {folder}" in Report(done).bad()["database"]


# --- The broker ---


def of_broker(settings: dict[str, str], url: str) -> Report:
    return examined(settings, BROKER_URL=url)


@pytest.mark.parametrize(
    ("change", "told", "mend"),
    [
        (lambda url, port: url.replace(f":{urlsplit(url).port}", f":{port}"), "can't be reached", "check_running"),
        (lambda url, port: url.replace("127.0.0.1", "nowhere.invalid"), "no machine has this name", "name servers"),
        (lambda url, port: url.replace("guest:guest", "guest:MARK"), "user or password is not accepted", "BROKER_URL"),
        (lambda url, port: url + "-gone", "there is no virtual host test-", "rabbitmqctl add_vhost test-"),
        (lambda url, port: url.replace("amqp:", "amqps:"), "does not speak TLS", "5671"),
    ],
    ids=["unreachable", "no-such-host", "password", "vhost", "no-tls"],
)
def test_a_broker_that_can_not_be_used(change: Any, told: str, mend: str, settings: dict[str, str]) -> None:
    report = of_broker(settings, change(settings["BROKER_URL"], free_port()))

    assert report.code == 1
    assert report.bad().keys() == {"broker"}
    assert told in report.bad()["broker"]
    assert mend in report.bad()["broker"]
    assert "MARK" not in report.text


@pytest.mark.slow
def test_a_broker_whose_certificate_is_refused(
    settings: dict[str, str], rabbitmq: RabbitMQ, authority: Authority
) -> None:
    address = f"{rabbitmq.tls_port}{urlsplit(settings['BROKER_URL']).path}"

    unknown = of_broker(settings, f"amqps://guest:guest@127.0.0.1:{address}")
    of_another = of_broker(settings, f"amqps://guest:guest@localhost:{address}?ssl_ca_certs={authority.file}")
    well = of_broker(settings, f"amqps://guest:guest@127.0.0.1:{address}?ssl_ca_certs={authority.file}")

    assert "its certificate is refused (unable to get local issuer certificate)" in unknown.bad()["broker"]
    assert "its certificate is refused (Hostname mismatch" in of_another.bad()["broker"]
    assert well.bad() == NO_WORKER


def test_queues_that_are_missing_or_of_another_kind(settings: dict[str, str]) -> None:
    """The doctor declares none."""
    with broker.connect(settings["BROKER_URL"]) as connection:
        channel = connection.default_channel
        channel.queue_delete(topology.JOBS)
        channel.exchange_delete("booking-events")
        missing = examined(settings)
        again = examined(settings)
        channel.queue_declare(topology.JOBS, durable=True, auto_delete=False)
        of_another_kind = examined(settings)

    for report in missing, again:
        assert report.bad()["queues"].startswith(
            "wrong: missing: booking-events, confirm-offer.jobs → confirm-offer broker"
        )
        assert report.code == 1
    told = [one.message for one in of_another_kind.findings if one.check == "queues"]
    assert told == [
        "missing: booking-events",
        "confirm-offer.jobs: x-dead-letter-exchange is none, not the value 'confirm-offer' of type 'longstr'",
    ]


@pytest.fixture
def worker_of_little_right(rabbitmq: RabbitMQ, broker_url: str) -> Iterator[str]:
    """A URL of a user that may do nothing yet."""
    rabbitmq.ctl("add_user", "little", "MARK")
    yield broker_url.replace("guest:guest", "little:MARK")
    rabbitmq.ctl("delete_user", "little")


@pytest.mark.slow
def test_a_user_of_the_broker_that_lacks_rights(
    worker_of_little_right: str, settings: dict[str, str], rabbitmq: RabbitMQ
) -> None:
    def with_rights(*patterns: str) -> Report:
        rabbitmq.ctl("set_permissions", "-p", urlsplit(worker_of_little_right).path[1:], "little", *patterns)
        return of_broker(settings, worker_of_little_right)

    nothing = of_broker(settings, worker_of_little_right)
    no_events = with_rights(".*", r"^(confirm-offer.*|booking-events\.unrouted)$", ".*")
    only_publishes = with_rights("^$", ".*", ".*")
    documented = with_rights(
        r"^(confirm-offer(\.(jobs|resume|dead-letters))?|booking-events(\.unrouted)?)$",
        r"^(confirm-offer(\.(jobs|resume|dead-letters))?|booking-events(\.unrouted)?)$",
        r"^(confirm-offer(\.(jobs|resume))?|booking-events(\.unrouted)?)$",
    )

    assert nothing.bad()["broker rights"].endswith("docs/rabbitmq-permissions.md has the command for the worker's user")
    assert "the user may not publish to booking-events" in no_events.bad()["broker rights"]
    assert "the user may not declare: confirm-offer, " in only_publishes.bad()["broker rights"]
    assert documented.bad() == NO_WORKER
    assert "MARK" not in nothing.text + no_events.text + only_publishes.text


@pytest.mark.slow
def test_a_broker_with_an_alarm(settings: dict[str, str], rabbitmq: RabbitMQ) -> None:
    rabbitmq.ctl("set_vm_memory_high_watermark", "absolute", "1000")
    try:
        report = until(lambda: found if "broker" in (found := examined(settings)).bad() else None)
    finally:
        rabbitmq.ctl("set_vm_memory_high_watermark", "absolute", "512MB")

    assert report.bad()["broker"].startswith("wrong: it takes no messages: an alarm of memory or disk space")
    assert "check_local_alarms" in report.bad()["broker"]
    until(lambda: examined(settings).bad() == NO_WORKER)


def test_a_broker_in_memory(small: dict[str, str]) -> None:
    assert examined(small).bad()["broker"].startswith("warning: in-memory")


# --- XONE ---


@contextmanager
def answering(status: int, body: bytes = b"{}") -> Iterator[str]:
    """A server that answers everything alike."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Location", "https://elsewhere.example/MARK")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(
    ("status", "body", "told"),
    [
        (404, b"{}", "XONE_TOKEN_PATH is not the place for tokens (404)"),
        (302, b"{}", "XONE_TOKEN_PATH answers with a redirect (302)"),
        (401, b'{"error": "MARK"}', "does not accept the credentials (401)"),
        (400, b'{"error": "MARK"}', "does not accept the credentials (400)"),
        (200, b'{"token": "MARK"}', "answers 200, but with no access_token"),
        (200, b"<html>MARK</html>", "answers 200, but with no access_token"),
        (503, b"MARK", "answers 503"),
    ],
)
def test_a_token_that_is_not_given(status: int, body: bytes, told: str, small: dict[str, str]) -> None:
    with answering(status, body) as url:
        report = examined(small, XONE_BASE_URL=url)

    assert report.code == 1
    assert report.bad().keys() == {"token", "broker"}
    assert told in report.bad()["token"]
    assert "MARK" not in report.text


def test_credentials_that_the_stand_in_refuses(small: dict[str, str], sandbox: Sandbox) -> None:
    report = examined(small, XONE_CLIENT_SECRET="MARK")

    assert "check XONE_CLIENT_ID and XONE_CLIENT_SECRET" in report.bad()["token"]
    assert sandbox.token_requests == 1


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("https://nowhere.invalid", "no machine is known as nowhere.invalid"),
        ("http://127.0.0.1:{free}", "takes no connection within XONE_CONNECT_TIMEOUT (5 s)"),
        ("https://127.0.0.1:{tls}", "no TLS connection to 127.0.0.1"),
    ],
    ids=["name", "connection", "tls"],
)
def test_xone_that_can_not_be_reached(url: str, told: str, small: dict[str, str], rabbitmq: RabbitMQ) -> None:
    report = examined(small, XONE_BASE_URL=url.format(free=free_port(), tls=rabbitmq.tls_port))

    assert told in report.bad()["XONE"]


def test_xone_that_does_not_answer(small: dict[str, str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        report = examined(small, XONE_BASE_URL=f"http://127.0.0.1:{silent.getsockname()[1]}")

    assert "does not answer within XONE_TIMEOUT (2 s)" in report.bad()["token"]


def test_tokens_that_go_in_clear(small: dict[str, str]) -> None:
    report = examined(small, XONE_BASE_URL="http://nowhere.invalid", XONE_ALLOW_PLAIN_HTTP="on")

    assert report.bad()["encryption"].startswith("warning: tokens and personal data go to nowhere.invalid in clear")


# --- What a person sees ---


def test_a_calm_table_of_80_columns(settings: dict[str, str]) -> None:
    done = run("doctor", **{**settings, "DATABASE_URL": settings["DATABASE_URL"] + "_gone", "EVENT_LINKS": "maybe"})
    lines = [line.rstrip() for line in done.stdout.splitlines()]

    assert done.returncode == 2
    assert max(map(len, lines)) <= WIDTH
    assert {line[:9].strip() for line in lines if line} >= {"ok", "warning", "wrong"}
    assert {line[:23].strip() for line in lines if "→" in line} == {""}, "what to do stands below what was found"
    assert lines[-2].startswith("2 wrong, 1 warning.")


@pytest.mark.slow
def test_no_secret_and_no_personal_data(system: System) -> None:
    """Marked ones stand in settings, in the database, in the queues: right and wrong ones."""
    system.start_worker()
    person = {"first_name": "MARK", "last_name": "MARK", "country": "GB", "email": "MARK@example.com"}
    system.publish([job("offer-1", policyholder=person), job("offer-2~http-422", policyholder=person), b'"MARK"'])
    until(lambda: sum(system.states().values()) == 2)
    until(lambda: system.queue_length(topology.DEAD_LETTERS) == 1)
    marked = {
        "BROKER_URL": ["amqp://MARK:MARK@127.0.0.1:1/v", "amqp://u:MARK/x@h/v", "amqp://u:MARK#@host/v"],
        "DATABASE_URL": [
            "postgresql://MARK:MARK@127.0.0.1:1/d",
            "postgresql://u:MA@MARK@127.0.0.1:1/d",
            "postgresql://u@h:MARK/d",
        ],
        "XONE_BASE_URL": ["https://MARK:MARK@127.0.0.1:1"],
        "SENTRY_DSN": ["https://MARK@127.0.0.1:1/1"],
        "XONE_CLIENT_SECRET": ["MARK"],
        "DATA_KEYS": ["MARK"],
    }

    for name, values in marked.items():
        for value in values:
            for options in [], ["--json"]:
                done = CliRunner().invoke(cli, ["doctor", *options], env={**system.environment, name: value})
                assert done.exit_code in (0, 1, 2)
                assert "MARK" not in done.output, (name, value)
    assert system.count(AuditEntry) == system.count(Batch) == 0
