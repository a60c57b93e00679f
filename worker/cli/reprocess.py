"""``confirm-offer reprocess``: tries failed confirmations again."""

import sys
from dataclasses import dataclass
from typing import Any, BinaryIO

import click
from sqlalchemy import Engine

from models.states import State
from tasks.operations import batches, failures, pauses
from tasks.operations.audit import who
from tasks.operations.failures import FailureGroup, LeftOut, Matched, Selection
from tasks.operations.pauses import ActivePause
from worker.cli.ui.batch_progress import follow
from worker.cli.ui.console import (
    ask,
    by_option,
    err,
    handle_errors,
    json_option,
    out,
    print_json,
    print_note,
    reason_option,
)
from worker.cli.ui.failures import filters, print_groups
from worker.cli.ui.number_param import Rate
from worker.cli.ui.offers_file import read_offers
from worker.cli.ui.paused import print_paused
from worker.cli.ui.tables import print_commands, print_text
from worker.formatting import local_time, pluralize, to_json
from worker.settings import DatabaseSettings, read
from worker.storage import database


@dataclass(frozen=True)
class Plan:
    """What would be tried again, as ``--dry-run --json`` prints it. id: of the batch, which is not made yet."""

    id: None
    total: int
    groups: list[FailureGroup]
    left_out: list[LeftOut]
    purged: int  # confirmations that the filters match and that can't be tried again
    order_ended: int  # likewise: they expired, or were withdrawn


@click.command("reprocess")
@filters
@click.option("--offers", type=click.File("rb"), help='Instead of filters: a file of offers ("-": standard input).')
@click.option("--dry-run", is_flag=True, help="Only show what would be tried again.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@reason_option
@by_option
@click.option("--rate", type=Rate(), help="Confirmations a second, at most.")
@click.option("--follow", "is_followed", is_flag=True, help="Show progress until all have ended.")
@json_option
@handle_errors
def reprocess(
    offers: BinaryIO | None,
    dry_run: bool,
    yes: bool,
    reason: str | None,
    rate: float | None,
    is_followed: bool,
    as_json: bool,
    **chosen: Any,
) -> None:
    """Tries failed confirmations again, as a batch.

    The workers process the batch after their live work, even if this command is interrupted. Its items are fixed when
    it is made; they are shown first.

    \b
    --offers FILE has an offer a line: OFFER, or PARTNER OFFER, or PARTNER,OFFER;
    or CSV or JSON Lines with partner_id and offer_id, as "failed --list" prints.

    What has expired or was withdrawn is left out: its order has ended.

    Exit code 1 with --follow if some have failed again or were not tried.

    Example: confirm-offer reprocess --code http-422 --rate 50 --reason "prices fixed" --follow
    """
    if offers is not None and any(value for name, value in chosen.items() if name != "include_needs_review"):
        raise click.UsageError("--offers takes the place of the filters; give one or the other")
    engine = database.connect(read(DatabaseSettings).url)
    named = read_offers(offers) if offers is not None else None
    selection = Selection(**chosen, purged=False, order_ended=False, offers=named)
    with engine.connect() as connection:
        matched = failures.match(connection, selection)
        purged = failures.purged(connection, selection) if offers is None else 0
        order_ended = failures.order_ended(connection, selection) if offers is None else 0
        active_pauses = pauses.active(connection)
    groups = failures.groups_of(matched.confirmations)
    plan = Plan(None, len(matched.ids), groups, matched.left_out, purged, order_ended)
    _print_left_out(plan)
    if dry_run or not plan.total:
        _print_plan(plan, as_json)
        if not as_json and dry_run and plan.total:
            print_text(out, "\nA dry run: nothing was changed.")
        return
    if not as_json:
        _print_plan(plan, as_json)
        print_paused(out, [pause for pause in active_pauses if _concerns(pause, matched)])
        print_text(out)
    ask(f"Try {pluralize(plan.total, 'confirmation')} again{_at(rate)}?", yes)
    batch_id = _make_batch(engine, matched, selection, reason, rate)
    if not as_json:
        print_text(out, f"Batch {batch_id} runs{_at(rate)}: {pluralize(plan.total, 'confirmation')}.")
        if not is_followed:
            print_commands(out, f"confirm-offer batch show {batch_id} --follow")
    has_succeeded = follow(engine, batch_id, err if as_json else out) if is_followed else True
    if as_json:
        with engine.connect() as connection:
            print_json(to_json(batches.progress(connection, batch_id)))
    sys.exit(0 if has_succeeded else 1)


def _make_batch(engine: Engine, matched: Matched, selection: Selection, reason: str | None, rate: float | None) -> int:
    with engine.begin() as connection:
        return batches.create(connection, matched.ids, selection, reason, who(), rate)


def _print_plan(plan: Plan, as_json: bool) -> None:
    if as_json:
        print_json(to_json(plan))
    elif plan.groups:
        print_groups(plan.groups)
    else:
        print_text(out, "Nothing matches; nothing was changed.")


def _print_left_out(plan: Plan) -> None:
    for offer in plan.left_out:
        name = f"{offer.partner_id} {offer.offer_id}" if offer.partner_id else offer.offer_id
        hint = " (--include-needs-review takes it)" if offer.state is State.NEEDS_REVIEW else ""
        if offer.purged_at is not None:
            hint = f", and its personal data was purged on {local_time(offer.purged_at)}"
        if offer.code is not None:
            hint = f", {offer.code}: its order has ended"
        print_note(f"left out: {name}: {offer.state or 'unknown'}{hint}")
    if plan.order_ended:
        orders = "its order has" if plan.order_ended == 1 else "their orders have"
        print_note(f"left out: {pluralize(plan.order_ended, 'confirmation')}: {orders} ended (expired or withdrawn)")
    if plan.purged:
        data = "its personal data was" if plan.purged == 1 else "their personal data was"
        print_note(f"left out: {pluralize(plan.purged, 'confirmation')}: {data} purged, so there is nothing to send")


def _concerns(pause: ActivePause, matched: Matched) -> bool:
    return pause.partner_id is None or pause.partner_id in {row.partner_id for row in matched.confirmations}


def _at(rate: float | None) -> str:
    return f" at {rate:g} a second" if rate is not None else ""
