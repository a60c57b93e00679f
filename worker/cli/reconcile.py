"""``confirm-offer reconcile``: takes in the bookings that XONE has and the database has lost."""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import click
from sqlalchemy import Engine

from models.exact_json import moment
from tasks.operations import reconcile as reconciling
from tasks.operations.audit import Tally
from tasks.operations.reconcile import FOR_A_PERSON, MISSING, Compared, Found
from worker.cli.ui.console import (
    Failed,
    ask,
    by_option,
    handle_errors,
    json_option,
    out,
    print_error,
    print_note,
    print_result,
    progress,
    reason_option,
)
from worker.cli.ui.time_param import MOMENT
from worker.errors import XoneError
from worker.formatting import local_time, pluralize
from worker.observability import logs
from worker.settings import DatabaseSettings, EncryptionSettings, EventSettings, XoneSettings, read
from worker.storage import database
from worker.storage.encryption import Encryption

MAX_NAMED = 20  # bookings that are named to a person


@dataclass
class Comparison:
    """What was found in the lists of all partners."""

    found: Counter[Found] = field(default_factory=Counter)
    names: dict[Found, list[str]] = field(default_factory=dict)  # the first of each kind
    unread: dict[str, str] = field(default_factory=dict)  # why, by partner: its list could not be read to its end

    @property
    def missing(self) -> int:
        return sum(self.found[kind] for kind in MISSING)

    def add(self, partner_id: str, compared: Compared) -> None:
        self.found[compared.found] += 1
        names = self.names.setdefault(compared.found, [])
        if len(names) < MAX_NAMED:
            names.append(f"{compared.name} of {partner_id}")


@click.command(short_help="Takes in bookings that XONE has and the database lost.")
@click.option("--since", type=MOMENT, required=True, help="Booked at or after: 2026-01-31T14:00 (local), or 2h, 7d.")
@click.option(
    "--partner", "partner_ids", multiple=True, help="Only this partner; may be repeated. Default: all stored."
)
@click.option("--dry-run", is_flag=True, help="Only show what is missing.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@reason_option
@by_option
@json_option
@handle_errors
def reconcile(
    since: datetime, partner_ids: tuple[str, ...], dry_run: bool, yes: bool, reason: str | None, as_json: bool
) -> None:
    """Compares XONE's lists of bookings with what is stored, and takes in what is missing, while workers run.

    For a database that has lost its last commits, by a failover or a restore. Each missing booking is stored with its
    policies and announced with an event. Where the job was lost too, the event has no order_reference and no metadata;
    if the job comes again, it finds its offer booked.

    A partner of which nothing is stored any more must be named. A list also shows what others have booked for this
    partner: look at --dry-run first.

    Exit code 1 if a list could not be read, or something is left for a person.

    Example: confirm-offer reconcile --since 2026-01-31T14:00 --dry-run
    """
    from worker.xone.circuit_breaker import CallsSuspended
    from worker.xone.client import Xone  # with requests, which --help does not need

    logs.silence()
    engine, xone_settings = database.connect(read(DatabaseSettings).url), read(XoneSettings)
    encryption, with_links = Encryption(read(EncryptionSettings).keys), read(EventSettings).EVENT_LINKS == "on"
    xone = Xone(xone_settings, connections=1)
    if not xone.can_list_bookings:
        raise Failed("XONE_BOOKINGS_PATH is empty: there is no list to compare with")
    with engine.connect() as connection:
        wanted = list(dict.fromkeys(partner_ids)) or reconciling.partners(connection)

    def compared(comparison: Comparison) -> Iterator[tuple[str, Compared]]:
        for partner_id in wanted:
            try:
                with closing(xone.list_bookings(partner_id)) as listing:
                    for chunk in reconciling.compare(engine, partner_id, listing, since):
                        yield from ((partner_id, booking) for booking in chunk)
            except (XoneError, CallsSuspended) as error:
                comparison.unread[partner_id] = str(error)

    comparison = Comparison()
    with progress() as bar:
        task = bar.add_task("comparing", total=None)
        for partner_id, booking in compared(comparison):
            comparison.add(partner_id, booking)
            bar.advance(task)
    taken = 0
    if comparison.missing and not dry_run:
        _print_missing(comparison, print_note)
        ask(f"Take in {pluralize(comparison.missing, 'booking')}, and announce each with an event?", yes)
        taken = _take_in(engine, encryption, xone_settings, with_links, compared, comparison, reason, since, wanted)
    elif not as_json:
        _print_missing(comparison, lambda text: out.print(text, highlight=False, markup=False))
    _print(comparison, since, len(wanted), taken, dry_run, as_json)


def _take_in(
    engine: Engine,
    encryption: Encryption,
    settings: XoneSettings,
    with_links: bool,
    compared: Callable[[Comparison], Iterator[tuple[str, Compared]]],
    comparison: Comparison,
    reason: str | None,
    since: datetime,
    wanted: list[str],
) -> int:
    """Reads the lists again, so that no more than one booking is in memory, and takes in what is missing still."""
    taken = 0
    facts: dict[str, Any] = {"since": moment(since), "partners": wanted[:MAX_NAMED]}
    with Tally(engine, "reconcile", reason, **facts) as tally, progress() as bar:
        task = bar.add_task("taking in", total=comparison.missing)
        try:
            for partner_id, booking in compared(comparison):
                if booking.found not in MISSING:
                    continue
                before = reconciling.take_in(
                    engine, encryption, partner_id, booking, settings.booking_statuses, with_links
                )
                if before in MISSING:
                    taken += 1
                    tally.add(1)
                bar.advance(task)
        except KeyboardInterrupt:
            raise Failed(f"interrupted: {pluralize(taken, 'booking')} taken in; run it again to go on") from None
    return taken


def _print_missing(comparison: Comparison, show: Callable[[str], None]) -> None:
    for kind in sorted(MISSING):
        for name in comparison.names.get(kind, []):
            show(f"missing: {name}" + (", whose confirmation has no booking" if kind is Found.NOT_BOOKED else ""))
        if (more := comparison.found[kind] - MAX_NAMED) > 0:
            show(f"and {more:,} more")


def _print(comparison: Comparison, since: datetime, partners: int, taken: int, dry_run: bool, as_json: bool) -> None:
    found, left = comparison.found, comparison.missing - taken
    told = f"{pluralize(found.total(), 'booking')} of {pluralize(partners, 'partner')} since {local_time(since)}: "
    parts = [f"{found[Found.STORED]:,} stored", f"{taken:,} taken in" if taken else ""]
    parts += [f"{left:,} missing" if left else "", f"{found[Found.IN_HAND]:,} in hand" if found[Found.IN_HAND] else ""]
    print_result(
        as_json,
        told + ", ".join(part for part in parts if part) + ("" if taken else "; nothing was changed"),
        since=moment(since),
        partners=partners,
        listed=found.total(),
        found={kind: found[kind] for kind in Found},
        taken_in=taken,
        missing=left,
        names={kind: comparison.names.get(kind, []) for kind in sorted(MISSING | FOR_A_PERSON)},
        unread=comparison.unread,
    )
    for kind, why in _FOR_A_PERSON.items():
        for name in comparison.names.get(kind, []):
            print_error(f"{name} {why}")
    for partner_id, why in comparison.unread.items():
        print_error(f"the list of {partner_id} could not be read to its end: {why}")
    if comparison.unread or any(found[kind] for kind in FOR_A_PERSON) or (left and not dry_run):
        sys.exit(1)


_FOR_A_PERSON = {
    Found.OTHER_BOOKING: "has another booking than the one in XONE's list",
    Found.WITHOUT_OFFER: "is in XONE's list without an offer, and is not stored",
    Found.UNREADABLE: "can't be read in XONE's list",
}
