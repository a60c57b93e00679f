"""``withdraw`` from outside: beside a worker that is calling, and for many offers."""

import json

import pytest
from click.testing import CliRunner, Result
from cryptography.fernet import Fernet
from sqlalchemy import select

from models.states import State
from models.tables import AuditEntry
from tests.support.commands import run
from tests.support.stored import fail
from tests.support.system import System, job, until
from worker.cli.app import cli
from worker.storage import database


def run_here(url: str, *arguments: str, stdin: str = "") -> Result:
    return CliRunner().invoke(cli, ["withdraw", *arguments], env={"DATABASE_URL": url}, input=stdin)


def test_many_offers_are_withdrawn_and_what_is_booked_is_named(sqlite_url: str) -> None:
    keys = Fernet.generate_key().decode()
    fail(sqlite_url, keys, ["a", "b"])
    fail(sqlite_url, keys, ["fine"], state=State.CONFIRMED, error_code=None, error_detail=None)
    file = "offer_id,partner_id\na,P-100\nb,\nfine,P-100\nunseen,P-200\na,P-100\n"

    done = run_here(sqlite_url, "--offers", "-", "--partner", "P-100", "--reason", "called off", "--yes", stdin=file)

    assert done.exit_code == 1
    assert done.stdout.splitlines() == [
        "3 offers: withdrawn",
        "1 offer: booked before, and left so",
        "  P-100 fine: confirmed",
    ]
    engine = database.connect(sqlite_url)
    with engine.connect() as connection:
        entries = connection.execute(select(AuditEntry.command, AuditEntry.reason, AuditEntry.details)).all()
    engine.dispose()
    assert {(entry.command, entry.reason) for entry in entries} == {("withdraw", "called off")}
    assert [entry.details["offer"] for entry in entries] == ["a", "b", "fine", "unseen"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either OFFER_ID or --offers FILE"),
        (["a", "--offers", "-", "--partner", "P"], "give either OFFER_ID or --offers FILE"),
        (["a"], "offer a has no partner"),
        (["a b", "--partner", "P"], "can't be the id of an offer"),
        (["a", "--partner", "P", "--reason", " "], "say why"),
        (["a", "--partner", "P"], "there is no terminal to ask on, so nothing was changed"),
    ],
)
def test_wrong_usage_changes_nothing(sqlite_url: str, arguments: list[str], message: str) -> None:
    reason = [] if "--reason" in arguments else ["--reason", "x"]

    done = run_here(sqlite_url, *arguments, *reason)

    assert (done.exit_code, message in done.stderr) == (2, True), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "result"), [("", "booked"), ("~http-503", "withdrawn")])
def test_a_call_under_way_is_waited_for(system: System, fault: str, result: str) -> None:
    system.sandbox.latency = 6.0  # longer than the command takes to begin
    system.start_worker(XONE_TIMEOUT="30")
    system.publish([job(f"offer-1{fault}")])
    until(lambda: State.CONFIRMING in system.states())

    chosen = f"offer-1{fault}", "--partner", "P-100"
    done = run("withdraw", *chosen, "--reason", "x", "--yes", "--json", DATABASE_URL=system.database_url)

    assert done.returncode == (0 if result == "withdrawn" else 1), done.stderr
    assert done.stderr == "1 offer with a worker: waiting for what comes of the call\n"
    (offer,) = json.loads(done.stdout)["offers"]
    assert offer["result"] == result
    assert len(system.sandbox.calls) == 1
    assert len(system.until_events(1)) == 1
