"""``confirm-offer failed`` and ``reprocess``: what has failed and why, and trying it again."""

import sys
from collections.abc import Callable
from typing import Any, BinaryIO

import click
from rich.text import Text
from sqlalchemy import Connection, Engine

from models.states import State
from tasks.operations import batches, failures
from tasks.operations.audit import who
from tasks.operations.failures import LeftOut, Matched, Selection, Waiting
from worker.commands.console import ask, err, json_option, out, plainly, print_csv, print_json, reason_option, remark
from worker.commands.follow import follow
from worker.commands.layout import add, command, counted, listing, say, short
from worker.commands.moments import MOMENT
from worker.commands.offers import read_offers
from worker.commands.pauses import standing, tell_paused
from worker.settings import DatabaseSettings, read
from worker.show import as_json as in_utc
from worker.show import local
from worker.storage import database

SHOWN = 50  # rows of a list for a person
GROUP_COLUMNS = ("count", "code", "http_status", "detail", "partners", "first_seen", "last_seen", "sample")
ROW_COLUMNS = (
    "partner_id", "offer_id", "order_reference", "state", "code", "http_status", "detail", "attempts", "created_at",
    "updated_at",
)  # fmt: skip


def filters(run: Callable[..., Any]) -> Callable[..., Any]:
    """The options that select failed confirmations."""
    options = (
        click.option("--partner", help="Only this partner's."),
        click.option("--code", help="Only those that failed with this code, as http-422."),
        click.option("--since", type=MOMENT, help="Failed at or after: 2026-01-31T14:00 (local), or 30m, 2h, 7d ago."),
        click.option("--until", type=MOMENT, help="Failed before."),
        click.option("--limit", type=click.IntRange(min=1), help="At most so many."),
        click.option("--include-needs-review", is_flag=True, help="Those that wait for a review as well."),
    )
    for option in reversed(options):
        run = option(run)
    return run


@click.command("failed")
@filters
@click.option("--list", "as_list", is_flag=True, help="Each confirmation in place of groups, the first failed first.")
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV.")
@json_option
@plainly
def failed(as_list: bool, as_csv: bool, as_json: bool, **chosen: Any) -> None:
    """Shows what has failed, by cause.

    A cause is a code, an HTTP status and a detail.

    Example: confirm-offer failed --since 2h
    """
    selection = Selection(**chosen)
    with database.connect(read(DatabaseSettings).url).connect() as connection:
        found = _rows(connection, selection) if as_list else failures.groups(connection, selection)
        review = failures.waiting_for_review(connection, selection)
        waiting = failures.waiting(connection, selection.partner)
        stand = standing(connection)
    if as_json:
        print_json(in_utc({"confirmations" if as_list else "groups": found}))
    elif as_csv:
        print_csv(ROW_COLUMNS if as_list else GROUP_COLUMNS, map(_flat, in_utc(found)))
    else:
        if not found:
            say(out, "Nothing has failed" + (" that these filters match." if any(chosen.values()) else "."))
        elif as_list:
            _print_rows(found)
        else:
            _print_groups(found)
            say(out, "\nTo try some again:")
            command(out, "confirm-offer reprocess --code CODE")
        _tell_review(review, selection)
        _tell_waiting(waiting)
        tell_paused(out, stand)


def _rows(connection: Connection, selection: Selection) -> list[dict[str, Any]]:
    rows = failures.match(connection, selection).rows
    return [{name: row._mapping[name] for name in ROW_COLUMNS} for row in rows]


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    """For CSV."""
    if "sample" in row:
        row = {**row, "partners": " ".join(row["partners"]), "sample": "/".join(row["sample"].values())}
    return row


def _print_groups(groups: list[dict[str, Any]]) -> None:
    total = sum(group["count"] for group in groups)
    say(out, f"{counted(total, 'confirmation')}, {counted(len(groups), 'cause')}", style="bold")
    table = listing("count", "code", "cause", numbers=["count"])
    for number, group in enumerate(groups):
        if number:
            add(table)
        add(table, group["count"], _code(group), _facts(group))
    out.print(table)


def _code(group: dict[str, Any]) -> str:
    status, code = group["http_status"], group["code"] or "-"
    return code if status is None or code == f"http-{status}" else f"{code} ({status})"


def _facts(group: dict[str, Any]) -> Text:
    partners, sample = group["partners"], group["sample"]
    named = ", ".join(partners[:4]) + (f" and {len(partners) - 4:,} more" if len(partners) > 4 else "")
    return Text(
        f"{group['detail'] or '-'}\n"
        f"{local(group['first_seen'])} to {local(group['last_seen'])}\n"
        f"{'partner' if len(partners) == 1 else 'partners'} {named}\n"
        f"e.g. {sample['offer_id']}" + (f" of {sample['partner_id']}" if len(partners) > 1 else "")
    )


def _print_rows(rows: list[dict[str, Any]]) -> None:
    table = listing("failed", "partner", "offer", "code")
    for row in rows[:SHOWN]:
        add(table, short(row["updated_at"]), row["partner_id"], row["offer_id"], _code_and_state(row))
    out.print(table)
    if len(rows) > SHOWN:
        say(out, f"and {len(rows) - SHOWN:,} more; --csv or --json prints all", style="dim")


def _code_and_state(row: dict[str, Any]) -> str:
    return f"{row['code']}, review" if row["state"] == State.NEEDS_REVIEW else str(row["code"])


def _tell_review(count: int, selection: Selection) -> None:
    if not count:
        return
    say(out)
    if selection.include_needs_review:
        say(out, f"{count:,} of them {'waits' if count == 1 else 'wait'} for a review.")
    else:
        say(out, f"{count:,} more {'waits' if count == 1 else 'wait'} for a review (needs_review). To see them:")
        command(out, "confirm-offer failed --list --include-needs-review")


def _tell_waiting(waiting: list[Waiting]) -> None:
    """XONE is down, or a retry is not due yet: these need nobody's help, but someone who looks should see them."""
    if not waiting:
        return
    count, since = sum(one.count for one in waiting), min(one.since for one in waiting)
    kinds = ", ".join(f"{one.count:,} {f'after {one.code}' if one.code else 'not tried yet'}" for one in waiting)
    say(out)
    say(out, f"{count:,} {'waits' if count == 1 else 'wait'} to be tried, the oldest since {local(since)}: {kinds}.")


@click.command("reprocess")
@filters
@click.option("--offers", type=click.File("rb"), help='In place of filters: a file of offers ("-": standard input).')
@click.option("--dry-run", is_flag=True, help="Only show what would be tried again.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@reason_option
@click.option("--rate", type=click.FloatRange(min=0, min_open=True), help="Confirmations a second, at most.")
@click.option("--follow", "is_followed", is_flag=True, help="Show progress until all have ended.")
@json_option
@plainly
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
            say(out, "\nA dry run: nothing was changed.")
        return
    if not as_json:
        _tell_plan(matched, as_json, purged)
        tell_paused(out, [one for one in stand if _concerns(one, matched)])
        say(out)
    ask(f"Try {counted(len(matched.rows), 'confirmation')} again{_at(rate)}?", yes)
    batch_id = _make_batch(engine, matched, selection, reason, rate)
    if not as_json:
        say(out, f"Batch {batch_id} runs{_at(rate)}: {counted(len(matched.rows), 'confirmation')}.")
        if not is_followed:
            command(out, f"confirm-offer batch show {batch_id} --follow")
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
        _print_groups(groups)
    else:
        say(out, "Nothing matches; nothing was changed.")


def _tell_left_out(left_out: list[LeftOut], purged: int) -> None:
    for partner, offer, state, purged_at in left_out:
        name = f"{partner} {offer}" if partner else offer
        hint = " (--include-needs-review takes it)" if state is State.NEEDS_REVIEW else ""
        if purged_at is not None:
            hint = f", and its personal data was purged on {local(purged_at)}"
        remark(f"left out: {name}: {state or 'unknown'}{hint}")
    if purged:
        data = "its personal data was" if purged == 1 else "their personal data was"
        remark(f"left out: {counted(purged, 'confirmation')}: {data} purged, so there is nothing to send")


def _concerns(pause: dict[str, Any], matched: Matched) -> bool:
    return pause["partner_id"] is None or any(row.partner_id == pause["partner_id"] for row in matched.rows)


def _at(rate: float | None) -> str:
    return f" at {rate:g} a second" if rate is not None else ""
