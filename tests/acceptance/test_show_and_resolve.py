"""``show`` and ``resolve`` as programs: what a person sees and changes, and what consumers get."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from cryptography.fernet import Fernet
from sqlalchemy import select, update

from models.states import State
from models.tables import AuditEntry, Booking, Confirmation
from tasks import confirm
from tasks.accept import Delivery
from tasks.operations import batches, pauses
from tasks.operations.failures import Selection
from tests.support.commands import run
from tests.support.system import System, job, until
from worker.cli.app import cli
from worker.cli.ui import console
from worker.runtime import Runtime
from worker.sandbox.server import Sandbox
from worker.storage import pause_cache
from worker.storage.database import now_plus

PERSON = {
    "first_name": "Ada",
    "last_name": "Lovelace",
    "country": "GB",
    "email": "ada@example.com",
    "phone": "+44 7700 900123",
    "address1": "12 St James's Square",
    "nick": {"of": ["Countess"]},
}
PERSONAL_VALUES = ("Ada", "Lovelace", "ada@example.com", "7700 900123", "Square", "Countess", "Grace")
PUBLIC_KEYS = {
    "partner_id", "offer_id", "order_reference", "state", "error", "next_attempt_at", "attempts", "booking",
    "policies", "events",
}  # fmt: skip


@pytest.fixture
def database_url(sqlite_url: str) -> str:
    return sqlite_url


@pytest.fixture
def settings(runtime: Runtime, environment: dict[str, str], database_url: str) -> dict[str, str]:
    return {"DATABASE_URL": database_url, "DATA_KEYS": environment["DATA_KEYS"], "TZ": "UTC"}


@pytest.fixture
def confirm_offer(runtime: Runtime) -> Callable[..., None]:
    """Accepts a job and makes one attempt, in this runtime."""

    def make_attempt(offer_id: str, **changes: Any) -> None:
        content = job(offer_id, **{"policyholder": PERSON, **changes})
        lease = confirm.accept_job(json.dumps(content).encode(), Delivery(), runtime)
        if lease is not None:
            confirm.attempt(lease, runtime)

    return make_attempt


def make_due_and_attempt(runtime: Runtime, offer_id: str) -> None:
    with runtime.engine.begin() as connection:
        confirmation_id = connection.execute(
            update(Confirmation)
            .where(Confirmation.offer_id == offer_id)
            .values(due_at=now_plus(-1.0))
            .returning(Confirmation.id)
        ).scalar_one()
    lease = confirm.lease_due(confirmation_id, runtime)
    assert lease is not None
    confirm.attempt(lease, runtime)


def bring_to_review(runtime: Runtime, sandbox: Sandbox, confirm_offer: Callable[..., None], offer_id: str) -> None:
    sandbox.bookings_mode = "forbidden"
    confirm_offer(offer_id)
    make_due_and_attempt(runtime, offer_id)


@pytest.fixture(autouse=True)
def _at_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console.out, "width", 80)


def run_here(*arguments: str, stdin: str | None = None, **settings: str) -> Result:
    """As ``run``, but in this process, which is faster."""
    return CliRunner().invoke(cli, arguments, input=stdin, env={"DATA_KEYS": "", **settings})


def show(*arguments: str, **settings: str) -> str:
    """Runs ``show``. Returns the screen, which fits 80 columns and has no colours."""
    done = run_here("show", *arguments, **settings)
    assert (done.exit_code, done.stderr) == (0, "")
    return checked_screen(done.stdout)


def checked_screen(screen: str) -> str:
    assert max(len(line) for line in screen.splitlines()) <= 80
    assert "\x1b" not in screen
    return screen


def audit_entries(runtime: Runtime) -> list[Any]:
    with runtime.engine.connect() as connection:
        return list(connection.execute(select(AuditEntry.__table__).order_by(AuditEntry.id)))


# --- Show ---


def test_a_booked_offer_is_shown_on_one_screen(
    runtime: Runtime, confirm_offer: Callable[..., None], settings: dict[str, str]
) -> None:
    confirm_offer("offer-1", quotes=[{"id": "q-1", "insured": [{"first_name": "Grace", "last_name": "Hopper"}]}])

    screen = checked_screen(run("show", "offer-1", **settings).stdout)

    lines = [re.split(r"\s{2,}", line.strip()) for line in screen.splitlines()]
    assert ["state", "confirmed"] in lines
    assert ["order", "SO-offer-1"] in lines
    assert ["policyholder", "A•• L•••••••", "a••@e••••••.com", "+•• •••• ••••••", "GB"] in lines
    assert ["insured", "G•••• H•••••"] in lines
    assert ["#", "started", "took", "outcome", "answer"] in lines
    assert any(line[0] == "1" and line[3:] == ["booked", "201"] for line in lines)
    assert any(line[:2] == ["1", "booking.confirmed"] and line[3] == "not yet" for line in lines)
    assert any(line[:3] == ["event_ticket_protection", "ETP-01", "CONFIRMED"] for line in lines)
    for mark in (*PERSONAL_VALUES, "https://", "security_token"):
        assert mark not in screen
    assert audit_entries(runtime) == []


def test_without_data_keys_the_encrypted_parts_are_left_out(
    confirm_offer: Callable[..., None], settings: dict[str, str]
) -> None:
    confirm_offer("offer-1")
    other_key = Fernet.generate_key().decode()

    for keys in ({}, {"DATA_KEYS": other_key}):
        screen = show("offer-1", DATABASE_URL=settings["DATABASE_URL"], **keys)
        assert "policyholder" not in screen
        assert "confirmed" in screen


def test_json_has_the_promised_keys_and_no_personal_data(
    sandbox: Sandbox, confirm_offer: Callable[..., None], settings: dict[str, str]
) -> None:
    confirm_offer("offer-1")
    upstream = sandbox.bookings["P-100", "offer-1"]

    done = run_here("show", "SO-offer-1", "--json", **settings)

    content = json.loads(done.stdout)
    assert set(content) == PUBLIC_KEYS
    assert content["offer_id"] == "offer-1"
    for mark in (*PERSONAL_VALUES, upstream["security_token"], upstream["coi"]["pdf"], upstream["account_url"]):
        assert mark not in done.stdout


def test_reveal_decrypts_all_values_and_is_audited(
    runtime: Runtime, sandbox: Sandbox, confirm_offer: Callable[..., None], settings: dict[str, str]
) -> None:
    confirm_offer("offer-1~html~1")
    make_due_and_attempt(runtime, "offer-1~html~1")
    upstream = sandbox.bookings["P-100", "offer-1~html~1"]

    content = json.loads(run_here("show", "offer-1~html~1", "--reveal", "--json", **settings).stdout)
    screen = checked_screen(run("show", "offer-1~html~1", "--reveal", **settings).stdout)

    assert set(content) == PUBLIC_KEYS | {"revealed"}
    revealed = content["revealed"]
    assert revealed["policyholder"]["sent"] == PERSON
    assert revealed["policyholder"]["returned"]["email"] == upstream["policyholder"]["email"]
    assert revealed["insured"] == [{"quote_id": "quote-offer-1", "first_name": "Ada"}]
    assert revealed["links"]["coi"] == {"url": upstream["coi"]["url"], "pdf": upstream["coi"]["pdf"]}
    assert revealed["links"]["account_url"] == upstream["account_url"]
    assert revealed["security_token"] == upstream["security_token"]
    assert [answer["attempt"] for answer in revealed["answers"]] == [1]
    assert "<html>" in revealed["answers"][0]["body"]
    for part in ("ada@example.com", "Lovelace", "Countess", upstream["security_token"], "<html>"):
        assert part in screen
    assert "•" not in screen
    entries = audit_entries(runtime)
    assert [(entry.command, entry.count) for entry in entries] == [("show --reveal", 1)] * 2
    assert entries[0].details == {"partner": "P-100", "offer": "offer-1~html~1"}
    assert "@" in entries[0].by


def test_reveal_with_wrong_keys_shows_and_audits_nothing(
    runtime: Runtime, confirm_offer: Callable[..., None], settings: dict[str, str]
) -> None:
    confirm_offer("offer-1")

    without = run("show", "offer-1", "--reveal", DATABASE_URL=settings["DATABASE_URL"])
    wrong = run_here("show", "offer-1", "--reveal", **settings | {"DATA_KEYS": Fernet.generate_key().decode()})

    assert (without.returncode, without.stderr) == (2, "confirm-offer: DATA_KEYS is not set\n")
    assert (wrong.exit_code, wrong.stdout) == (1, "")
    assert "add the key that was in use when it was stored" in wrong.stderr
    assert audit_entries(runtime) == []


def test_a_confirmation_in_needs_review_is_shown_with_what_to_do(
    runtime: Runtime, sandbox: Sandbox, confirm_offer: Callable[..., None], settings: dict[str, str]
) -> None:
    bring_to_review(runtime, sandbox, confirm_offer, "offer-1~drop-after~1")

    screen = show("SO-offer-1", **settings)

    assert "needs_review" in screen
    assert "already-booked: XONE says that a booking exists as INS-" in screen
    assert screen.endswith(
        "Look in XONE whether a booking exists, then do one of\n"
        "  confirm-offer resolve --partner P-100 --booking FILE offer-1~drop-after~1\n"
        "  confirm-offer resolve --partner P-100 --failed WHY offer-1~drop-after~1\n"
    )


def test_a_retry_is_shown_with_its_time_and_a_pause_with_its_reason(
    runtime: Runtime, confirm_offer: Callable[..., None], settings: dict[str, str]
) -> None:
    confirm_offer("offer-1~http-503")
    with runtime.engine.begin() as connection:
        connection.execute(update(Confirmation).values(due_at=now_plus(600.0)))
    retrying = show("offer-1~http-503", **settings)
    with runtime.engine.begin() as connection:
        connection.execute(update(Confirmation).values(due_at=now_plus(-600.0)))
    overdue = show("offer-1~http-503", **settings)
    with runtime.engine.begin() as connection:
        pauses.pause(connection, "P-200", "of another partner", "bob@here")
        pauses.pause(connection, "P-100", "maintenance of XONE until six", "ann@here")
        pauses.pause(connection, pause_cache.ALL, "all of it", "ann@here")
    paused = show("offer-1~http-503", **settings)

    assert re.search(r"next attempt +\d{4}-\d\d-\d\d \d\d:\d\d:\d\d, in 10 min", retrying)
    assert "why           http-503: XONE answered 503 Service Unavailable" in retrying
    assert " 10 min ago; no worker runs that could take it" in " ".join(overdue.split())
    assert "next attempt  once calls are resumed" in paused
    words = " ".join(paused.split())
    assert re.search(r" paused calls for P-100, since [-0-9 :]+, by ann@here: maintenance of XONE until six ", words)
    assert re.search(r" paused all calls, since [-0-9 :]+, by ann@here: all of it ", words)
    assert "another partner" not in paused


def test_the_batch_of_a_confirmation_is_shown(
    runtime: Runtime, confirm_offer: Callable[..., None], settings: dict[str, str]
) -> None:
    for number in (1, 2):
        confirm_offer(f"offer-{number}~http-422")
    with runtime.engine.begin() as connection:
        ids = list(connection.execute(select(Confirmation.id).order_by(Confirmation.offer_id)).scalars())
        first = batches.create(connection, ids, Selection(), "after the outage", "ann@here", None)
        assert batches.feed(connection, first, 1, (), 60.0) == ids[:1]

    assert "batch         1, under way, by ann@here: after the outage" in show("offer-1~http-422", **settings)
    assert "batch         1, waits for its turn, by ann@here: after" in show("offer-2~http-422", **settings)


def test_an_id_takes_precedence_over_an_order_and_ambiguous_matches_are_listed(
    confirm_offer: Callable[..., None], settings: dict[str, str]
) -> None:
    confirm_offer("offer-1", order_reference="SO-1")
    confirm_offer("offer-2", order_reference="SO-1")
    confirm_offer("SO-1", order_reference="SO-9")
    confirm_offer("offer-2", partner_id="P-200", order_reference="SO-1")

    assert "offer SO-1" in show("SO-1", **settings)
    assert "offer offer-2" in show("SO-1", "--partner", "P-200", **settings)
    several = run_here("show", "offer-2", **settings)
    assert several.exit_code == 1
    assert "several partners have offer offer-2: P-100, P-200; choose one with --partner" in several.stderr


def test_an_order_of_several_offers_lists_them(confirm_offer: Callable[..., None], settings: dict[str, str]) -> None:
    confirm_offer("offer-1", order_reference="SO-1")
    confirm_offer("offer-2", order_reference="SO-1")

    several = run_here("show", "SO-1", "--partner", "P-100", **settings)

    assert several.exit_code == 1
    assert "order SO-1 has 2 offers: offer-1 (P-100), offer-2 (P-100)" in several.stderr


def test_no_value_reaches_the_terminal_as_a_command_or_markup(
    runtime: Runtime, confirm_offer: Callable[..., None], settings: dict[str, str]
) -> None:
    hostile = {**PERSON, "first_name": "\x1b[2J\u202eAda", "last_name": "[bold]Love[/nothing]"}
    confirm_offer("offer-1", order_reference="[/red] [blink]SO", policyholder=hostile)
    with runtime.engine.begin() as connection:
        connection.execute(update(Booking).values(status="\x1b]0;x\x07[link=x]", currency="\r\n"))

    for options in ([], ["--reveal"]):
        screen = show("offer-1", *options, **settings)
        assert "[/red] [blink]SO" in screen
        assert not set(screen) & set("\x1b\x07\r\u202e")


# --- Resolve ---


def test_a_booking_found_by_a_person_is_stored_and_published(system: System, tmp_path: Path) -> None:
    offer_id = "offer-1~drop-after~1"
    system.sandbox.bookings_mode = "forbidden"
    system.start_worker()
    system.publish([job(offer_id)])
    until(lambda: system.states()[State.NEEDS_REVIEW] == 1)
    file = tmp_path / "booking.json"
    file.write_text(json.dumps({"data": system.sandbox.bookings["P-100", offer_id]}, default=str))
    command_settings = {"DATABASE_URL": system.database_url, "DATA_KEYS": system.environment["DATA_KEYS"]}

    done = run(
        "resolve",
        offer_id,
        "--partner",
        "P-100",
        "--booking",
        str(file),
        "--reason",
        "seen in XONE",
        "--json",
        **command_settings,
    )

    assert (done.returncode, done.stderr) == (0, "")
    result = json.loads(done.stdout)
    booking_id = system.sandbox.bookings["P-100", offer_id]["id"]
    assert (result["state"], result["booking_id"]) == ("confirmed", booking_id)
    assert result["event"] == {"type": "booking.confirmed", "sequence": 2}
    in_review, event = system.until_events(2)
    assert (in_review["type"], event["type"]) == ("confirmation.needs_review", "booking.confirmed")
    assert event["data"]["booking"]["id"] == booking_id
    assert event["data"]["sequence"] == 2
    until(lambda: json.loads(run("show", offer_id, "--json", **command_settings).stdout)["events"][1]["published_at"])
    assert len(system.sandbox.calls) == 2, "XONE was not called again"


def test_a_confirmation_that_a_person_marks_as_failed_is_published(
    runtime: Runtime, sandbox: Sandbox, confirm_offer: Callable[..., None], settings: dict[str, str]
) -> None:
    bring_to_review(runtime, sandbox, confirm_offer, "offer-1~drop-after~1")
    command_settings = {"DATABASE_URL": settings["DATABASE_URL"]}
    arguments = ("resolve", "offer-1~drop-after~1", "--partner", "P-100", "--failed", "no booking, ticket 7")

    done, repeat = run(*arguments, **command_settings), run_here(*arguments, **command_settings)

    assert (done.returncode, done.stderr) == (0, "")
    assert "offer offer-1~drop-after~1 of P-100 is failed" in done.stdout
    assert "event confirmation.failed" in done.stdout
    assert repeat.exit_code == 1
    assert "is failed, not needs_review" in repeat.stderr
    screen = show("offer-1~drop-after~1", **settings)
    assert "resolved: no booking, ticket 7" in screen
    (entry,) = audit_entries(runtime)
    assert (entry.command, entry.reason, "@" in entry.by) == ("resolve", "no booking, ticket 7", True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("<html>", "the booking is no JSON: line 1 column 1"),
        ('{"data": {"id": "INS-1"}}', "the booking lacks a usable offer_id"),
        ('{"data": {"id": "INS-1", "offer_id": "other"}}', "the booking is of another offer: other, not offer-1"),
        ('{"id": "INS-1", "offer_id": "offer-1"}', "no confirmation of offer offer-1 and partner P-100"),
    ],
)
def test_a_booking_that_does_not_fit_is_refused_in_one_line(
    settings: dict[str, str], content: str, message: str
) -> None:
    done = run_here("resolve", "offer-1", "--partner", "P-100", "--booking", "-", stdin=content, **settings)

    assert done.exit_code == 1
    assert done.stderr.startswith(f"confirm-offer: {message}")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give either --booking FILE or --failed WHY"),
        (["--failed", "x", "--booking", "-"], "give either --booking FILE or --failed WHY"),
        (["--failed", "x" * 501], "501 characters; at most 500 are accepted"),
        (["--failed", "a\nb"], "control characters and line breaks are not accepted"),
        (["--failed", " "], "a text is needed"),
        (["--booking", "nowhere.json"], "No such file or directory"),
    ],
)
def test_wrong_usage_of_resolve_is_refused(options: list[str], message: str) -> None:
    done = run_here("resolve", "offer-1", "--partner", "P-100", *options, stdin="{}")

    assert done.exit_code == 2
    assert message in done.stderr


def test_help_of_resolve_says_that_the_reason_goes_to_consumers() -> None:
    text = " ".join(run_here("resolve", "--help").stdout.split())

    assert "Example: confirm-offer resolve" in text
    assert "WHY is stored as the error's detail and is sent to consumers in the event" in text
