"""Workers follow pending bookings to their end, and ``refresh`` looks at one now."""

import json
from collections import defaultdict
from typing import Any

import pytest
from click.testing import CliRunner, Result
from sqlalchemy import select

from models.states import State
from models.tables import AuditEntry, Confirmation, EarlierBooking, FollowUp
from tests.support.confirming import rows
from tests.support.confirming import run as confirm
from tests.support.system import System, job, until
from worker import runtime as runtimes
from worker.cli.app import cli
from worker.cli.ui import console
from worker.runtime import Runtime
from worker.sandbox.server import Sandbox

FATES = {"CONFIRMED": 150, "FAILED": 30, "PENDING": 20}


@pytest.mark.slow
def test_two_hundred_pending_bookings_come_to_their_end(system: System) -> None:
    """150 are confirmed, 30 fail, 20 stay, with two workers: each is announced once, and explained."""
    statuses = {f"o-{at}~pending": status for at, status in enumerate(s for s, n in FATES.items() for _ in range(n))}
    settings = {"FOLLOW_UP_INTERVAL": "1", "XONE_TIMEOUT": "10", "FOLLOW_UP_MAX_AGE": "3600"}
    workers = [system.start_worker(**settings) for _ in range(2)]
    system.publish(map(job, statuses))
    until(lambda: system.states() == {State.PENDING: 200}, 60)
    for offer, status in statuses.items():
        with system.sandbox.lock:
            booking = system.sandbox.bookings["P-100", offer]
            policies = [policy | {"status": status} for policy in booking["policies"]]
            system.sandbox.bookings["P-100", offer] = booking | {"status": status, "policies": policies}
    until(lambda: system.states() == {State.CONFIRMED: 150, State.CANCELLED: 30, State.PENDING: 20}, 60)
    assert [worker.stop() for worker in workers] == [0, 0]

    system.start_worker(**settings | {"FOLLOW_UP_MAX_AGE": "1"})
    until(lambda: system.states() == {State.CONFIRMED: 150, State.CANCELLED: 30, State.NEEDS_REVIEW: 20}, 60)
    types = defaultdict[str, list[tuple[int, str]]](list)
    for event in system.until_events(400):
        types[event["data"]["offer_id"]].append((event["data"]["sequence"], event["type"]))
    ends = {"CONFIRMED": "booking.confirmed", "FAILED": "booking.cancelled", "PENDING": "confirmation.needs_review"}
    assert {offer: sorted(seen) for offer, seen in types.items()} == {
        offer: [(1, "booking.pending"), (2, ends[status])] for offer, status in statuses.items()
    }
    assert len({event["id"] for event in system.events}) == 400
    with system.engine.connect() as connection:
        assert set(connection.execute(select(Confirmation.error_code)).scalars()) == {None, "still-pending"}
        assert len(connection.execute(select(EarlierBooking.number)).all()) == 180
    assert len(system.sandbox.calls) == 200
    assert system.sandbox.overlapping == set()


@pytest.fixture
def database_url(sqlite_url: str) -> str:
    return sqlite_url


@pytest.fixture
def refresh(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the command in this process."""
    monkeypatch.setattr(runtimes, "_current", runtime)
    monkeypatch.setattr(console.out, "_width", 200)

    def invoke(*arguments: str) -> Result:
        return CliRunner().invoke(cli, ["refresh", *arguments])

    return invoke


def test_refresh_looks_now_and_says_what_has_changed(runtime: Runtime, sandbox: Sandbox, refresh: Any) -> None:
    confirm(runtime, "o~pending")
    unchanged = refresh("o~pending", "--partner", "P-100")
    key = ("P-100", "o~pending")
    sandbox.bookings[key] |= {"status": "FAILED"}
    result = refresh("SO-o", "--json")
    assert result.exit_code == 0, result.output
    changed = json.loads(result.stdout)
    sandbox.bookings[key] |= {"status": "CONFIRMED"}
    back = refresh("o~pending")
    del sandbox.bookings[key]
    missing = refresh("o~pending")

    assert (unchanged.exit_code, "nothing has changed; booking INS-" in unchanged.output) == (0, True)
    assert changed["event_type"] == "booking.cancelled"
    assert [changed[name] for name in ("listed", "state", "status_before", "status", "sequence")] == [
        True, "cancelled", "PENDING", "FAILED", 2,
    ]  # fmt: skip
    assert "was FAILED and is CONFIRMED now" in back.output
    assert (missing.exit_code, "does not hold INS-" in missing.output) == (1, True)
    assert [entry.count for entry in rows(runtime, AuditEntry) if entry.command == "refresh"] == [1, 1]


def test_refresh_looks_only_where_there_is_a_booking_and_calls_may_be_made(
    runtime: Runtime, sandbox: Sandbox, refresh: Any
) -> None:
    confirm(runtime, "o~http-422")
    confirm(runtime, "o~pending")
    no_booking, nothing = refresh("o~http-422"), refresh("other")
    sandbox.bookings_mode = "forbidden"
    forbidden = refresh("o~pending")

    assert (no_booking.exit_code, "is failed: no booking of it is stored" in no_booking.output) == (1, True)
    assert nothing.exit_code == 1
    assert (forbidden.exit_code, "can't be read: XONE answered 403" in forbidden.output) == (1, True)
    assert [row.lease_token for row in rows(runtime, FollowUp)] == [None]
