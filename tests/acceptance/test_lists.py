"""What scripts read: lists of confirmations and of the audit, an event by its id, and errors as JSON."""

import json
from typing import Any

import pytest
from click.testing import CliRunner, Result
from cryptography.fernet import Fernet
from sqlalchemy import select

from models.event import LINKS
from models.states import State
from models.tables import OutboxEvent
from tests.support import confirming
from tests.support.stored import fail
from worker.cli.app import cli
from worker.runtime import Runtime


@pytest.fixture
def url(sqlite_url: str) -> str:
    key = Fernet.generate_key().decode()
    fail(sqlite_url, key, ["a", "b"])
    fail(sqlite_url, key, ["waits"], state=State.PENDING, error_code=None, error_detail=None)
    return sqlite_url


def run(url: str, *arguments: str, **settings: str) -> Result:
    return CliRunner().invoke(cli, arguments, env={"DATABASE_URL": url, **settings})


def content(done: Result) -> Any:
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_confirmations_are_listed_by_state_and_partner(url: str) -> None:
    listed = content(run(url, "confirmations", "--json"))["confirmations"]
    pending = content(run(url, "confirmations", "--state", "pending", "--since", "1h", "--json"))["confirmations"]
    failed = content(run(url, "confirmations", "--state", "failed", "--limit", "1", "--json"))["confirmations"]
    of_others = content(run(url, "confirmations", "--partner", "P-7", "--json"))["confirmations"]

    assert {row["offer_id"] for row in listed} == {"a", "b", "waits"}
    assert [row["offer_id"] for row in pending] == ["waits"]
    assert (len(failed), failed[0]["code"]) == (1, "http-422")
    assert of_others == []
    assert content(run(url, "confirmations", "--until", "1h", "--json"))["confirmations"] == []
    assert run(url, "confirmations", "--csv").stdout.startswith("partner_id,offer_id,order_reference,state,code,")
    assert "no such confirmations" in run(url, "confirmations", "--partner", "P-7").stdout


def test_the_audit_is_listed_by_who_and_when(url: str) -> None:
    run(url, "pause", "--reason", "first", "--by", "Ann O_1")
    run(url, "resume", CONFIRM_OFFER_USER="bob")
    run(url, "pause", "--reason", "second", "--by", "ann", CONFIRM_OFFER_USER="bob")

    rows = content(run(url, "audit", "--json"))["audit"]
    of_ann = content(run(url, "audit", "--by", "ANN", "--json"))["audit"]

    assert [(row["command"], row["reason"], row["by"].split(" (")[0]) for row in rows] == [
        ("pause", "second", "ann"), ("resume", None, "bob"), ("pause", "first", "Ann O_1"),
    ]  # fmt: skip
    assert [row["reason"] for row in of_ann] == ["second", "first"]
    assert [row["reason"] for row in content(run(url, "audit", "--by", "o_", "--json"))["audit"]] == ["first"]
    assert len(content(run(url, "audit", "--command", "pause", "--limit", "1", "--json"))["audit"]) == 1
    assert "bob" in run(url, "audit").stdout


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_an_event_is_shown_by_its_id_without_links(runtime: Runtime, database_url: str) -> None:
    runtime.event_links = True
    confirming.run(runtime)
    with runtime.engine.connect() as connection:
        event_id, payload = connection.execute(select(OutboxEvent.id, OutboxEvent.payload)).one()
    assert all(link in payload for link in LINKS)

    shown = content(run(database_url, "events", "show", str(event_id), "--json"))

    expected = json.loads(payload)
    for link in LINKS:
        del expected["data"]["booking"][link]
    assert shown == {"event": expected, "published_at": None}


@pytest.mark.parametrize(
    ("arguments", "kind", "message", "exit_code"),
    [
        (["show", "gone"], "failed", "no confirmation of offer or order gone", 1),
        (["show"], "usage", "Missing argument 'OFFER_ID'.", 2),
        (["confirmations", "--state", "gone"], "usage", "'gone' is not one of", 2),
        (["events", "show", "01890a5d-ac96-774b-bcce-b302099a8057"], "failed", "no event has the id", 1),
        (["batch", "cancel", "7"], "failed", "7", 1),
        (["doctors"], "usage", "No such command", 2),
    ],
)
def test_errors_are_json_as_well(arguments: list[str], kind: str, message: str, exit_code: int, url: str) -> None:
    as_text, done = run(url, *arguments), run(url, *arguments, "--json")

    error = json.loads(done.stdout)["error"]
    assert (error["kind"], error["exit_code"], done.exit_code) == (kind, exit_code, exit_code)
    assert message in error["message"]
    assert (as_text.stdout, as_text.exit_code) == ("", exit_code)
    assert message in done.stderr


def test_a_wrong_setting_is_json_as_well(url: str) -> None:
    done = run("mysql://host/db", "failed", "--json")

    assert json.loads(done.stdout)["error"]["kind"] == "settings"
    assert "DATABASE_URL" in json.loads(done.stdout)["error"]["message"]
