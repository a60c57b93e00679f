"""Commands, run as programs."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from models.states import State
from tests.support.commands import run
from tests.support.system import PROJECT, System, job, until
from worker.cli.app import cli
from worker.messaging import topology
from worker.sandbox.server import Sandbox

REQUIRED = {"XONE_CLIENT_ID": "id", "XONE_CLIENT_SECRET": "hush-hush", "DATA_KEYS": "A" * 43 + "="}


def test_all_missing_settings_are_named_in_one_line() -> None:
    assert run("worker").stderr == (
        "confirm-offer: DATA_KEYS is not set; XONE_CLIENT_ID is not set; XONE_CLIENT_SECRET is not set\n"
    )


def test_celery_ends_with_the_same_line_if_settings_are_missing() -> None:
    done = run_celery()

    assert done.returncode == 2
    assert done.stderr == run("worker").stderr


def run_celery(**settings: str) -> subprocess.CompletedProcess[str]:
    """Starts the worker with Celery's command."""
    return subprocess.run(
        [sys.executable, "-m", "celery", "-A", "worker", "worker"],
        env={"PATH": os.environ["PATH"], **settings},
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def run_here(*arguments: str, **settings: str) -> Result:
    """Runs a command in this process, which is faster."""
    return CliRunner().invoke(cli, arguments, env=settings)


def test_a_wrong_setting_is_named_without_its_value() -> None:
    done = run("worker", **REQUIRED | {"DATA_KEYS": "secret-but-wrong", "RETRY_MAX_AGE": "soon"})

    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "DATA_KEYS" in done.stderr
    assert "RETRY_MAX_AGE" in done.stderr
    assert "secret-but-wrong" not in done.stderr


@pytest.mark.parametrize(
    ("start", "wrong", "named"),
    [
        (partial(run, "worker"), {"XONE_BASE_URL": "http://xone.example"}, "XONE_ALLOW_PLAIN_HTTP"),
        (run_celery, {"SENTRY_DSN": "hush-hush"}, "SENTRY_DSN"),
    ],
    ids=["worker", "celery"],
)
def test_wrong_combinations_are_found_at_start(
    start: Callable[..., subprocess.CompletedProcess[str]], wrong: dict[str, str], named: str
) -> None:
    done = start(**REQUIRED | wrong)

    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert named in done.stderr
    assert "hush-hush" not in done.stderr


def test_a_new_database_is_upgraded_and_checked(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/new.db"

    before = run_here("db", "check", DATABASE_URL=url)
    upgraded = run_here("db", "upgrade", DATABASE_URL=url)
    after = run_here("db", "check", DATABASE_URL=url)

    assert (before.exit_code, upgraded.exit_code, after.exit_code) == (1, 0, 0)
    assert "run 'confirm-offer db upgrade'" in before.stderr


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["db", "check"], "database: 127.0.0.1:1, database x: can't be reached: nothing listens there; "),
        (["show", "offer-1"], "database: 127.0.0.1:1, database x: can't be reached: nothing listens there; "),
        (["broker", "declare"], "broker: 127.0.0.1:1, virtual host /: can't be reached (ConnectionRefusedError); "),
    ],
)
def test_an_unavailable_server_is_one_line(command: list[str], message: str) -> None:
    unavailable = {
        "DATABASE_URL": "postgresql+psycopg://user:hush@127.0.0.1:1/x",
        "BROKER_URL": "amqp://guest:hush@127.0.0.1:1//",
    }

    done = run_here(*command, **unavailable)

    assert done.exit_code == 1
    assert done.stderr.startswith(f"confirm-offer: {message}")
    assert len(done.stderr.splitlines()) == 1
    assert "hush" not in done.stderr


@pytest.mark.parametrize("upgrade", [True, False])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("garbage.db", "the file is no SQLite database; check DATABASE_URL"),
        ("gone/new.db", "there is no folder "),
        ("", " is a folder; put the name of a file behind it in DATABASE_URL"),
    ],
)
def test_an_unusable_sqlite_file_is_one_line(name: str, message: str, upgrade: bool, tmp_path: Path) -> None:
    (tmp_path / "garbage.db").write_bytes(b"no database at all" * 100)

    done = run_here(*(["db", "upgrade"] if upgrade else ["failed"]), DATABASE_URL=f"sqlite:///{tmp_path}/{name}")

    assert (done.exit_code, len(done.stderr.splitlines())) == (1, 1)
    assert message in done.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda url: url.replace("guest:guest", "guest:MARK"), "user or password is not accepted; check user and "),
        (lambda url: url + "-gone", "there is no such virtual host; check the end of BROKER_URL"),
        (lambda url: url.replace("127.0.0.1", "nowhere.invalid"), "no machine has this name; check the host in BROKER"),
        (lambda url: url.replace("amqp:", "amqps:"), "does not speak TLS; check the port in BROKER_URL"),
    ],
    ids=["password", "vhost", "host", "tls"],
)
def test_an_unusable_broker_is_one_line(change: Callable[[str], str], message: str, broker_url: str) -> None:
    done = run_here("dead-letters", "list", BROKER_URL=change(broker_url))

    assert (done.exit_code, len(done.stderr.splitlines())) == (1, 1)
    assert message in done.stderr
    assert "MARK" not in done.stderr


def test_a_port_that_is_taken_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        done = run_here("sandbox", "--port", str(port))

    reason = f"can't listen on port {port} of 127.0.0.1: another program has taken it; choose another with --port"
    assert (done.exit_code, done.stderr) == (1, f"confirm-offer: {reason}\n")


@pytest.mark.parametrize(
    ("code", "hint"), [("HTTP-422", "did you mean http-422?"), ("timeuot", "did you mean timeout?"), ("x", "http-NNN")]
)
def test_an_unknown_code_is_named(code: str, hint: str, sqlite_url: str) -> None:
    done = run_here("failed", "--code", code, DATABASE_URL=sqlite_url)

    assert done.exit_code == 2
    assert f"{code} is no code; " in done.stderr
    assert hint in done.stderr


def test_show_without_tables_names_the_command_to_run(tmp_path: Path) -> None:
    done = run_here("show", "offer-1", DATABASE_URL=f"sqlite:///{tmp_path}/empty.db")

    assert done.exit_code == 1
    assert "run 'confirm-offer db upgrade'" in done.stderr


def test_enqueue_checks_all_jobs_and_publishes_the_valid_ones(broker_url: str, tmp_path: Path) -> None:
    file = tmp_path / "jobs.jsonl"
    lines = [json.dumps(job(f"offer-{number}")) for number in range(1200)]
    file.write_text("\n".join([*lines[:600], '{"partner_id": "P"}', "", "no json", *lines[600:]]) + "\n")

    done = run("enqueue", str(file), BROKER_URL=broker_url)

    assert done.returncode == 1
    assert done.stdout.strip() == f"1,200 published, 2 not; the bad lines are in {file}.rejected"
    assert [line.split(":")[:2] for line in done.stderr.splitlines()] == [
        ["line 601", " invalid-job"],
        ["line 603", " invalid-json"],
    ]


def test_a_job_is_enqueued_confirmed_and_shown(system: System) -> None:
    system.start_worker()

    done = run("enqueue", "-", "--json", stdin=json.dumps(job("offer-1~http-500~1")), BROKER_URL=system.broker_url)
    assert done.returncode == 0
    report = json.loads(done.stdout)
    assert (report["published"], report["bad"], report["refused"]) == (1, [], [])
    system.until_events(1)
    shown = run("show", "offer-1~http-500~1", "--json", DATABASE_URL=system.database_url)
    screen = run("show", "offer-1~http-500~1", "--partner", "P-100", DATABASE_URL=system.database_url)

    content = json.loads(shown.stdout)
    assert set(content) == {
        "partner_id", "offer_id", "order_reference", "state", "error", "next_attempt_at", "attempts", "booking",
        "policies", "events",
    }  # fmt: skip
    assert (content["state"], content["error"], content["next_attempt_at"]) == ("confirmed", None, None)
    assert [(attempt["number"], attempt["outcome"], attempt["code"]) for attempt in content["attempts"]] == [
        (1, "unknown", "http-500"),
        (2, "booked", None),
    ]
    assert set(content["attempts"][0]) == {"number", "started_at", "duration_ms", "outcome", "http_status", "code"}
    (event,) = content["events"]
    assert (event["id"], event["type"], event["sequence"]) == (system.events[0]["id"], "booking.confirmed", 1)
    assert event["published_at"].endswith("Z")
    assert content["booking"]["price"] == system.events[0]["data"]["booking"]["price"]
    assert screen.returncode == 0
    assert max(len(line) for line in screen.stdout.splitlines()) <= 80
    for value in ("Ada", "Lovelace", "ada@example.com"):
        assert value not in shown.stdout + screen.stdout


def test_show_says_that_an_offer_is_unknown(sqlite_url: str) -> None:
    done = run_here("show", "nowhere", DATABASE_URL=sqlite_url)

    assert done.exit_code == 1
    assert done.stderr == (
        "confirm-offer: no confirmation of offer or order nowhere; its job may wait in the queue still, or be a dead "
        "letter: 'confirm-offer dead-letters list'\n"
    )


def test_a_second_broker_declare_changes_nothing(broker_url: str) -> None:
    first, second = (run_here("broker", "declare", BROKER_URL=broker_url) for _ in range(2))

    assert (first.exit_code, second.exit_code) == (0, 0)
    assert f"declared queue {topology.JOBS}" in first.stdout


def test_the_sandbox_runs_as_a_command() -> None:
    command = [sys.executable, "-m", "worker", "sandbox", "--port", "0"]
    with subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, text=True) as program:
        assert program.stdout is not None
        line = program.stdout.readline()
        try:
            program.send_signal(signal.SIGINT)
            assert program.wait(30) == 0
        finally:
            program.kill()
    assert "stand-in of XONE at http://127.0.0.1:" in line


def test_keygen_prints_a_valid_key() -> None:
    key = run_here("keygen").stdout.strip()

    done = run("worker", **REQUIRED | {"DATA_KEYS": key, "XONE_CLIENT_ID": ""})
    assert done.returncode == 2
    assert "DATA_KEYS" not in done.stderr


def test_a_refused_offer_is_shown_with_its_reason(system: System, sandbox: Sandbox) -> None:
    system.start_worker()
    system.publish([job("offer-1~http-422")])
    until(lambda: system.states()[State.FAILED] == 1)

    content = json.loads(run("show", "offer-1~http-422", "--json", DATABASE_URL=system.database_url).stdout)

    assert content["error"]["code"] == "http-422"
    (event,) = system.until_events(1)
    assert event["type"] == "confirmation.failed"
    assert event["data"]["error"] == {**content["error"], "attempts": 1}
