"""``doctor`` finds and names each broken set-up with a remedy. It changes nothing and shows no secret."""

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
from worker.doctor import broker as doctor_of_broker
from worker.doctor import finding
from worker.doctor.finding import Level
from worker.messaging import broker, topology
from worker.messaging.inspection import QueueDepth
from worker.messaging.publisher import Message, Publisher
from worker.sandbox.server import Sandbox
from worker.settings import NAMES
from worker.storage import database

WIDTH = 80


def _finding(content: dict[str, Any]) -> finding.Finding:
    return finding.Finding(content["check"], finding.Level(content["level"]), content["found"], content["mend"])


class Report:
    """The report of ``doctor --json``."""

    def __init__(self, done: subprocess.CompletedProcess[str] | Result) -> None:
        self.code = done.returncode if isinstance(done, subprocess.CompletedProcess) else done.exit_code
        self.text = done.stdout
        assert done.stdout.startswith("{"), done.stderr
        content = json.loads(done.stdout)
        self.is_well = content["well"]
        self.findings = [_finding(entry) for entry in content["findings"]]

    def bad(self) -> dict[str, str]:
        """The findings that are not OK, by check: level, message and remedy."""
        return {
            entry.check: f"{entry.level}: {entry.message} → {entry.remedy}"
            for entry in self.findings
            if entry.level != finding.Level.OK
        }

    def of(self, check: str) -> finding.Finding:
        return next(entry for entry in self.findings if entry.check == check)


@pytest.fixture(autouse=True)
def _temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Uses the temporary folder of the workers under test."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


@pytest.fixture
def settings(broker_url: str, postgresql_url: str, environment: dict[str, str], tmp_path: Path) -> dict[str, str]:
    """Settings of a whole system without a worker."""
    return {**environment, "BROKER_URL": broker_url, "DATABASE_URL": postgresql_url}


@pytest.fixture
def small_settings(sqlite_url: str, environment: dict[str, str]) -> dict[str, str]:
    """Settings without servers, for fast tests that need none."""
    return {**environment, "BROKER_URL": "memory://", "DATABASE_URL": sqlite_url}


def examine(settings: dict[str, str], **changes: str) -> Report:
    """Runs the doctor in this process, which is faster."""
    all_settings = {**dict.fromkeys(NAMES), **settings, **changes}
    return Report(CliRunner().invoke(cli, ["doctor", "--json"], env=all_settings))


NO_WORKER = {"jobs": "warning: nobody takes them, and 0 wait → confirm-offer worker (WORKER_PARTS must hold tasks)"}


# --- A correct set-up ---


def test_a_correct_set_up_has_no_findings(system: System) -> None:
    system.publish([job("offer-1")])
    system.start_worker()
    system.until_events(1)

    report: Report = until(lambda: found if not (found := examine_system(system)).bad() else None, every=0.5)

    assert report.is_well
    assert report.code == 0
    assert {entry.check for entry in report.findings} == {
        "settings", "time-outs", "open files", "workers here", "Sentry", "database", "tables", "clock", "data keys",
        "workers", "due", "outbox", "broker", "message size", "queues", "jobs", "token",
    }  # fmt: skip
    assert report.of("jobs").message == "1 worker takes them, 0 wait"
    assert report.of("data keys").message == "the first opens the newest and the oldest that is stored"
    assert system.sandbox.token_requests >= 2


def examine_system(system: System) -> Report:
    return examine(system.environment)


@pytest.mark.slow
def test_a_broker_that_takes_large_messages_is_found(settings: dict[str, str], rabbitmq: RabbitMQ) -> None:
    with rabbitmq.max_message_size(16 * 1024 * 1024):
        finding = examine(settings).of("message size")

    assert finding.level == "warning"
    assert finding.remedy == "max_message_size = 4194304 in rabbitmq.conf"


def test_the_doctor_changes_nothing(settings: dict[str, str], sandbox: Sandbox, rabbitmq: RabbitMQ) -> None:
    """It changes neither the database nor RabbitMQ, and requests one token from XONE."""
    engine = database.connect(settings["DATABASE_URL"])
    with engine.connect() as connection:
        before = _content(connection)

    assert examine(settings).bad() == NO_WORKER

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


def test_transactions_of_the_doctor_are_read_only(database_url: str) -> None:
    engine = database.read_only(database_url)
    with engine.connect() as connection, pytest.raises(Exception, match=r"read-?only"):
        connection.execute(update(Confirmation).values(attempts=1))
    engine.dispose()


def test_a_set_up_with_sqlite_is_examined(settings: dict[str, str], sqlite_url: str) -> None:
    assert examine(settings, DATABASE_URL=sqlite_url).bad() == NO_WORKER


# --- Settings ---


@pytest.mark.parametrize(
    ("name", "value", "message"),
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
def test_a_missing_or_wrong_setting_is_named(
    name: str, value: str | None, message: str, small_settings: dict[str, str]
) -> None:
    """It is the only finding, all independent checks run, and the exit code is 2."""
    report = examine({**small_settings, name: value})

    assert report.code == 2
    assert report.bad().keys() == {"settings"} | ({"broker"} if name != "BROKER_URL" else set())
    assert message in report.bad()["settings"]
    assert "MARK" not in report.text


def test_a_misspelt_name_is_named_in_env_file_and_environment(tmp_path: Path, small_settings: dict[str, str]) -> None:
    (tmp_path / ".env").write_text("WORKER_CONCURENCY=8\nOF_ANOTHER_PROGRAM=1\n")
    done = subprocess.run(
        [sys.executable, "-m", "worker", "doctor", "--json"],
        env={**os.environ, **small_settings, "PYTHONPATH": str(PROJECT), "XONE_TIMOUT": "9", "OTHER_URL": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )

    misspelt = [entry for entry in Report(done).findings if entry.check == "settings"]
    assert [f"{entry.level}: {entry.message} → {entry.remedy}" for entry in misspelt if entry.remedy] == [
        "warning: WORKER_CONCURENCY in .env is no setting → write WORKER_CONCURRENCY, if that is what is meant",
        "warning: XONE_TIMOUT in the environment is no setting → write XONE_TIMEOUT, if that is what is meant",
    ]
    assert "OTHER" not in done.stdout


@pytest.mark.parametrize(
    ("changes", "check", "message"),
    [
        ({"XONE_TIMEOUT": "600"}, "time-outs", "may be held for longer than RabbitMQ allows (30 min)"),
        ({"XONE_CONNECT_TIMEOUT": "9"}, "time-outs", "XONE_CONNECT_TIMEOUT is 9 s, but XONE_TIMEOUT ends"),
        ({"DELETE_AFTER_DAYS": "2"}, "deletion", "a job that is published again after that is called again"),
        ({"DELETE_AFTER_DAYS": "90", "RETENTION_DAYS": "90"}, "deletion", "RETENTION_DAYS=90 has no effect"),
    ],
)
def test_settings_that_contradict_each_other_are_named(
    changes: dict[str, str], check: str, message: str, small_settings: dict[str, str]
) -> None:
    report = examine(small_settings, **changes)

    assert report.bad()[check].startswith("warning: ")
    assert message in report.bad()[check]
    assert report.code == 0


# --- The machine ---


def test_too_few_open_files_are_reported(small_settings: dict[str, str]) -> None:
    done = subprocess.run(
        ["sh", "-c", f"ulimit -n 512; exec {sys.executable} -m worker doctor --json"],
        env={**os.environ, **small_settings, "WORKER_CONCURRENCY": "500"},
        cwd=PROJECT,
        capture_output=True,
        text=True,
    )

    message = Report(done).bad()["open files"]
    assert message.startswith("wrong: 512 are allowed, but a worker here may need 1,100 → lower WORKER_CONCURRENCY")


def test_a_pool_that_is_not_installed_is_reported(
    small_settings: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gevent", None)

    report = examine(small_settings, WORKER_POOL="gevent")

    message = "wrong: WORKER_POOL=gevent, and gevent is not installed here → install confirm-offer[gevent]"
    assert report.bad()["pool"] == message
    assert "pool" not in examine(small_settings, WORKER_POOL="threads").bad()


def test_an_unreachable_sentry_is_reported(small_settings: dict[str, str]) -> None:
    report = examine(small_settings, SENTRY_DSN=f"http://MARK@127.0.0.1:{free_port()}/1")

    assert report.bad()["Sentry"].startswith("warning: 127.0.0.1 can't be reached")
    assert "MARK" not in report.text


@pytest.mark.slow
def test_an_unhealthy_worker_on_this_machine_is_reported(system: System) -> None:
    system.start_worker(BROKER_URL=f"amqp://127.0.0.1:{free_port()}//")
    until(lambda: "1 of 1 not well" in examine_system(system).text)

    assert examine_system(system).bad()["workers here"] == "warning: 1 of 1 not well → confirm-offer health"


# --- The database ---


@pytest.mark.parametrize(
    ("change", "message", "remedy"),
    [
        (
            lambda url, port: url.replace(f":{urlsplit(url).port}", f":{port}"),
            "can't be reached",
            "see whether it runs",
        ),
        (lambda url, port: url.replace("127.0.0.1", "nowhere.invalid"), "no machine has this name", "name servers"),
        (lambda url, port: url + "_gone", "there is no such database", "docs/database-roles.md"),
        (lambda url, port: url.replace("postgres@", "nobody@"), "there is no such role", "docs/database-roles.md"),
    ],
    ids=["unreachable", "no-such-host", "no-database", "no-role"],
)
def test_an_unusable_database_is_reported(change: Any, message: str, remedy: str, settings: dict[str, str]) -> None:
    report = examine(settings, DATABASE_URL=change(settings["DATABASE_URL"], free_port()))

    assert report.code == 1
    assert report.bad().keys() == {"database", "jobs"}
    assert message in report.bad()["database"]
    assert remedy in report.bad()["database"]


@pytest.fixture
def with_password(postgresql: PostgreSQL) -> Iterator[str]:
    """A role that needs a password, by the first line of pg_hba.conf."""
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


def test_the_host_and_port_of_the_database_are_those_that_were_reached(
    settings: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, lost = urlsplit(settings["DATABASE_URL"]), free_port()
    name = url.path[1:]
    by_list = f"postgresql://postgres@127.0.0.1:{lost},127.0.0.1:{url.port}/{name}"
    by_option = f"postgresql://postgres@/{name}?host=127.0.0.1&port={url.port}"
    for given in by_list, by_option:
        found = examine(settings, DATABASE_URL=given).of("database").message
        assert found.endswith(f" at 127.0.0.1:{url.port}, database {name}"), given

    away = examine(settings, DATABASE_URL=f"postgresql://127.0.0.1:{lost},localhost:{lost}/{name}")
    assert f"127.0.0.1:{lost}, localhost:{lost}, database {name}: can't be reached" in away.bad()["database"]
    monkeypatch.setenv("PGPORT", str(lost))
    away = examine(settings, DATABASE_URL=f"postgresql://127.0.0.1/{name}")
    assert f"127.0.0.1:{lost}, database {name}: can't be reached" in away.bad()["database"]


@pytest.mark.parametrize(
    ("login", "message"),
    [
        ("careful:MARK", "user or password is not accepted"),
        ("careful", "it wants a password"),
        ("locked", "it lets no such user in from here"),
    ],
)
def test_a_wrong_password_of_the_database_is_reported(
    login: str, message: str, with_password: str, settings: dict[str, str]
) -> None:
    url = settings["DATABASE_URL"].replace("postgres@", f"{login}@")
    until(lambda: message in examine(settings, DATABASE_URL=url).text)  # the server reads the new rules a moment later

    report = examine(settings, DATABASE_URL=url, HOME="/nonexistent")

    assert message in report.bad()["database"]
    assert "MARK" not in report.text


@pytest.mark.slow
def test_a_refused_certificate_of_the_database_is_reported(
    postgresql: PostgreSQL, settings: dict[str, str], authority: Authority
) -> None:
    postgresql.set_tls(authority.issue("127.0.0.1"))
    try:
        url = f"{settings['DATABASE_URL']}?sslmode=verify-full&sslrootcert="
        other = Path(__file__)  # not a certificate of the authority
        report = examine(settings, DATABASE_URL=url.replace("127.0.0.1", "localhost") + str(authority.file))
        assert "certificate is refused" in report.bad()["database"]
        assert "docs/tls.md" in report.bad()["database"]
        assert examine(settings, DATABASE_URL=url + str(authority.file)).bad() == NO_WORKER
        assert "certificate is refused" in examine(settings, DATABASE_URL=url + str(other)).bad()["database"]
    finally:
        postgresql.set_tls(None)


@pytest.mark.slow
def test_a_hanging_database_is_reported_and_the_other_checks_run(settings: dict[str, str]) -> None:
    """It accepts connections and never answers. The check is abandoned after its timeout."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"postgresql+psycopg://postgres@127.0.0.1:{silent.getsockname()[1]}/db"
        report = examine(settings, DATABASE_URL=url)

    assert report.bad()["database"].startswith("wrong: 127.0.0.1")
    assert report.of("token").level == "ok"


def test_a_check_is_abandoned_after_its_timeout() -> None:
    end_of_test = threading.Event()

    def hang() -> Iterator[finding.Finding]:
        yield finding.Finding.ok("part", "fine")
        end_of_test.wait()

    found = list(finding.with_timeout("part", hang(), 0.1))
    end_of_test.set()

    assert [(entry.check, entry.level) for entry in found] == [("part", "ok"), ("part", "wrong")]
    assert "no answer within 0.1 s" in found[1].message


@pytest.mark.parametrize(
    ("statement", "message"),
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
def test_tables_of_another_version_are_reported(
    statement: str, message: str, database_url: str, settings: dict[str, str]
) -> None:
    engine = database.connect(database_url)
    with engine.begin() as connection:
        connection.exec_driver_sql(statement)
    engine.dispose()

    report = examine(settings, DATABASE_URL=database_url)

    assert message in report.bad()["tables"]
    assert report.code == (0 if message.startswith("warning") else 1)


def test_missing_rights_of_a_role_are_reported(settings: dict[str, str], postgresql: PostgreSQL) -> None:
    name = urlsplit(settings["DATABASE_URL"]).path[1:]
    with postgresql.connect(name) as connection:
        connection.execute("CREATE ROLE lacking LOGIN")
        try:
            connection.execute("GRANT SELECT ON ALL TABLES IN SCHEMA public TO lacking")
            connection.execute("GRANT INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO lacking")
            url = settings["DATABASE_URL"].replace("postgres@", "lacking@")
            without_sequences = examine(settings, DATABASE_URL=url)
            connection.execute("GRANT USAGE ON ALL SEQUENCES IN SCHEMA public TO lacking")
            with_all = examine(settings, DATABASE_URL=url)
            connection.execute("REVOKE UPDATE ON outbox FROM lacking")
            without_one = examine(settings, DATABASE_URL=url)
            connection.execute("REVOKE SELECT ON alembic_version FROM lacking")
            without_revision = examine(settings, DATABASE_URL=url)
            connection.execute(f'REVOKE CONNECT ON DATABASE "{name}" FROM PUBLIC')
            without_connect = examine(settings, DATABASE_URL=url)
        finally:
            connection.execute("DROP OWNED BY lacking")
            connection.execute("DROP ROLE lacking")

    assert with_all.bad() == NO_WORKER
    assert without_sequences.bad()["rights"].startswith(
        "wrong: the role lacks USAGE on the sequence of audit, USAGE on the sequence of batches → docs/database"
    )
    assert without_one.bad()["rights"].startswith("wrong: the role lacks UPDATE on outbox →")
    assert without_revision.bad()["rights"].startswith("wrong: the role of DATABASE_URL lacks a right")
    assert "the role may not connect to it" in without_connect.bad()["database"]


def test_keys_that_do_not_decrypt_stored_values_are_reported(system: System) -> None:
    system.start_worker()
    system.publish([job("offer-1")])
    system.until_events(1)
    old, new = system.environment["DATA_KEYS"], Fernet.generate_key().decode()

    alone, before, behind = (
        examine(system.environment, DATA_KEYS=keys) for keys in (new, f"{new},{old}", f"{old},{new}")
    )

    assert alone.code == 1
    assert alone.bad()["data keys"].startswith("wrong: the newest that is stored opens with none of DATA_KEYS")
    assert before.bad()["data keys"].startswith("warning: something stored opens with an older key only")
    assert "data keys" not in behind.bad()


def test_a_wrong_clock_is_reported(settings: dict[str, str]) -> None:
    with time_machine.travel(datetime.now(UTC) + timedelta(hours=1), tick=True):
        report = examine(settings)

    assert report.bad()["clock"].startswith("warning: this machine is 1:00:0")
    assert "ahead of the database" in report.bad()["clock"]


@pytest.mark.slow
def test_waiting_work_is_reported(system: System) -> None:
    """Each kind of waiting work has a finding with the command that helps."""
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

    report = examine_system(system)
    run("pause", "--partner", "P-100", "--reason", "MARK", **system.environment)
    paused = examine_system(system)

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


def test_an_unusable_sqlite_file_is_reported(small_settings: dict[str, str], tmp_path: Path, sqlite_url: str) -> None:
    missing = examine(small_settings, DATABASE_URL=f"sqlite:///{tmp_path}/none.db")
    no_folder = examine(small_settings, DATABASE_URL=f"sqlite:///{tmp_path}/none/none.db")
    (tmp_path / "text.db").write_text("no database " * 100)
    no_database = examine(small_settings, DATABASE_URL=f"sqlite:///{tmp_path}/text.db")

    assert f"{tmp_path}/none.db does not exist" in missing.bad()["database"]
    assert "confirm-offer db upgrade" in missing.bad()["database"]
    assert not (tmp_path / "none.db").exists()
    assert "there is no folder" in no_folder.bad()["database"]
    assert "the file is no SQLite database" in no_database.bad()["database"]


def test_a_read_only_folder_of_a_sqlite_file_is_reported(small_settings: dict[str, str], tmp_path: Path) -> None:
    """The command runs without root's right to write everywhere."""
    folder = tmp_path / "read-only"
    folder.mkdir()
    url = f"sqlite:///{folder}/confirm-offer.db"
    assert run("db", "upgrade", DATABASE_URL=url).returncode == 0
    folder.chmod(0o555)
    as_others = ["setpriv", "--bounding-set=-dac_override", "--inh-caps=-all"] if os.geteuid() == 0 else []
    done = subprocess.run(
        [*as_others, sys.executable, "-m", "worker", "doctor", "--json"],
        env={**os.environ, **small_settings, "DATABASE_URL": url},
        cwd=PROJECT,
        capture_output=True,
        text=True,
    )
    folder.chmod(0o755)

    assert f"this user can't write in {folder}" in Report(done).bad()["database"]


# --- The broker ---


def examine_with_broker(settings: dict[str, str], url: str) -> Report:
    return examine(settings, BROKER_URL=url)


@pytest.mark.parametrize(
    ("change", "message", "remedy"),
    [
        (lambda url, port: url.replace(f":{urlsplit(url).port}", f":{port}"), "can't be reached", "check_running"),
        (lambda url, port: url.replace("127.0.0.1", "nowhere.invalid"), "no machine has this name", "name servers"),
        (lambda url, port: url.replace("guest:guest", "guest:MARK"), "user or password is not accepted", "BROKER_URL"),
        (lambda url, port: url + "-gone", "there is no such virtual host", "rabbitmqctl add_vhost test-"),
        (lambda url, port: url.replace("amqp:", "amqps:"), "does not speak TLS", "5671"),
    ],
    ids=["unreachable", "no-such-host", "password", "vhost", "no-tls"],
)
def test_an_unusable_broker_is_reported(change: Any, message: str, remedy: str, settings: dict[str, str]) -> None:
    report = examine_with_broker(settings, change(settings["BROKER_URL"], free_port()))

    assert report.code == 1
    assert report.bad().keys() == {"broker"}
    assert message in report.bad()["broker"]
    assert remedy in report.bad()["broker"]
    assert "MARK" not in report.text


@pytest.mark.slow
def test_each_broker_of_several_is_reported(settings: dict[str, str]) -> None:
    url, lost = settings["BROKER_URL"], free_port()
    address = urlsplit(url)

    report = examine_with_broker(settings, f"amqp://guest:MARK@127.0.0.1:{lost}{address.path};{url}")
    none_left = examine_with_broker(settings, f"amqp://127.0.0.1:{lost}//;amqp://127.0.0.1:{free_port()}//")

    hosts = [(entry.level, entry.message) for entry in report.findings if entry.check == "broker"]
    vhost = address.path[1:]
    assert hosts == [
        (Level.WARNING, f"127.0.0.1:{lost}, virtual host {vhost}: can't be reached (ConnectionRefusedError)"),
        (Level.OK, f"RabbitMQ {version_of(report)} at 127.0.0.1:{address.port}, virtual host {vhost}"),
    ]
    assert report.is_well
    assert "MARK" not in report.text
    assert [entry.level for entry in none_left.findings if entry.check == "broker"] == [Level.ERROR] * 2


def version_of(report: Report) -> str:
    return next(entry.message.split()[1] for entry in report.findings if entry.message.startswith("RabbitMQ "))


def test_consumers_are_at_most_those_that_are_counted_while_a_broker_is_lost() -> None:
    depths = {topology.JOBS: QueueDepth(7, 3), topology.RESUME: QueueDepth(0, 3)}

    (all_up,), (one_lost,) = (list(doctor_of_broker._depths(depths, all_up)) for all_up in (True, False))

    assert all_up.message == "3 workers take them, 7 wait"
    assert one_lost.message == "at most 3 workers take them, with those that a lost node still counts, 7 wait"


@pytest.mark.slow
def test_a_refused_certificate_of_the_broker_is_reported(
    settings: dict[str, str], rabbitmq: RabbitMQ, authority: Authority
) -> None:
    address = f"{rabbitmq.tls_port}{urlsplit(settings['BROKER_URL']).path}"

    unknown = examine_with_broker(settings, f"amqps://guest:guest@127.0.0.1:{address}")
    of_another = examine_with_broker(settings, f"amqps://guest:guest@localhost:{address}?ssl_ca_certs={authority.file}")
    trusted = examine_with_broker(settings, f"amqps://guest:guest@127.0.0.1:{address}?ssl_ca_certs={authority.file}")

    assert "its certificate is refused (unable to get local issuer certificate)" in unknown.bad()["broker"]
    assert "its certificate is refused (Hostname mismatch" in of_another.bad()["broker"]
    assert trusted.bad() == NO_WORKER


def test_missing_and_different_queues_are_reported(settings: dict[str, str]) -> None:
    """The doctor does not declare queues."""
    with broker.connect(settings["BROKER_URL"]) as connection:
        channel = connection.default_channel
        channel.queue_delete(topology.JOBS)
        channel.exchange_delete("booking-events")
        missing = examine(settings)
        again = examine(settings)
        channel.queue_declare(topology.JOBS, durable=True, auto_delete=False)
        of_another_kind = examine(settings)

    for report in missing, again:
        assert report.bad()["queues"].startswith(
            "wrong: missing: booking-events, confirm-offer.jobs → confirm-offer broker"
        )
        assert report.code == 1
    messages = [entry.message for entry in of_another_kind.findings if entry.check == "queues"]
    assert messages == [
        "missing: booking-events",
        "confirm-offer.jobs: x-dead-letter-exchange is none, not the value 'confirm-offer' of type 'longstr'",
    ]


@pytest.fixture
def worker_of_little_right(rabbitmq: RabbitMQ, broker_url: str) -> Iterator[str]:
    """A URL of a user without rights."""
    rabbitmq.ctl("add_user", "little", "MARK")
    yield broker_url.replace("guest:guest", "little:MARK")
    rabbitmq.ctl("delete_user", "little")


@pytest.mark.slow
def test_missing_rights_of_a_broker_user_are_reported(
    worker_of_little_right: str, settings: dict[str, str], rabbitmq: RabbitMQ
) -> None:
    def with_rights(*patterns: str) -> Report:
        rabbitmq.ctl("set_permissions", "-p", urlsplit(worker_of_little_right).path[1:], "little", *patterns)
        return examine_with_broker(settings, worker_of_little_right)

    nothing = examine_with_broker(settings, worker_of_little_right)
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
def test_an_alarm_of_the_broker_is_reported(settings: dict[str, str], rabbitmq: RabbitMQ) -> None:
    rabbitmq.ctl("set_vm_memory_high_watermark", "absolute", "1000")
    try:
        report = until(lambda: found if "broker" in (found := examine(settings)).bad() else None)
    finally:
        rabbitmq.ctl("set_vm_memory_high_watermark", "absolute", "512MB")

    assert report.bad()["broker"].startswith("wrong: it takes no messages: an alarm of memory or disk space")
    assert "check_local_alarms" in report.bad()["broker"]
    until(lambda: examine(settings).bad() == NO_WORKER)


def test_an_in_memory_broker_is_reported(small_settings: dict[str, str]) -> None:
    assert examine(small_settings).bad()["broker"].startswith("warning: in-memory")


# --- XONE ---


@contextmanager
def server_answering(status: int, body: bytes = b"{}") -> Iterator[str]:
    """A server that gives the same answer to every request."""

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
    ("status", "body", "message"),
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
def test_a_refused_token_is_reported(status: int, body: bytes, message: str, small_settings: dict[str, str]) -> None:
    with server_answering(status, body) as url:
        report = examine(small_settings, XONE_BASE_URL=url)

    assert report.code == 1
    assert report.bad().keys() == {"token", "broker"}
    assert message in report.bad()["token"]
    assert "MARK" not in report.text


def test_wrong_credentials_are_reported(small_settings: dict[str, str], sandbox: Sandbox) -> None:
    report = examine(small_settings, XONE_CLIENT_SECRET="MARK")

    assert "check XONE_CLIENT_ID and XONE_CLIENT_SECRET" in report.bad()["token"]
    assert sandbox.token_requests == 1


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("https://nowhere.invalid", "no machine is known as nowhere.invalid"),
        ("http://127.0.0.1:{free}", " refuses the connection → check host and port in XONE_BASE_URL"),
        ("https://127.0.0.1:{tls}", "no TLS connection to 127.0.0.1"),
    ],
    ids=["name", "connection", "tls"],
)
def test_an_unreachable_xone_is_reported(
    url: str, message: str, small_settings: dict[str, str], rabbitmq: RabbitMQ
) -> None:
    report = examine(small_settings, XONE_BASE_URL=url.format(free=free_port(), tls=rabbitmq.tls_port))

    assert message in report.bad()["XONE"]


def test_an_xone_that_does_not_answer_is_reported(small_settings: dict[str, str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        report = examine(small_settings, XONE_BASE_URL=f"http://127.0.0.1:{silent.getsockname()[1]}")

    assert "does not answer within XONE_TIMEOUT (2 s)" in report.bad()["token"]


def test_tokens_over_plain_http_are_reported(small_settings: dict[str, str]) -> None:
    report = examine(small_settings, XONE_BASE_URL="http://nowhere.invalid", XONE_ALLOW_PLAIN_HTTP="on")

    assert report.bad()["encryption"].startswith("warning: tokens and personal data go to nowhere.invalid in clear")


# --- The output ---


def test_the_table_fits_80_columns(settings: dict[str, str]) -> None:
    done = run("doctor", **{**settings, "DATABASE_URL": settings["DATABASE_URL"] + "_gone", "EVENT_LINKS": "maybe"})
    lines = [line.rstrip() for line in done.stdout.splitlines()]

    assert done.returncode == 2
    assert max(map(len, lines)) <= WIDTH
    assert {line[:9].strip() for line in lines if line} >= {"ok", "warning", "wrong"}
    assert {line[:23].strip() for line in lines if "→" in line} == {""}, "the remedy is below the finding"
    assert lines[-2].startswith("2 wrong, 1 warning.")


@pytest.mark.slow
def test_the_report_shows_no_secret_and_no_personal_data(system: System) -> None:
    """Marked values are in correct and wrong settings, in the database and in the queues."""
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
