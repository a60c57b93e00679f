"""``confirm-offer withdraw``: an order was cancelled, so its offer is not tried any more."""

import sys
import time
from collections import Counter
from collections.abc import Sequence
from typing import BinaryIO
from uuid import UUID

import click
from sqlalchemy import Engine

from models.job import is_path_id
from tasks.operations.audit import who
from tasks.operations.withdraw import Result, Withdrawal, results
from tasks.operations.withdraw import withdraw as withdraw_offer
from worker.cli.ui.console import (
    Failed,
    UsageError,
    ask,
    by_option,
    handle_errors,
    json_option,
    out,
    print_json,
    print_note,
    print_wrapped,
    progress,
)
from worker.cli.ui.number_param import COUNT_OR_ZERO
from worker.cli.ui.offers_file import read_offers
from worker.formatting import pluralize, to_json
from worker.settings import DatabaseSettings, read
from worker.storage import database

LOOK_EVERY = 0.2  # seconds
PAGE = 1000  # confirmations

TEXTS = {
    Result.WITHDRAWN: "withdrawn",
    Result.BOOKED: "booked before, and left so",
    Result.CALLING: "still with a worker; what comes of its call decides",
    Result.SETTLING: "may be booked; the list of bookings decides within minutes, and no call is made",
    Result.NEEDS_REVIEW: 'need review, for nobody can tell whether XONE has booked: see "confirm-offer resolve"',
}


def _not_empty(_: click.Context, param: click.Parameter, value: str) -> str:
    if not value.strip():
        raise click.BadParameter("say why", param=param)
    return value.strip()


@click.command(short_help="Ends offers whose order was cancelled.")
@click.argument("offer_id", required=False)
@click.option("--partner", help="The partner of the offer, or of all offers of the file that name none.")
@click.option("--offers", type=click.File("rb"), help='In place of one offer: a file of offers ("-": standard input).')
@click.option("--reason", required=True, callback=_not_empty, help="Why, for the audit; consumers do not get it.")
@click.option(
    "--wait", type=COUNT_OR_ZERO, default=60, show_default=True, help="Seconds to wait for calls that are under way."
)
@click.option("--yes", is_flag=True, help="Do not ask.")
@by_option
@json_option
@handle_errors
def withdraw(
    offer_id: str | None,
    partner: str | None,
    offers: BinaryIO | None,
    reason: str,
    wait: int,
    yes: bool,
    as_json: bool,
) -> None:
    """Ends offers whose order was cancelled: what is not booked yet is not tried any more.

    It ends as failed, with the code "withdrawn", and an event says so. Where a worker is calling XONE, this waits for
    what comes of the call. Where XONE may have booked, the workers look at the list of bookings first. What is booked
    stays, and is named. A job that comes later for an offer withdrawn today is not called.

    \b
    --offers FILE has an offer a line: PARTNER OFFER, or PARTNER,OFFER, or OFFER
    with --partner; or CSV or JSON Lines with partner_id and offer_id, as
    "failed --list" prints.

    Exit code 1 if some are booked, or not settled yet.

    Example: confirm-offer withdraw 5c7e0b1d --partner P-100 --reason "order SO-1001 cancelled"
    """
    chosen = _chosen(offer_id, partner, offers)
    engine = database.connect(read(DatabaseSettings).url)
    if not chosen:
        raise Failed("the file names no offer; nothing was changed")
    ask(f"Withdraw {pluralize(len(chosen), 'offer')}? What is not booked yet is not tried any more.", yes)
    ids = _withdraw_all(engine, chosen, reason)
    withdrawn = _settled(engine, ids, wait)
    if as_json:
        counts = Counter(offer.result for offer in withdrawn)
        print_json({**{result.value: counts[result] for result in Result}, "offers": to_json(withdrawn)})
    else:
        _print(withdrawn)
    sys.exit(0 if all(offer.result is Result.WITHDRAWN for offer in withdrawn) else 1)


def _chosen(offer_id: str | None, partner: str | None, offers: BinaryIO | None) -> list[tuple[str, str]]:
    """Pairs of partner and offer id, each once."""
    if (offer_id is None) == (offers is None):
        raise click.UsageError("give either OFFER_ID or --offers FILE")
    named = read_offers(offers) if offers is not None else ((None, offer_id or ""),)
    chosen = []
    for partner_id, offer in named:
        partner_id = partner_id or partner
        if partner_id is None:
            raise UsageError(f"offer {offer} has no partner; name it, or give --partner")
        for name, value in (("partner", partner_id), ("offer", offer)):
            if not is_path_id(value):
                raise UsageError(f"{value!r} can't be the id of {'a partner' if name == 'partner' else 'an offer'}")
        chosen.append((partner_id, offer))
    return list(dict.fromkeys(chosen))


def _withdraw_all(engine: Engine, chosen: Sequence[tuple[str, str]], reason: str) -> list[UUID]:
    """Each in a transaction of its own, with its row of the audit. Returns the ids of their confirmations."""
    ids: list[UUID] = []
    with progress(shown=len(chosen) > 1) as bar:
        task = bar.add_task("withdrawing", total=len(chosen))
        try:
            for partner_id, offer_id in chosen:
                with engine.begin() as connection:
                    ids.append(withdraw_offer(connection, partner_id, offer_id, who(), reason))
                bar.advance(task)
        except KeyboardInterrupt:
            done = f"{len(ids):,} of {pluralize(len(chosen), 'offer')} withdrawn"
            raise Failed(f"interrupted: {done}; to withdraw them again is harmless") from None
    return list(dict.fromkeys(ids))


def _settled(engine: Engine, ids: Sequence[UUID], wait: float) -> list[Withdrawal]:
    """What has become of the offers, once no worker is calling for one of them or ``wait`` seconds have passed."""
    ends_at, found = time.monotonic() + wait, dict[UUID, Withdrawal]()
    open_ids, has_told = list(ids), False
    while True:
        with engine.connect() as connection:
            for start in range(0, len(open_ids), PAGE):
                found |= results(connection, open_ids[start : start + PAGE])
        calling = [id_ for id_ in open_ids if id_ in found and found[id_].result is Result.CALLING]
        if not calling or time.monotonic() >= ends_at:
            return [found[id_] for id_ in ids if id_ in found]
        if not has_told:
            print_note(f"{pluralize(len(calling), 'offer')} with a worker: waiting for what comes of the call")
        open_ids, has_told = calling, True
        time.sleep(LOOK_EVERY)


def _print(withdrawn: Sequence[Withdrawal]) -> None:
    counts = Counter(offer.result for offer in withdrawn)
    for result in Result:
        if counts[result]:
            print_wrapped(out, f"{pluralize(counts[result], 'offer')}: {TEXTS[result]}")
        for offer in withdrawn:
            if offer.result is result and (len(withdrawn) == 1 or result is not Result.WITHDRAWN):
                booking = f", booking {offer.booking_id}" if offer.booking_id else ""
                print_wrapped(out, f"  {offer.partner_id} {offer.offer_id}: {offer.state}{booking}")
