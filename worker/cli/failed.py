"""``confirm-offer failed`` and ``reprocess``: what has failed and why, and trying it again."""

from typing import Any

import click
from sqlalchemy import Connection

from models.states import State
from tasks.operations import failures
from tasks.operations.failures import Selection, Waiting
from worker.cli.ui.console import handle_errors, json_option, out, print_csv, print_json
from worker.cli.ui.failures import filters, print_groups
from worker.cli.ui.paused import standing, tell_paused
from worker.cli.ui.tables import add_row, new_table, print_commands, print_text
from worker.formatting import in_utc, local_time, short_time
from worker.settings import DatabaseSettings, read
from worker.storage import database

SHOWN = 50  # rows of a list for a person
GROUP_COLUMNS = ("count", "code", "http_status", "detail", "partners", "first_seen", "last_seen", "sample")
ROW_COLUMNS = (
    "partner_id", "offer_id", "order_reference", "state", "code", "http_status", "detail", "attempts", "created_at",
    "updated_at",
)  # fmt: skip


@click.command("failed")
@filters
@click.option("--list", "as_list", is_flag=True, help="Each confirmation in place of groups, the first failed first.")
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV.")
@json_option
@handle_errors
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
            print_text(out, "Nothing has failed" + (" that these filters match." if any(chosen.values()) else "."))
        elif as_list:
            _print_rows(found)
        else:
            print_groups(found)
            print_text(out, "\nTo try some again:")
            print_commands(out, "confirm-offer reprocess --code CODE")
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


def _print_rows(rows: list[dict[str, Any]]) -> None:
    table = new_table("failed", "partner", "offer", "code")
    for row in rows[:SHOWN]:
        add_row(table, short_time(row["updated_at"]), row["partner_id"], row["offer_id"], _code_and_state(row))
    out.print(table)
    if len(rows) > SHOWN:
        print_text(out, f"and {len(rows) - SHOWN:,} more; --csv or --json prints all", style="dim")


def _code_and_state(row: dict[str, Any]) -> str:
    return f"{row['code']}, review" if row["state"] == State.NEEDS_REVIEW else str(row["code"])


def _tell_review(count: int, selection: Selection) -> None:
    if not count:
        return
    print_text(out)
    if selection.include_needs_review:
        print_text(out, f"{count:,} of them {'waits' if count == 1 else 'wait'} for a review.")
    else:
        print_text(out, f"{count:,} more {'waits' if count == 1 else 'wait'} for a review (needs_review). To see them:")
        print_commands(out, "confirm-offer failed --list --include-needs-review")


def _tell_waiting(waiting: list[Waiting]) -> None:
    """XONE is down, or a retry is not due yet: these need nobody's help, but someone who looks should see them."""
    if not waiting:
        return
    count, since = sum(one.count for one in waiting), min(one.since for one in waiting)
    kinds = ", ".join(f"{one.count:,} {f'after {one.code}' if one.code else 'not tried yet'}" for one in waiting)
    print_text(out)
    print_text(
        out,
        f"{count:,} {'waits' if count == 1 else 'wait'} to be tried, the oldest since {local_time(since)}: {kinds}.",
    )
