"""``show`` and ``resolve``, run as programs: what a person sees and changes, and what consumers get of it."""

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
OF_THE_PERSON = ("Ada", "Lovelace", "ada@example.com", "7700 900123", "Square", "Countess", "Grace")
TOLD = {
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
def confirmed(runtime: Runtime) -> Callable[..., None]:
    """Puts an offer through one attempt, in this runtime."""

    def go(offer_id: str, **changes: Any) -> None:
        content = job(offer_id, **{"policyholder": PERSON, **changes})
        lease = confirm.accept_job(json.dumps(content).encode(), Delivery(), runtime)
        if lease is not None:
            confirm.attempt(lease, runtime)

    return go


def again(runtime: Runtime, offer_id: str) -> None:
    with runtime.engine.begin() as connection:
        its_id = connection.execute(
            update(Confirmation)
            .where(Confirmation.offer_id == offer_id)
            .values(due_at=now_plus(-1.0))
            .returning(Confirmation.id)
        ).scalar_one()
    lease = confirm.lease_due(its_id, runtime)
    assert lease is not None
    confirm.attempt(lease, runtime)


def review(runtime: Runtime, sandbox: Sandbox, confirmed: Callable[..., None], offer_id: str) -> None:
    sandbox.bookings_mode = "forbidden"
    confirmed(offer_id)
    again(runtime, offer_id)


@pytest.fixture(autouse=True)
def _at_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console.out, "width", 80)


def here(*arguments: str, stdin: str | None = None, **settings: str) -> Result:
    """As ``run``, in this runtime, which is quicker."""
    return CliRunner().invoke(cli, arguments, input=stdin, env={"DATA_KEYS": "", **settings})


def shown(*arguments: str, **settings: str) -> str:
    """The screen, which fits 80 columns and has no colours."""
    done = here("show", *arguments, **settings)
    assert (done.exit_code, done.stderr) == (0, "")
    return fits(done.stdout)


def fits(screen: str) -> str:
    assert max(len(line) for line in screen.splitlines()) <= 80
    assert "\x1b" not in screen
    return screen


def audits(runtime: Runtime) -> list[Any]:
    with runtime.engine.connect() as connection:
        return list(connection.execute(select(AuditEntry.__table__).order_by(AuditEntry.id)))


# --- show ---


def test_a_booked_offer_on_one_screen(
    runtime: Runtime, confirmed: Callable[..., None], settings: dict[str, str]
) -> None:
    confirmed("offer-1", quotes=[{"id": "q-1", "insured": [{"first_name": "Grace", "last_name": "Hopper"}]}])

    screen = fits(run("show", "offer-1", **settings).stdout)

    lines = [re.split(r"\s{2,}", line.strip()) for line in screen.splitlines()]
    assert ["state", "confirmed"] in lines
    assert ["order", "SO-offer-1"] in lines
    assert ["policyholder", "A•• L•••••••", "a••@e••••••.com", "+•• •••• ••••••", "GB"] in lines
    assert ["insured", "G•••• H•••••"] in lines
    assert ["#", "started", "took", "outcome", "answer"] in lines
    assert any(line[0] == "1" and line[3:] == ["booked", "201"] for line in lines)
    assert any(line[:2] == ["1", "booking.confirmed"] and line[3] == "not yet" for line in lines)
    assert any(line[:3] == ["event_ticket_protection", "ETP-01", "CONFIRMED"] for line in lines)
    for mark in (*OF_THE_PERSON, "https://", "security_token"):
        assert mark not in screen
    assert audits(runtime) == []


def test_without_data_keys_the_sealed_parts_are_left_out(
    confirmed: Callable[..., None], settings: dict[str, str]
) -> None:
    confirmed("offer-1")
    other_key = Fernet.generate_key().decode()

    for keys in ({}, {"DATA_KEYS": other_key}):
        screen = shown("offer-1", DATABASE_URL=settings["DATABASE_URL"], **keys)
        assert "policyholder" not in screen
        assert "confirmed" in screen


def test_json_has_the_promised_keys_and_nothing_of_a_person(
    sandbox: Sandbox, confirmed: Callable[..., None], settings: dict[str, str]
) -> None:
    confirmed("offer-1")
    upstream = sandbox.bookings["P-100", "offer-1"]

    done = here("show", "SO-offer-1", "--json", **settings)

    told = json.loads(done.stdout)
    assert set(told) == TOLD
    assert told["offer_id"] == "offer-1"
    for mark in (*OF_THE_PERSON, upstream["security_token"], upstream["coi"]["pdf"], upstream["account_url"]):
        assert mark not in done.stdout


def test_reveal_opens_all_that_is_sealed_and_is_audited(
    runtime: Runtime, sandbox: Sandbox, confirmed: Callable[..., None], settings: dict[str, str]
) -> None:
    confirmed("offer-1~html~1")
    again(runtime, "offer-1~html~1")
    upstream = sandbox.bookings["P-100", "offer-1~html~1"]

    told = json.loads(here("show", "offer-1~html~1", "--reveal", "--json", **settings).stdout)
    screen = fits(run("show", "offer-1~html~1", "--reveal", **settings).stdout)

    assert set(told) == TOLD | {"revealed"}
    revealed = told["revealed"]
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
    entries = audits(runtime)
    assert [(entry.command, entry.count) for entry in entries] == [("show --reveal", 1)] * 2
    assert entries[0].details == {"partner": "P-100", "offer": "offer-1~html~1"}
    assert "@" in entries[0].by


def test_reveal_needs_the_right_keys_and_else_shows_and_audits_nothing(
    runtime: Runtime, confirmed: Callable[..., None], settings: dict[str, str]
) -> None:
    confirmed("offer-1")

    without = run("show", "offer-1", "--reveal", DATABASE_URL=settings["DATABASE_URL"])
    wrong = here("show", "offer-1", "--reveal", **settings | {"DATA_KEYS": Fernet.generate_key().decode()})

    assert (without.returncode, without.stderr) == (2, "confirm-offer: DATA_KEYS is not set\n")
    assert (wrong.exit_code, wrong.stdout) == (1, "")
    assert "add the key that was in use when it was stored" in wrong.stderr
    assert audits(runtime) == []


def test_needs_review_says_what_to_do(
    runtime: Runtime, sandbox: Sandbox, confirmed: Callable[..., None], settings: dict[str, str]
) -> None:
    review(runtime, sandbox, confirmed, "offer-1~drop-after~1")

    screen = shown("SO-offer-1", **settings)

    assert "needs_review" in screen
    assert "already-booked: XONE says that a booking exists as INS-" in screen
    assert screen.endswith(
        "Look in XONE whether a booking exists, then do one of\n"
        "  confirm-offer resolve offer-1~drop-after~1 --partner P-100 --booking FILE\n"
        "  confirm-offer resolve offer-1~drop-after~1 --partner P-100 --failed WHY\n"
    )


def test_retrying_says_when_next_and_paused_says_why(
    runtime: Runtime, confirmed: Callable[..., None], settings: dict[str, str]
) -> None:
    confirmed("offer-1~http-503")
    with runtime.engine.begin() as connection:
        connection.execute(update(Confirmation).values(due_at=now_plus(600.0)))
    retrying = shown("offer-1~http-503", **settings)
    with runtime.engine.begin() as connection:
        connection.execute(update(Confirmation).values(due_at=now_plus(-600.0)))
    overdue = shown("offer-1~http-503", **settings)
    with runtime.engine.begin() as connection:
        pauses.pause(connection, "P-200", "of another partner", "bob@here")
        pauses.pause(connection, "P-100", "maintenance of XONE until six", "ann@here")
        pauses.pause(connection, pause_cache.ALL, "all of it", "ann@here")
    paused = shown("offer-1~http-503", **settings)

    assert re.search(r"next attempt +\d{4}-\d\d-\d\d \d\d:\d\d:\d\d, in 10 min", retrying)
    assert "why           http-503: XONE answered 503 Service Unavailable" in retrying
    assert " 10 min ago: the workers are behind, or none runs" in " ".join(overdue.split())
    assert "next attempt  once calls are resumed" in paused
    words = " ".join(paused.split())
    assert re.search(r" paused calls for P-100, since [-0-9 :]+, by ann@here: maintenance of XONE until six ", words)
    assert re.search(r" paused all calls, since [-0-9 :]+, by ann@here: all of it ", words)
    assert "another partner" not in paused


def test_the_batch_it_is_in_is_shown(
    runtime: Runtime, confirmed: Callable[..., None], settings: dict[str, str]
) -> None:
    for number in (1, 2):
        confirmed(f"offer-{number}~http-422")
    with runtime.engine.begin() as connection:
        ids = list(connection.execute(select(Confirmation.id).order_by(Confirmation.offer_id)).scalars())
        first = batches.create(connection, ids, Selection(), "after the outage", "ann@here", None)
        assert batches.feed(connection, first, 1, (), 60.0) == ids[:1]

    assert "batch         1, under way, by ann@here: after the outage" in shown("offer-1~http-422", **settings)
    assert "batch         1, waits for its turn, by ann@here: after" in shown("offer-2~http-422", **settings)


def test_an_id_goes_before_an_order_and_what_is_not_unique_is_listed(
    confirmed: Callable[..., None], settings: dict[str, str]
) -> None:
    confirmed("offer-1", order_reference="SO-1")
    confirmed("offer-2", order_reference="SO-1")
    confirmed("SO-1", order_reference="SO-9")
    confirmed("offer-2", partner_id="P-200", order_reference="SO-1")

    assert "offer SO-1" in shown("SO-1", **settings)
    assert "offer offer-2" in shown("SO-1", "--partner", "P-200", **settings)
    several = here("show", "offer-2", **settings)
    assert several.exit_code == 1
    assert "several partners have offer offer-2: P-100, P-200; choose one with --partner" in several.stderr


def test_an_order_of_several_offers_names_them(confirmed: Callable[..., None], settings: dict[str, str]) -> None:
    confirmed("offer-1", order_reference="SO-1")
    confirmed("offer-2", order_reference="SO-1")

    several = here("show", "SO-1", "--partner", "P-100", **settings)

    assert several.exit_code == 1
    assert "order SO-1 has 2 offers: offer-1 (P-100), offer-2 (P-100)" in several.stderr


def test_no_value_reaches_the_terminal_as_a_command_or_markup(
    runtime: Runtime, confirmed: Callable[..., None], settings: dict[str, str]
) -> None:
    odd = {**PERSON, "first_name": "\x1b[2J\u202eAda", "last_name": "[bold]Love[/nothing]"}
    confirmed("offer-1", order_reference="[/red] [blink]SO", policyholder=odd)
    with runtime.engine.begin() as connection:
        connection.execute(update(Booking).values(status="\x1b]0;x\x07[link=x]", currency="\r\n"))

    for options in ([], ["--reveal"]):
        screen = shown("offer-1", *options, **settings)
        assert "[/red] [blink]SO" in screen
        assert not set(screen) & set("\x1b\x07\r\u202e")


# --- resolve ---


def test_a_booking_that_a_person_found_is_stored_and_told_to_consumers(system: System, tmp_path: Path) -> None:
    offer_id = "offer-1~drop-after~1"
    system.sandbox.bookings_mode = "forbidden"
    system.start_worker()
    system.publish([job(offer_id)])
    until(lambda: system.states()[State.NEEDS_REVIEW] == 1)
    file = tmp_path / "booking.json"
    file.write_text(json.dumps({"data": system.sandbox.bookings["P-100", offer_id]}, default=str))
    needs = {"DATABASE_URL": system.database_url, "DATA_KEYS": system.environment["DATA_KEYS"]}

    done = run(
        "resolve", offer_id, "--partner", "P-100", "--booking", str(file), "--reason", "seen in XONE", "--json", **needs
    )

    assert (done.returncode, done.stderr) == (0, "")
    told = json.loads(done.stdout)
    booking_id = system.sandbox.bookings["P-100", offer_id]["id"]
    assert (told["state"], told["booking_id"]) == ("confirmed", booking_id)
    assert told["event"] == {"type": "booking.confirmed", "sequence": 2}
    review, event = system.until_events(2)
    assert (review["type"], event["type"]) == ("confirmation.needs_review", "booking.confirmed")
    assert event["data"]["booking"]["id"] == booking_id
    assert event["data"]["sequence"] == 2
    until(lambda: json.loads(run("show", offer_id, "--json", **needs).stdout)["events"][1]["published_at"])
    assert len(system.sandbox.calls) == 2, "XONE was not called for it"


def test_what_a_person_found_to_be_failed(
    runtime: Runtime, sandbox: Sandbox, confirmed: Callable[..., None], settings: dict[str, str]
) -> None:
    review(runtime, sandbox, confirmed, "offer-1~drop-after~1")
    needs = {"DATABASE_URL": settings["DATABASE_URL"]}
    arguments = ("resolve", "offer-1~drop-after~1", "--partner", "P-100", "--failed", "no booking, ticket 7")

    done, again = run(*arguments, **needs), here(*arguments, **needs)

    assert (done.returncode, done.stderr) == (0, "")
    assert "offer offer-1~drop-after~1 of P-100 is failed" in done.stdout
    assert "event confirmation.failed" in done.stdout
    assert again.exit_code == 1
    assert "is failed, not needs_review" in again.stderr
    screen = shown("offer-1~drop-after~1", **settings)
    assert "resolved: no booking, ticket 7" in screen
    (entry,) = audits(runtime)
    assert (entry.command, entry.reason, "@" in entry.by) == ("resolve", "no booking, ticket 7", True)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("<html>", "the booking is no JSON: line 1 column 1"),
        ('{"data": {"id": "INS-1"}}', "the booking lacks a usable offer_id"),
        ('{"data": {"id": "INS-1", "offer_id": "other"}}', "the booking is of another offer: other, not offer-1"),
        ('{"id": "INS-1", "offer_id": "offer-1"}', "no confirmation of offer offer-1 and partner P-100"),
    ],
)
def test_a_booking_that_does_not_fit_is_refused_in_one_line(settings: dict[str, str], content: str, says: str) -> None:
    done = here("resolve", "offer-1", "--partner", "P-100", "--booking", "-", stdin=content, **settings)

    assert done.exit_code == 1
    assert done.stderr.startswith(f"confirm-offer: {says}")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ([], "give either --booking FILE or --failed WHY"),
        (["--failed", "x", "--booking", "-"], "give either --booking FILE or --failed WHY"),
        (["--failed", "x" * 501], "501 characters; at most 500 are accepted"),
        (["--failed", "a\nb"], "control characters and line breaks are not accepted"),
        (["--failed", " "], "a text is needed"),
        (["--booking", "nowhere.json"], "No such file or directory"),
    ],
)
def test_wrong_use_of_resolve(options: list[str], says: str) -> None:
    done = here("resolve", "offer-1", "--partner", "P-100", *options, stdin="{}")

    assert done.exit_code == 2
    assert says in done.stderr


def test_help_of_resolve_says_that_the_reason_goes_to_consumers() -> None:
    told = " ".join(here("resolve", "--help").stdout.split())

    assert "Example: confirm-offer resolve" in told
    assert "WHY is stored as the error's detail and is sent to consumers in the event" in told
