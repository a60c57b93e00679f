"""``rekey``, ``purge`` and ``erase``: the keys that stored personal data is under, and its end."""

import sys
import time
from collections.abc import Iterator
from datetime import datetime
from typing import Any, TypeVar

import click
from sqlalchemy import Engine, Row

from models.exact_json import moment
from models.states import State
from tasks import email_index
from tasks.operations.audit import Tally, audit, who
from tasks.privacy import purge as purging
from tasks.privacy import rekey as rekeying
from tasks.privacy.rekey import Rekeyed
from worker.commands.console import (
    Failed,
    ask,
    complain,
    json_option,
    out,
    plainly,
    print_json,
    progress,
    reason_option,
    remark,
    tell,
    write,
)
from worker.commands.layout import counted
from worker.commands.moments import MOMENT
from worker.settings import DatabaseSettings, VaultSettings, read
from worker.show import local
from worker.storage import database
from worker.storage.encryption import Vault

NAMED = 20  # confirmations that are named to a person
Step = TypeVar("Step")


def with_pauses(steps: Iterator[Step]) -> Iterator[Step]:
    """The steps, each followed by a pause as long as it took: live work comes first."""
    begun = time.monotonic()
    for step in steps:
        took = time.monotonic() - begun
        yield step
        time.sleep(took)
        begun = time.monotonic()


@click.command(short_help="Encrypts what is stored with the first of DATA_KEYS again.")
@reason_option
@json_option
@plainly
def rekey(reason: str | None, as_json: bool) -> None:
    """Encrypts all that is stored with the first key of DATA_KEYS again, while workers go on.

    Afterwards the other keys can be taken out of DATA_KEYS. Interrupted, it goes on when it is run again. It also lets
    confirmations be found by their e-mails that an earlier version stored. A value that no key opens is named and left
    as it is.

    Exit code 1 where there is such a value.

    Example: confirm-offer rekey
    """
    vault, engine = Vault(read(VaultSettings).keys), database.connect(read(DatabaseSettings).url)
    with engine.connect() as connection:
        total = rekeying.count(connection)
    done = Rekeyed()
    with Tally(engine, "rekey", reason) as tally, progress() as bar:
        task = bar.add_task("encrypting again", total=total)
        try:
            for step in with_pauses(rekeying.rekey(engine, vault)):
                done += step
                tally.add(step.resealed)
                bar.advance(task, step.confirmations)
        except KeyboardInterrupt:
            raise Failed(f"interrupted: {counted(done.resealed, 'value')} done; run it again to go on") from None
    tell(
        as_json,
        f"{done.resealed:,} of {counted(done.values, 'value')} in {counted(done.confirmations, 'confirmation')} "
        "encrypted again with the first key of DATA_KEYS"
        + (f";\n{done.indexed:,} can now be found by e-mail under it" if done.indexed else ""),
        confirmations=done.confirmations,
        values=done.values,
        resealed=done.resealed,
        indexed=done.indexed,
        unreadable=[{"confirmation": str(one), "value": place} for one, place in done.unreadable],
    )
    if done.unreadable:
        _tell_unreadable(done.unreadable)
        sys.exit(1)
    if not as_json:
        write(out, "The other keys can be retired, once no worker runs any more whose first key is another one.")


def _tell_unreadable(unreadable: list[Any]) -> None:
    for confirmation_id, place in unreadable[:NAMED]:
        remark(f"no key opens: {place} of confirmation {confirmation_id}")
    if len(unreadable) > NAMED:
        remark(f"and {len(unreadable) - NAMED:,} more; --json names all")
    complain(
        f"{counted(len(unreadable), 'value')} opened with no key of DATA_KEYS, and stayed as "
        f"{'it was' if len(unreadable) == 1 else 'they were'}; add the key that was in use, then run it again"
    )


@click.command(short_help="Blanks the personal data of what ended long ago.")
@click.option("--older-than", "before", type=MOMENT, required=True, help="Ended so long ago: 90d, 12w, 36h; or a time.")
@click.option("--dry-run", is_flag=True, help="Only show how many there are.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@reason_option
@json_option
@plainly
def purge(before: datetime, dry_run: bool, yes: bool, reason: str | None, as_json: bool) -> None:
    """Blanks the personal data of confirmations that ended long ago: confirmed, pending or failed.

    What they came to stays: states, ids, prices, policies, attempts, times, events. Those that need review keep their
    data. A purged confirmation can't be tried again. RETENTION_DAYS lets the workers do this by themselves.

    Exit code 1 where some were in use and are left.

    Example: confirm-offer purge --older-than 90d
    """
    engine = database.connect(read(DatabaseSettings).url)
    with engine.connect() as connection:
        total = purging.count(connection, before)
    since = f"that ended before {local(before)}"
    if dry_run or not total:
        text = f"{counted(total, 'confirmation')} {since}" if total else f"no confirmation with personal data {since}"
        return tell(as_json, text + "; nothing was changed", purged=0, left=total)
    ask(f"Blank the personal data of {counted(total, 'confirmation')} {since}, for good?", yes)
    purged = 0
    with Tally(engine, "purge", reason, before=moment(before)) as tally, progress() as bar:
        task = bar.add_task("blanking", total=total)
        try:
            for number in with_pauses(_purge(engine, before)):
                purged += number
                tally.add(number)
                bar.advance(task, number)
        except KeyboardInterrupt:
            raise Failed(f"interrupted: {purged:,} of {counted(total, 'confirmation')} purged") from None
    with engine.connect() as connection:
        left = purging.count(connection, before)
    tell(as_json, f"{counted(purged, 'confirmation')} purged", purged=purged, left=left)
    if left:
        complain(f"{left:,} were in use and are left; run it again")
        sys.exit(1)
    return None


def _purge(engine: Engine, before: datetime) -> Iterator[int]:
    while True:
        with engine.begin() as connection:
            number = purging.purge(connection, before)
        if not number:
            return
        yield number


@click.command(short_help="Forgets a person, found by an e-mail.")
@click.option("--email", required=True, help='The person\'s e-mail; its case does not count ("-": standard input).')
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--reason", help="Why, for the record: write no personal data.")
@json_option
@plainly
def erase(email: str, yes: bool, reason: str | None, as_json: bool) -> None:
    """Blanks the personal data of all confirmations that a person's e-mail stands in.

    It is looked for as policyholder's, in the job and as XONE returned it, and as that of an insured. What is blanked
    and what stays is as with "purge". What is still under way, or needs review, is named and left. RabbitMQ is not
    searched: see "dead-letters list".

    Exit code 1 where some are left.

    Example: confirm-offer erase --email ada@example.com
    """
    if email == "-":
        email = sys.stdin.readline()
    if "@" not in email:
        raise click.UsageError("--email should be an e-mail address")
    vault, engine = Vault(read(VaultSettings).keys), database.connect(read(DatabaseSettings).url)
    with engine.connect() as connection:
        found = purging.of_person(connection, vault, email)
        unsearched = email_index.count_unsearched(connection)
    ended = [row for row in found if row.has_ended]
    if ended:
        under_way = f" ({len(found) - len(ended):,} more can't be yet)" if len(ended) < len(found) else ""
        ask(f"Blank the personal data of {counted(len(ended), 'confirmation')}{under_way}, for good?", yes)
    erased = {row.id for row in ended if _erase(engine, vault, email, row)}
    left = [row for row in found if row.id not in erased]
    with engine.begin() as connection:
        audit(connection, "erase", who(), reason, len(erased), left=len(left), email_hash=vault.email_hash(email).hex())
    if as_json:
        names = ("partner_id", "offer_id", "state")
        of_left = [{name: row._mapping[name] for name in names} for row in left]
        print_json({"erased": len(erased), "left": of_left, "unsearched": unsearched})
    elif found:
        click.echo(f"{counted(len(erased), 'confirmation')} erased")
    else:
        click.echo("nobody was found by this e-mail")
    _tell_left(left, unsearched)
    sys.exit(1 if left or unsearched else 0)


def _erase(engine: Engine, vault: Vault, email: str, row: Row[Any]) -> bool:
    with engine.begin() as connection:
        return purging.erase(connection, vault, email, row.id)


def _why(row: Row[Any]) -> str:
    if row.state == State.NEEDS_REVIEW:
        return "resolve it first"
    return "its event is not yet published" if row.state in purging.ENDED else "under way"


def _tell_left(left: list[Row[Any]], unsearched: int) -> None:
    for row in left:
        remark(f"left: offer {row.offer_id} of {row.partner_id} ({row.state}: {_why(row)})")
    if left:
        complain("not all were erased; run it again when those that are left have ended")
    if unsearched:
        complain(
            f"{counted(unsearched, 'confirmation')} of an earlier version could not be searched; "
            "run 'confirm-offer rekey', then this again"
        )
