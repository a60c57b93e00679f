"""``confirm-offer batches`` and ``batch``: how reprocessing goes on, and stopping it."""

import sys
from collections import Counter
from typing import Any

import click
from rich.table import Table
from rich.text import Text
from sqlalchemy import Connection

from models.states import BatchState, State
from tasks.operations import batches as tasks
from tasks.operations.audit import who
from worker.cli.ui.batch_progress import follow, outcome
from worker.cli.ui.console import (
    Failed,
    handle_errors,
    json_option,
    out,
    print_csv,
    print_json,
    print_result,
    reason_option,
)
from worker.cli.ui.paused import standing, tell_paused
from worker.cli.ui.tables import add_row, new_table, print_text
from worker.formatting import in_utc, local_time, pluralize, short_time
from worker.settings import DatabaseSettings, read
from worker.storage import database

SHOWN = 20  # items for a person
ITEM_COLUMNS = ("partner_id", "offer_id", "outcome", "code", "fed_at", "ended_at")
STYLE_OF = {BatchState.RUNNING: "cyan", BatchState.PAUSED: "yellow", BatchState.CANCELLED: "dim"}
WENT_WELL = (State.CONFIRMED, State.PENDING)


@click.command("batches")
@click.option("--limit", type=click.IntRange(min=1), default=20, show_default=True, help="At most so many.")
@json_option
@handle_errors
def batches(limit: int, as_json: bool) -> None:
    """Lists the batches of reprocessing.

    The newest comes first. "left" are those that wait or are under way.

    Example: confirm-offer batches
    """
    with database.connect(read(DatabaseSettings).url).connect() as connection:
        found = tasks.overview(connection, limit=limit)
        stand = standing(connection)
    if as_json:
        print_json(in_utc({"batches": found}))
    elif not found:
        print_text(out, "There are no batches; 'confirm-offer reprocess' makes one.")
    else:
        out.print(_overview(found))
        if any(batch["state"] == BatchState.RUNNING for batch in found):
            tell_paused(out, stand)


def _overview(found: list[dict[str, Any]]) -> Table:
    numbers = ["id", "total", "confirmed", "failed", "left"]
    table = new_table("id", "state", "made", "total", "confirmed", "failed", "left", "reason", numbers=numbers)
    for batch in found:
        left = batch["running"] + (batch["waiting"] if batch["state"] != BatchState.CANCELLED else 0)
        state = Text(batch["state"], style=STYLE_OF.get(batch["state"], ""))
        counts = (batch["total"], batch["confirmed"], batch["failed"], left)
        add_row(table, batch["id"], state, short_time(batch["created_at"]), *counts, batch["reason"])
    return table


@click.group("batch")
def batch() -> None:
    """One batch of reprocessing."""


@batch.command("show")
@click.argument("batch_id", metavar="ID", type=int)
@click.option("--follow", "is_followed", is_flag=True, help="Show progress until all have ended.")
@click.option("--csv", "as_csv", is_flag=True, help="Print each item as CSV.")
@json_option
@handle_errors
def show(batch_id: int, is_followed: bool, as_csv: bool, as_json: bool) -> None:
    """Shows a batch and what came of its items. --csv and --json print each item.

    Example: confirm-offer batch show 12
    """
    engine = database.connect(read(DatabaseSettings).url)
    with engine.connect() as connection:
        found = _find(connection, batch_id)
        items = tasks.items(connection, batch_id)
        stand = standing(connection)
    if as_json:
        print_json(in_utc({**found, "items": items}))
    elif as_csv:
        print_csv(ITEM_COLUMNS, in_utc(items))
    elif is_followed:
        sys.exit(0 if follow(engine, batch_id, out) else 1)
    else:
        _print(found, items)
        if found["state"] == BatchState.RUNNING:
            tell_paused(out, stand)


def _find(connection: Connection, batch_id: int) -> dict[str, Any]:
    found = tasks.overview(connection, batch_id) if abs(batch_id) < 2**31 else []
    if not found:
        raise Failed(f"there is no batch {batch_id}; 'confirm-offer batches' lists them")
    return found[0]


def _print(found: dict[str, Any], items: list[dict[str, Any]]) -> None:
    facts = Table.grid(padding=(0, 2, 0, 0))
    rate = f"{found['rate']:g} a second" if found["rate"] is not None else "no limit was given"
    for name, value in (
        ("batch", str(found["id"])),
        ("state", found["state"]),
        ("reason", found["reason"] or "-"),
        ("made", f"{local_time(found['created_at'])} by {found['by']}"),
        ("ended", local_time(found["ended_at"])),
        ("rate", rate),
        ("items", f"{found['total']:,}: {outcome(found)}"),
    ):
        facts.add_row(Text(name, style="dim"), Text(value))
    out.print(facts)
    _print_codes(items)
    _print_items(items)


def _print_codes(items: list[dict[str, Any]]) -> None:
    codes = Counter(item["code"] for item in items if item["code"])
    if codes:
        print_text(
            out, "\nfailed again with " + ", ".join(f"{code}: {number:,}" for code, number in codes.most_common())
        )


def _print_items(items: list[dict[str, Any]]) -> None:
    """All of a small batch, and of a larger one those that did not go well."""
    shown = items if len(items) <= SHOWN else [item for item in items if _is_worth_showing(item)]
    if shown:
        print_text(out)
        table = new_table("partner", "offer", "outcome", "code")
        for item in shown[:SHOWN]:
            add_row(table, item["partner_id"], item["offer_id"], item["outcome"], item["code"])
        out.print(table)
    more = len(items) - len(shown[:SHOWN])
    if more:
        print_text(
            out,
            f"{'and ' * bool(shown)}{pluralize(more, 'more item' if shown else 'item')}; --csv or --json prints all",
        )


def _is_worth_showing(item: dict[str, Any]) -> bool:
    return item["ended_at"] is not None and item["outcome"] not in WENT_WELL


def _add_move(name: str, to: BatchState, does: str) -> None:
    """Adds the command that brings a batch into a state."""

    @batch.command(name, help=f"{does}\n\nExample: confirm-offer batch {name} 12")
    @click.argument("batch_id", metavar="ID", type=int)
    @reason_option
    @json_option
    @handle_errors
    def move(batch_id: int, reason: str | None, as_json: bool) -> None:
        with database.connect(read(DatabaseSettings).url).begin() as connection:
            before = _find(connection, batch_id)
            if not tasks.move(connection, batch_id, to, who(), reason):
                ended = local_time(before["ended_at"])
                raise Failed(f"batch {batch_id} has ended: it is {before['state']} since {ended}")
            (found,) = tasks.overview(connection, batch_id)
        was = " already" if before["state"] == to else ""
        print_result(as_json, f"Batch {batch_id} is {to}{was}: {outcome(found)}.", **(in_utc(found) if as_json else {}))


_add_move(
    "pause",
    BatchState.PAUSED,
    'Feeds no more of a batch to the workers, until "batch resume". What is under way goes on.',
)
_add_move("resume", BatchState.RUNNING, "Goes on with a batch that was paused.")
_add_move(
    "cancel",
    BatchState.CANCELLED,
    "Ends a batch for good. What was not tried stays as it is; what is under way goes on.",
)
