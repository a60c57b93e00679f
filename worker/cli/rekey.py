"""``confirm-offer rekey``: encrypts stored data with the first of DATA_KEYS again."""

import sys
from collections.abc import Sequence
from uuid import UUID

import click

from tasks.operations.audit import Tally
from tasks.privacy import rekey as rekeying
from tasks.privacy.rekey import Rekeyed
from worker.cli.ui.console import (
    Failed,
    by_option,
    handle_errors,
    json_option,
    out,
    print_error,
    print_note,
    print_result,
    print_wrapped,
    progress,
    reason_option,
)
from worker.cli.ui.pacing import at_half_speed
from worker.formatting import pluralize
from worker.settings import DatabaseSettings, EncryptionSettings, read
from worker.storage import database
from worker.storage.encryption import Encryption

MAX_NAMED = 20  # confirmations that are named to a person


@click.command(short_help="Encrypts what is stored with the first of DATA_KEYS again.")
@reason_option
@by_option
@json_option
@handle_errors
def rekey(reason: str | None, as_json: bool) -> None:
    """Encrypts all stored values with the first key of DATA_KEYS again, while workers run.

    Afterwards the other keys can be taken out of DATA_KEYS. If interrupted, run it again to go on. It also indexes the
    e-mails of confirmations that an earlier version stored. A value that no key opens is named and left as it is.

    Exit code 1 if there is such a value.

    Example: confirm-offer rekey
    """
    encryption, engine = Encryption(read(EncryptionSettings).keys), database.connect(read(DatabaseSettings).url)
    with engine.connect() as connection:
        total = rekeying.count(connection)
    done = Rekeyed()
    with Tally(engine, "rekey", reason) as tally, progress() as bar:
        task = bar.add_task("encrypting again", total=total)
        try:
            for step in at_half_speed(rekeying.rekey(engine, encryption)):
                done += step
                tally.add(step.resealed)
                bar.advance(task, step.confirmations)
        except KeyboardInterrupt:
            raise Failed(f"interrupted: {pluralize(done.resealed, 'value')} done; run it again to go on") from None
    print_result(
        as_json,
        f"{done.resealed:,} of {pluralize(done.values, 'value')} in {pluralize(done.confirmations, 'confirmation')} "
        "encrypted again with the first key of DATA_KEYS"
        + (f";\n{done.indexed:,} can now be found by e-mail under it" if done.indexed else ""),
        confirmations=done.confirmations,
        values=done.values,
        resealed=done.resealed,
        indexed=done.indexed,
        unreadable=[{"confirmation": str(id_), "value": place} for id_, place in done.unreadable],
    )
    if done.unreadable:
        _print_unreadable(done.unreadable)
        sys.exit(1)
    if not as_json:
        print_wrapped(out, "The other keys can be retired once no running worker has another first key.")


def _print_unreadable(unreadable: Sequence[tuple[UUID, str]]) -> None:
    for confirmation_id, place in unreadable[:MAX_NAMED]:
        print_note(f"no key opens: {place} of confirmation {confirmation_id}")
    if len(unreadable) > MAX_NAMED:
        print_note(f"and {len(unreadable) - MAX_NAMED:,} more; --json names all")
    print_error(
        f"{pluralize(len(unreadable), 'value')} opened with no key of DATA_KEYS, and stayed as "
        f"{'it was' if len(unreadable) == 1 else 'they were'}; add the key that was in use, then run it again"
    )
