"""``confirm-offer erase``: forgets a person."""

import sys
from typing import Any

import click
from sqlalchemy import Engine, Row

from models.states import PURGEABLE, State
from tasks import email_index
from tasks.operations.audit import audit, who
from tasks.privacy import purge as purging
from worker.cli.ui.console import ask, handle_errors, json_option, print_error, print_json, print_note
from worker.formatting import pluralize
from worker.settings import DatabaseSettings, EncryptionSettings, read
from worker.storage import database
from worker.storage.encryption import Encryption


@click.command(short_help="Forgets a person, found by an e-mail.")
@click.option("--email", required=True, help='The person\'s e-mail; its case does not count ("-": standard input).')
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--reason", help="Why, for the record: write no personal data.")
@json_option
@handle_errors
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
    encryption, engine = Encryption(read(EncryptionSettings).keys), database.connect(read(DatabaseSettings).url)
    with engine.connect() as connection:
        found = purging.of_person(connection, encryption, email)
        unsearched = email_index.count_unsearched(connection)
    ended = [row for row in found if row.has_ended]
    if ended:
        under_way = f" ({len(found) - len(ended):,} more can't be yet)" if len(ended) < len(found) else ""
        ask(f"Blank the personal data of {pluralize(len(ended), 'confirmation')}{under_way}, for good?", yes)
    erased = {row.id for row in ended if _erase(engine, encryption, email, row)}
    left = [row for row in found if row.id not in erased]
    with engine.begin() as connection:
        audit(
            connection,
            "erase",
            who(),
            reason,
            len(erased),
            left=len(left),
            email_hash=encryption.email_hash(email).hex(),
        )
    if as_json:
        names = ("partner_id", "offer_id", "state")
        of_left = [{name: row._mapping[name] for name in names} for row in left]
        print_json({"erased": len(erased), "left": of_left, "unsearched": unsearched})
    elif found:
        click.echo(f"{pluralize(len(erased), 'confirmation')} erased")
    else:
        click.echo("nobody was found by this e-mail")
    _tell_left(left, unsearched)
    sys.exit(1 if left or unsearched else 0)


def _erase(engine: Engine, encryption: Encryption, email: str, row: Row[Any]) -> bool:
    with engine.begin() as connection:
        return purging.erase(connection, encryption, email, row.id)


def _why(row: Row[Any]) -> str:
    if row.state == State.NEEDS_REVIEW:
        return "resolve it first"
    return "its event is not yet published" if row.state in PURGEABLE else "under way"


def _tell_left(left: list[Row[Any]], unsearched: int) -> None:
    for row in left:
        print_note(f"left: offer {row.offer_id} of {row.partner_id} ({row.state}: {_why(row)})")
    if left:
        print_error("not all were erased; run it again when those that are left have ended")
    if unsearched:
        print_error(
            f"{pluralize(unsearched, 'confirmation')} of an earlier version could not be searched; "
            "run 'confirm-offer rekey', then this again"
        )
