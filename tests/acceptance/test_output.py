"""The output of all commands: on a terminal and elsewhere, and on errors."""

import csv
import json
import os
import re
import shlex
import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest
from click.testing import CliRunner
from cryptography.fernet import Fernet
from sqlalchemy import update

from models.tables import Confirmation
from tests.support.commands import environment_of
from tests.support.stored import fail
from tests.support.system import PROJECT, terminal
from worker.cli.app import cli
from worker.storage import database

MARK = "Quxomat"
COLOUR = re.compile(r"\x1b\[(?:\d+;)*(?:3[0-8]|9[0-7])[;m]")
CONTROLS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@pytest.fixture
def url(sqlite_url: str) -> str:
    fail(sqlite_url, Fernet.generate_key().decode(), ["offer-1", "offer-2"], error_http_status=422)
    return sqlite_url


def run_on_terminal(url: str, *arguments: str, answer: str = "", **environment: str) -> str:
    _, text = terminal([sys.executable, "-m", "worker", *arguments], environment_of(url) | environment, PROJECT, answer)
    return text


def test_colours_are_used_on_terminals_unless_turned_off(url: str) -> None:
    assert COLOUR.search(run_on_terminal(url, "show", "offer-1"))
    assert not COLOUR.search(run_on_terminal(url, "show", "offer-1", NO_COLOR="1"))
    piped = CliRunner().invoke(cli, ["show", "offer-1"], env={"DATABASE_URL": url})
    assert "\x1b" not in piped.stdout


EACH_BY_ITSELF = """
import os, sys
import worker.cli
from worker.__main__ import main
for command in sys.argv[1].split(";"):
    if not (child := os.fork()):
        sys.argv = ["confirm-offer", *command.split()]
        main()
    os.waitpid(child, 0)
"""


@pytest.mark.slow
def test_no_line_is_wrapped_within_a_word(url: str) -> None:
    """Questions and messages of commands. The commands are imported once, and run one after another."""
    asking = ["purge --older-than 0s", "reprocess"]
    failing = ["resolve offer-1 --partner P-100 --failed not-booked", "show no-such-offer", "rekey", "enqueue -"]
    failing += ["erase --email ada@example.com"]
    environment = environment_of(url) | {"DATA_KEYS": Fernet.generate_key().decode(), "BROKER_URL": "http://nowhere"}
    command = [sys.executable, "-c", EACH_BY_ITSELF, ";".join(asking + failing)]

    _, text = terminal(command, environment, PROJECT, "n\n")

    text = CONTROLS.sub("", text)
    assert text.count("[y/N]") == len(asking)
    assert text.count("confirm-offer: ") >= len(failing)
    assert [line for line in re.split(r"[\r\n]+", text) if len(line) > 80] == []


def test_a_reader_may_close_the_pipe(url: str) -> None:
    program = subprocess.Popen(
        [sys.executable, "-m", "worker", "failed", "--list", "--json"],
        env=environment_of(url), cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert program.stdout is not None
    program.stdout.close()

    assert program.stderr is not None
    assert program.stderr.read() == ""
    program.stderr.close()
    program.wait(30)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_is_not_reported_as_an_unavailable_broker(url: str) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "worker", "failed", "--json"],
            env=environment_of(url), cwd=PROJECT, stdout=full, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip

    assert done.returncode == 1
    assert done.stderr.splitlines()[0] == "confirm-offer: what it writes to is full: No space left on device"


def test_a_defect_is_reported_by_its_place_without_its_text(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise KeyError(MARK)

    monkeypatch.setattr("tasks.operations.failures.groups", broken)

    done = CliRunner().invoke(cli, ["failed"], env={"DATABASE_URL": url})

    assert done.exit_code == 1
    assert done.stderr.startswith("confirm-offer: a defect of this program, please report it: KeyError\n")
    assert "test_output.py" in done.stderr
    assert MARK not in done.output


SLOW = (pytest.param(encoding, marks=pytest.mark.slow) for encoding in ("latin-1", "utf-8"))


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["ascii", *SLOW])
def test_what_an_encoding_can_not_show_is_no_defect(url: str, encoding: str) -> None:
    detail = "Größe 日本語 🎟️ …"
    engine = database.connect(url)
    with engine.begin() as connection:
        connection.execute(update(Confirmation).values(error_detail=detail))
    engine.dispose()
    environment = {**os.environ, **environment_of(url), "PYTHONIOENCODING": encoding, "LC_ALL": "C"}

    def run(*arguments: str) -> str:
        command = [sys.executable, "-m", "worker", *arguments]
        done = subprocess.run(command, env=environment, cwd=PROJECT, capture_output=True, timeout=30)
        assert b"defect" not in done.stderr
        assert done.returncode == 0
        return done.stdout.decode(encoding)

    assert json.loads(run("show", "offer-1", "--json"))["error"]["detail"] == detail
    assert json.loads(run("failed", "--json"))["groups"]
    for command in (["show", "offer-1"], ["failed"], ["failed", "--list"], ["batches"], ["--help"], ["show", "--help"]):
        assert run(*command)


HOSTILE = "=1+1\t\x1b[31m\x9b31m\u202e\u200b\u200d\u200f\u061c\xad\u3164\ufe0f\ufeff\u2028\U000e0041x"
OBEYED = re.compile(
    "[\x00-\x09\x0b-\x1f\x7f-\x9f\xad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff\U000e0000-\U000e0fff]"
)


@pytest.fixture
def hostile_url(sqlite_url: str) -> str:
    """Offers whose ids look like options, with texts that terminals and spreadsheets would obey."""
    keys = Fernet.generate_key().decode()
    texts = {"order_reference": HOSTILE, "error_detail": HOSTILE, "partner_id": "-P"}
    fail(sqlite_url, keys, ["--yes", "~root"], error_http_status=422, **texts)
    fail(sqlite_url, keys, ["-h"], state="needs_review", **texts)
    return sqlite_url


def test_nothing_that_a_terminal_obeys_is_printed(hostile_url: str) -> None:
    def run(*arguments: str) -> str:
        done = CliRunner().invoke(cli, arguments, env={"DATABASE_URL": hostile_url})
        assert done.exit_code in (0, 1, 2), done.output
        assert OBEYED.search(done.output) is None, arguments
        return done.stdout

    run("pause", "--partner", "-x", "--reason", HOSTILE)
    run("reprocess", "--yes", "--code", "http-422", "--reason", HOSTILE)
    run("batch", "show", "1", "--json")
    run("resume", "--partner", "-y")
    run("failed", "--list", "--csv")
    for wrong in ([HOSTILE], [f"--{HOSTILE}"], ["show", "x", HOSTILE], ["show", f"--{HOSTILE}"], ["show", HOSTILE],
                  ["failed", "--since", HOSTILE], ["failed", "--code", HOSTILE], ["failed", "--limit", HOSTILE],
                  ["reprocess", "--offers", HOSTILE], ["resolve", "--partner", HOSTILE, "--failed", "x", "x"],
                  ["resolve", "--partner", "x", "--booking", HOSTILE, "x"], ["batch", "show", HOSTILE],
                  ["enqueue", HOSTILE], ["resume", "--by", HOSTILE], ["erase", "--email", HOSTILE],
                  ["events", "replay", "--since", HOSTILE], ["purge", "--older-than", HOSTILE], ["schema", HOSTILE],
                  ["dead-letters", "list", "--code", HOSTILE]):  # fmt: skip
        run(*wrong)
    for command in (["failed"], ["failed", "--list"], ["batches"], ["show", "--", "--yes"]):
        run(*command)
        shown = json.loads(run(command[0], "--json", *command[1:]))
        if command[0] == "show":
            assert shown["order_reference"] == HOSTILE, "JSON stays exact"


def test_cells_are_no_formulas_and_can_be_read_again(hostile_url: str, tmp_path: Path) -> None:
    def run(*arguments: str) -> str:
        return CliRunner().invoke(cli, arguments, env={"DATABASE_URL": hostile_url}).output

    text = run("failed", "--list", "--csv")
    rows = list(csv.DictReader(StringIO(text, newline="")))

    assert {row["offer_id"] for row in rows} == {"'--yes", "~root"}
    assert {row["partner_id"] for row in rows} == {"'-P"}
    assert not any(cell.startswith(("=", "+", "-", "@", "\t")) for row in rows for cell in row.values())
    (tmp_path / "offers.csv").write_text(text)
    assert "Batch 1 runs: 2 confirmations." in run("reprocess", "--offers", str(tmp_path / "offers.csv"), "--yes")


def test_a_printed_command_is_right_as_it_is(hostile_url: str) -> None:
    done = CliRunner().invoke(cli, ["show", "--", "-h"], env={"DATABASE_URL": hostile_url})

    (command,) = re.findall(r"confirm-offer (resolve .* --failed WHY .*)", done.stdout)
    resolved = CliRunner().invoke(cli, shlex.split(command), env={"DATABASE_URL": hostile_url})
    assert resolved.exit_code == 0, resolved.output
