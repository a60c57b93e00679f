"""``confirm-offer purge``: blanks the personal data of confirmations that ended long ago."""

import sys
from collections.abc import Iterator
from datetime import datetime
from uuid import UUID

import click
from sqlalchemy import Engine

from models.exact_json import moment
from tasks.operations.audit import Tally
from tasks.privacy import purge as purging
from worker.cli.ui.console import (
    Failed,
    ask,
    by_option,
    handle_errors,
    json_option,
    print_error,
    print_result,
    progress,
    reason_option,
)
from worker.cli.ui.pacing import at_half_speed
from worker.cli.ui.time_param import MOMENT
from worker.formatting import local_time, pluralize
from worker.settings import DatabaseSettings, read
from worker.storage import database


@click.command(short_help="Blanks the personal data of what ended long ago.")
@click.option(
    "--older-than",
    "before",
    type=MOMENT,
    required=True,
    help="Ended at least so long ago: 90d, 12w, 36h; or a time.",
)
@click.option("--dry-run", is_flag=True, help="Only show how many there are.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@reason_option
@by_option
@json_option
@handle_errors
def purge(before: datetime, dry_run: bool, yes: bool, reason: str | None, as_json: bool) -> None:
    """Blanks the personal data of confirmations that ended long ago: confirmed, pending or failed.

    Business data stays: states, ids, prices, policies, attempts, times, events. Confirmations in needs_review keep
    their personal data. A purged confirmation can't be tried again. With RETENTION_DAYS the workers purge too.

    Exit code 1 if some were in use and are left.

    Example: confirm-offer purge --older-than 90d
    """
    engine = database.connect(read(DatabaseSettings).url)
    with engine.connect() as connection:
        total = purging.count(connection, before)
    since = f"that ended before {local_time(before)}"
    if dry_run or not total:
        text = f"{pluralize(total, 'confirmation')} {since}" if total else f"no confirmation with personal data {since}"
        return print_result(as_json, text + "; nothing was changed", purged=0, left=total)
    ask(f"Blank the personal data of {pluralize(total, 'confirmation')} {since}? This can't be undone.", yes)
    purged, failed = 0, dict[UUID, Exception]()
    with Tally(engine, "purge", reason, before=moment(before)) as tally, progress() as bar:
        task = bar.add_task("blanking", total=total)
        try:
            for number in at_half_speed(_purge(engine, before, failed)):
                purged += number
                tally.add(number)
                bar.advance(task, number)
        except KeyboardInterrupt:
            raise Failed(f"interrupted: {purged:,} of {pluralize(total, 'confirmation')} purged") from None
    with engine.connect() as connection:
        left = purging.count(connection, before)
    print_result(as_json, f"{pluralize(purged, 'confirmation')} purged", purged=purged, left=left)
    if failed:
        named = ", ".join(str(id_) for id_ in list(failed)[:3])
        print_error(f"{len(failed):,} can't be purged because of a defect; ids of the first: {named}")
    if left > len(failed):
        print_error(f"{left - len(failed):,} were in use and are left; run it again")
    if left:
        sys.exit(1)
    return None


def _purge(engine: Engine, before: datetime, failed: dict[UUID, Exception]) -> Iterator[int]:
    """Purges step by step. Adds what can't be purged to ``failed``; it stops no other."""
    while True:
        with engine.begin() as connection:
            known = len(failed)
            number = purging.purge(connection, before, left_out=list(failed), failed=failed)
        if not number and len(failed) == known:
            return
        yield number
