"""``confirm-offer failed``: what has failed and why."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import click

from models.states import State
from tasks.operations import failures, pauses, workers
from tasks.operations.failures import FailedConfirmation, FailureGroup, PendingCount, Selection, WaitingCount
from worker.cli.ui.console import handle_errors, json_option, out, print_csv, print_json
from worker.cli.ui.failures import filters, print_groups
from worker.cli.ui.paused import print_paused, print_stopped
from worker.cli.ui.tables import add_row, new_table, print_commands, print_text
from worker.formatting import local_time, pluralize, short_time, to_json
from worker.settings import DatabaseSettings, read
from worker.storage import database

MAX_ROWS = 50  # of a list for a person
GROUP_COLUMNS = ("count", "code", "http_status", "detail", "partners", "first_seen", "last_seen", "sample")
ROW_COLUMNS = (
    "partner_id", "offer_id", "order_reference", "state", "code", "http_status", "detail", "attempts", "created_at",
    "updated_at",
)  # fmt: skip


@click.command("failed")
@filters
@click.option("--list", "as_list", is_flag=True, help="Each confirmation instead of groups, the first failed first.")
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV.")
@json_option
@handle_errors
def failed(as_list: bool, as_csv: bool, as_json: bool, **chosen: Any) -> None:
    """Shows what has failed, by cause.

    A cause is a code, an HTTP status and a detail.

    Example: confirm-offer failed --since 2h
    """
    selection = Selection(**chosen)
    confirmations: Sequence[FailedConfirmation] = ()
    groups: Sequence[FailureGroup] = ()
    with database.connect(read(DatabaseSettings).url).connect() as connection:
        if as_list:
            confirmations = failures.match(connection, selection).confirmations
        else:
            groups = failures.groups(connection, selection)
        in_review = failures.waiting_for_review(connection, selection)
        waiting = failures.waiting(connection, selection.partner)
        pending = failures.pending(connection, selection.partner)
        active_pauses = pauses.active(connection)
        stopped = workers.stopped_calls(workers.running(connection))
    if as_json:
        print_json({"confirmations": to_json(confirmations)} if as_list else {"groups": to_json(groups)})
    elif as_csv and as_list:
        print_csv(ROW_COLUMNS, to_json(confirmations))
    elif as_csv:
        print_csv(GROUP_COLUMNS, _csv_rows(groups))
    else:
        if not confirmations and not groups:
            print_text(out, "Nothing has failed" + (" that these filters match." if any(chosen.values()) else "."))
        elif as_list:
            _print_list(confirmations)
        else:
            print_groups(groups)
            print_text(out, "\nTo try some again:")
            print_commands(out, "confirm-offer reprocess --code CODE")
        _print_in_review(in_review, selection)
        _print_waiting(waiting)
        _print_pending(pending)
        print_paused(out, active_pauses)
        print_stopped(out, stopped)


def _csv_rows(groups: Iterable[FailureGroup]) -> Iterator[dict[str, Any]]:
    for group in groups:
        sample = f"{group.sample.partner_id}/{group.sample.offer_id}"
        yield {**to_json(group), "partners": " ".join(group.partners), "sample": sample}


def _print_list(confirmations: Sequence[FailedConfirmation]) -> None:
    table = new_table("failed", "partner", "offer", "code")
    for confirmation in confirmations[:MAX_ROWS]:
        failed_at, ids = short_time(confirmation.updated_at), (confirmation.partner_id, confirmation.offer_id)
        add_row(table, failed_at, *ids, _code(confirmation))
    out.print(table)
    if len(confirmations) > MAX_ROWS:
        print_text(out, f"and {len(confirmations) - MAX_ROWS:,} more; --csv or --json prints all", style="dim")


def _code(confirmation: FailedConfirmation) -> str:
    review = ", review" if confirmation.state is State.NEEDS_REVIEW else ""
    return f"{confirmation.code}{review}"


def _print_in_review(count: int, selection: Selection) -> None:
    if not count:
        return
    wait = "waits" if count == 1 else "wait"
    print_text(out)
    if selection.include_needs_review:
        print_text(out, f"{count:,} of them {wait} for a review.")
    else:
        print_text(out, f"{count:,} more {wait} for a review (needs_review). To see them:")
        print_commands(out, "confirm-offer failed --list --include-needs-review")


def _print_waiting(waiting: Sequence[WaitingCount]) -> None:
    """Confirmations that have not failed but wait: XONE is down, or a retry is not due yet. They need no help."""
    if not waiting:
        return
    total, since = sum(group.count for group in waiting), min(group.since for group in waiting)
    kinds = ", ".join(f"{group.count:,} {_last_error(group)}" for group in waiting)
    wait = "waits" if total == 1 else "wait"
    print_text(out)
    print_text(out, f"{total:,} {wait} to be tried, the oldest since {local_time(since)}: {kinds}.")


def _print_pending(pending: PendingCount | None) -> None:
    """Bookings that XONE has made and may still confirm or cancel. Workers look at them."""
    if pending is not None:
        bookings = pluralize(pending.count, "booking is", "bookings are")
        print_text(out)
        print_text(out, f"{bookings} pending at XONE, the oldest since {local_time(pending.since)}.")


def _last_error(group: WaitingCount) -> str:
    return f"after {group.code}" if group.code else "not tried yet"
