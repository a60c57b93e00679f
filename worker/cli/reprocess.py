"""``confirm-offer reprocess``: tries failed confirmations again."""

import sys
from typing import Any, BinaryIO

import click
from sqlalchemy import Engine

from models.states import State
from tasks.operations import batches, failures
from tasks.operations.audit import who
from tasks.operations.failures import LeftOut, Matched, Selection
from worker.cli.ui.batch_progress import follow
from worker.cli.ui.console import ask, err, handle_errors, json_option, out, print_json, print_note, reason_option
from worker.cli.ui.failures import filters, print_groups
from worker.cli.ui.offers_file import read_offers
from worker.cli.ui.paused import standing, tell_paused
from worker.cli.ui.tables import print_commands, print_text
from worker.formatting import in_utc, local_time, pluralize
from worker.settings import DatabaseSettings, read
from worker.storage import database


@click.command("reprocess")
@filters
@click.option("--offers", type=click.File("rb"), help='In place of filters: a file of offers ("-": standard input).')
@click.option("--dry-run", is_flag=True, help="Only show what would be tried again.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@reason_option
@click.option("--rate", type=click.FloatRange(min=0, min_open=True), help="Confirmations a second, at most.")
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

    Workers go through it behind their live work, whatever becomes of this command. What is tried is settled when the
    batch is made: its plan is shown first.

    \b
    --offers FILE has an offer a line: OFFER, or PARTNER OFFER, or PARTNER,OFFER;
    or CSV or JSON Lines with partner_id and offer_id, as "failed --list" prints.

    Exit code 1 with --follow where some have failed again or were not tried.

    Example: confirm-offer reprocess --code http-422 --rate 50 --reason "prices fixed" --follow
    """
    if offers is not None and any(value for name, value in chosen.items() if name != "include_needs_review"):
        raise click.UsageError("--offers stands in place of the filters; give one or the other")
    engine = database.connect(read(DatabaseSettings).url)
    selection = Selection(**chosen, purged=False, offers=read_offers(offers) if offers is not None else None)
    with engine.connect() as connection:
        matched = failures.match(connection, selection)
        purged = failures.purged(connection, selection) if offers is None else 0
        stand = standing(connection)
    _tell_left_out(matched.left_out, purged)
    if dry_run or not matched.rows:
        _tell_plan(matched, as_json, purged)
        if not as_json and dry_run and matched.rows:
            print_text(out, "\nA dry run: nothing was changed.")
        return
    if not as_json:
        _tell_plan(matched, as_json, purged)
        tell_paused(out, [one for one in stand if _concerns(one, matched)])
        print_text(out)
    ask(f"Try {pluralize(len(matched.rows), 'confirmation')} again{_at(rate)}?", yes)
    batch_id = _make_batch(engine, matched, selection, reason, rate)
    if not as_json:
        print_text(out, f"Batch {batch_id} runs{_at(rate)}: {pluralize(len(matched.rows), 'confirmation')}.")
        if not is_followed:
            print_commands(out, f"confirm-offer batch show {batch_id} --follow")
    well = follow(engine, batch_id, err if as_json else out) if is_followed else True
    if as_json:
        with engine.connect() as connection:
            print_json(in_utc(batches.overview(connection, batch_id)[0]))
    sys.exit(0 if well else 1)


def _make_batch(engine: Engine, matched: Matched, selection: Selection, reason: str | None, rate: float | None) -> int:
    with engine.begin() as connection:
        return batches.create(connection, [row.id for row in matched.rows], selection, reason, who(), rate)


def _tell_plan(matched: Matched, as_json: bool, purged: int) -> None:
    groups = failures.by_cause(failures.of_rows(matched.rows))
    if as_json:
        left_out = [one._asdict() for one in matched.left_out]
        plan = {"id": None, "total": len(matched.rows), "groups": groups, "left_out": left_out, "purged": purged}
        print_json(in_utc(plan))
    elif groups:
        print_groups(groups)
    else:
        print_text(out, "Nothing matches; nothing was changed.")


def _tell_left_out(left_out: list[LeftOut], purged: int) -> None:
    for partner, offer, state, purged_at in left_out:
        name = f"{partner} {offer}" if partner else offer
        hint = " (--include-needs-review takes it)" if state is State.NEEDS_REVIEW else ""
        if purged_at is not None:
            hint = f", and its personal data was purged on {local_time(purged_at)}"
        print_note(f"left out: {name}: {state or 'unknown'}{hint}")
    if purged:
        data = "its personal data was" if purged == 1 else "their personal data was"
        print_note(f"left out: {pluralize(purged, 'confirmation')}: {data} purged, so there is nothing to send")


def _concerns(pause: dict[str, Any], matched: Matched) -> bool:
    return pause["partner_id"] is None or any(row.partner_id == pause["partner_id"] for row in matched.rows)


def _at(rate: float | None) -> str:
    return f" at {rate:g} a second" if rate is not None else ""
