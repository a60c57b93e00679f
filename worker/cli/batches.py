"""``confirm-offer batches`` and ``batch``: the progress of reprocessing, and pausing or cancelling it."""

import sys
from collections import Counter
from collections.abc import Sequence

import click
from rich.table import Table
from rich.text import Text
from sqlalchemy import Connection

from models.states import BatchState, State
from tasks.operations import batches as operations
from tasks.operations import pauses
from tasks.operations.audit import who
from tasks.operations.batches import BatchProgress, ItemOutcome
from worker.cli.ui.batch_progress import follow, outcome
from worker.cli.ui.console import (
    Failed,
    by_option,
    handle_errors,
    json_option,
    out,
    print_csv,
    print_json,
    print_result,
    reason_option,
)
from worker.cli.ui.number_param import COUNT
from worker.cli.ui.paused import print_paused
from worker.cli.ui.tables import add_row, new_grid, new_table, print_text
from worker.formatting import local_time, pluralize, short_time, to_json
from worker.settings import DatabaseSettings, read
from worker.storage import database

MAX_ITEMS = 20  # that a person is shown
MAX_ID = 2**31 - 1
ITEM_COLUMNS = ("partner_id", "offer_id", "outcome", "code", "fed_at", "ended_at")
STYLES = {BatchState.RUNNING: "cyan", BatchState.PAUSED: "yellow", BatchState.CANCELLED: "dim"}
SUCCESSES = (State.CONFIRMED, State.PENDING)


@click.command("batches")
@click.option("--limit", type=COUNT, default=20, show_default=True, help="At most so many.")
@json_option
@handle_errors
def batches(limit: int, as_json: bool) -> None:
    """Lists the batches of reprocessing.

    The newest comes first. "left" counts the items that wait or are under way.

    Example: confirm-offer batches
    """
    with database.connect(read(DatabaseSettings).url).connect() as connection:
        listed = operations.overview(connection, limit)
        active_pauses = pauses.active(connection)
    if as_json:
        print_json({"batches": to_json(listed)})
    elif not listed:
        print_text(out, "There are no batches; 'confirm-offer reprocess' makes one.")
    else:
        out.print(_overview(listed))
        if any(batch.state == BatchState.RUNNING for batch in listed):
            print_paused(out, active_pauses)


def _overview(listed: Sequence[BatchProgress]) -> Table:
    numbers = ["id", "total", "confirmed", "failed", "left"]
    table = new_table("id", "state", "made", "total", "confirmed", "failed", "left", "reason", numbers=numbers)
    for batch in listed:
        left = batch.running + (batch.waiting if batch.state != BatchState.CANCELLED else 0)
        state = Text(batch.state, style=STYLES.get(batch.state, ""))
        counts = (batch.total, batch.confirmed, batch.failed, left)
        add_row(table, batch.id, state, short_time(batch.created_at), *counts, batch.reason)
    return table


@click.group("batch")
def batch() -> None:
    """One batch of reprocessing."""


@batch.command("show")
@click.argument("batch_id", metavar="ID", type=COUNT)
@click.option("--follow", "is_followed", is_flag=True, help="Show progress until all have ended.")
@click.option("--csv", "as_csv", is_flag=True, help="Print each item as CSV.")
@json_option
@handle_errors
def show(batch_id: int, is_followed: bool, as_csv: bool, as_json: bool) -> None:
    """Shows a batch and the outcome of its items. --csv and --json print each item.

    Example: confirm-offer batch show 12
    """
    engine = database.connect(read(DatabaseSettings).url)
    with engine.connect() as connection:
        progress = _progress(connection, batch_id)
        items = operations.items(connection, batch_id)
        active_pauses = pauses.active(connection)
    if as_json:
        print_json({**to_json(progress), "items": to_json(items)})
    elif as_csv:
        print_csv(ITEM_COLUMNS, to_json(items))
    elif is_followed:
        sys.exit(0 if follow(engine, batch_id, out) else 1)
    else:
        _print(progress, items)
        if progress.state == BatchState.RUNNING:
            print_paused(out, active_pauses)


def _progress(connection: Connection, batch_id: int) -> BatchProgress:
    progress = operations.progress(connection, batch_id) if abs(batch_id) <= MAX_ID else None
    if progress is None:
        raise Failed(f"there is no batch {batch_id}; 'confirm-offer batches' lists them")
    return progress


def _print(batch: BatchProgress, items: Sequence[ItemOutcome]) -> None:
    facts = new_grid()
    add_row(facts, "batch", str(batch.id))
    add_row(facts, "state", batch.state)
    add_row(facts, "reason", batch.reason)
    add_row(facts, "made", f"{local_time(batch.created_at)} by {batch.by}")
    add_row(facts, "ended", local_time(batch.ended_at))
    add_row(facts, "rate", f"{batch.rate:g} a second" if batch.rate is not None else "no limit was given")
    add_row(facts, "items", f"{batch.total:,}: {outcome(batch)}")
    out.print(facts)
    _print_codes(items)
    _print_items(items)


def _print_codes(items: Sequence[ItemOutcome]) -> None:
    codes = Counter(item.code for item in items if item.code)
    if codes:
        counts = ", ".join(f"{code}: {number:,}" for code, number in codes.most_common())
        print_text(out, f"\nfailed again with {counts}")


def _print_items(items: Sequence[ItemOutcome]) -> None:
    """All items of a small batch; of a larger one those that did not succeed."""
    chosen = items if len(items) <= MAX_ITEMS else [item for item in items if _has_not_succeeded(item)]
    shown = chosen[:MAX_ITEMS]
    if shown:
        print_text(out)
        table = new_table("partner", "offer", "outcome", "code")
        for item in shown:
            add_row(table, item.partner_id, item.offer_id, item.outcome, item.code)
        out.print(table)
    more = len(items) - len(shown)
    if more:
        what = f"and {pluralize(more, 'more item')}" if shown else pluralize(more, "item")
        print_text(out, f"{what}; --csv or --json prints all")


def _has_not_succeeded(item: ItemOutcome) -> bool:
    return item.ended_at is not None and item.outcome not in SUCCESSES


def _add_move(name: str, to: BatchState, does: str) -> None:
    """Adds the command that brings a batch into a state."""

    @batch.command(name, help=f"{does}\n\nExample: confirm-offer batch {name} 12")
    @click.argument("batch_id", metavar="ID", type=COUNT)
    @reason_option
    @by_option
    @json_option
    @handle_errors
    def move(batch_id: int, reason: str | None, as_json: bool) -> None:
        with database.connect(read(DatabaseSettings).url).begin() as connection:
            before = _progress(connection, batch_id)
            if not operations.move(connection, batch_id, to, who(), reason):
                ended = local_time(before.ended_at)
                raise Failed(f"batch {batch_id} has ended: it is {before.state} since {ended}")
            after = _progress(connection, batch_id)
        was = " already" if before.state == to else ""
        print_result(as_json, f"Batch {batch_id} is {to}{was}: {outcome(after)}.", **to_json(after))


_add_move(
    "pause",
    BatchState.PAUSED,
    'Stops feeding a batch to the workers, until "batch resume". Items under way go on.',
)
_add_move("resume", BatchState.RUNNING, "Goes on with a batch that was paused.")
_add_move(
    "cancel",
    BatchState.CANCELLED,
    "Ends a batch; it can't be resumed. Items that were not tried stay failed; items under way go on.",
)
