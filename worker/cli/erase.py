"""``confirm-offer erase``: a person's right to be forgotten."""

import sys
from collections.abc import Mapping, Sequence
from uuid import UUID

import click
from sqlalchemy import Engine

from models.states import PURGEABLE, State
from tasks import email_index
from tasks.operations.audit import audit, who
from tasks.privacy import purge as purging
from tasks.privacy.purge import PersonsConfirmation
from worker.cli.ui.console import ask, by_option, handle_errors, json_option, print_error, print_json, print_note
from worker.errors import describe
from worker.formatting import pluralize
from worker.outages import may_blame_item
from worker.settings import DatabaseSettings, EncryptionSettings, read
from worker.storage import database
from worker.storage.encryption import Encryption


@click.command(short_help="Forgets a person, found by an e-mail.")
@click.option("--email", required=True, help='The person\'s e-mail; its case does not count ("-": standard input).')
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--reason", help="Why, for the audit: write no personal data.")
@by_option
@json_option
@handle_errors
def erase(email: str, yes: bool, reason: str | None, as_json: bool) -> None:
    """Blanks the personal data of all confirmations that contain a person's e-mail.

    The e-mail may be the policyholder's, as sent or as XONE returned it, or that of an insured. The same data is
    blanked as by "purge". Confirmations that are under way or need review are named and left. RabbitMQ is not searched:
    see "dead-letters list".

    Exit code 1 if some are left.

    Example: confirm-offer erase --email ada@example.com
    """
    if email == "-":
        email = sys.stdin.readline()
    if "@" not in email:
        raise click.UsageError("--email should be an e-mail address")
    encryption, engine = Encryption(read(EncryptionSettings).keys), database.connect(read(DatabaseSettings).url)
    with engine.connect() as connection:
        confirmations = purging.of_person(connection, encryption, email)
        unsearched = email_index.count_unsearched(connection)
    ended = [confirmation for confirmation in confirmations if confirmation.has_ended]
    if ended:
        under_way = (
            f" ({len(confirmations) - len(ended):,} more can't be yet)" if len(ended) < len(confirmations) else ""
        )
        ask(
            f"Blank the personal data of {pluralize(len(ended), 'confirmation')}{under_way}? This can't be undone.", yes
        )
    broken: dict[UUID, Exception] = {}
    erased = {row.id for row in ended if _erase(engine, encryption, email, row.id, broken)}
    left = [confirmation for confirmation in confirmations if confirmation.id not in erased]
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
        named = [{"partner_id": row.partner_id, "offer_id": row.offer_id, "state": row.state} for row in left]
        print_json({"erased": len(erased), "left": named, "unsearched": unsearched})
    elif confirmations:
        click.echo(f"{pluralize(len(erased), 'confirmation')} erased")
    else:
        click.echo("nobody was found by this e-mail")
    _print_left(left, broken, unsearched)
    sys.exit(1 if left or unsearched else 0)


def _erase(
    engine: Engine, encryption: Encryption, email: str, confirmation_id: UUID, broken: dict[UUID, Exception]
) -> bool:
    """Whether it was erased. One that fails by a defect is added to ``broken``; it stops no other."""
    try:
        with engine.begin() as connection:
            return purging.erase(connection, encryption, email, confirmation_id)
    except Exception as error:
        if not may_blame_item(error):
            raise
        broken[confirmation_id] = error
        return False


def _why_left(confirmation: PersonsConfirmation, defect: Exception | None) -> str:
    if defect is not None:
        return f"a defect: {describe(defect)}"
    if confirmation.state is State.NEEDS_REVIEW:
        return "resolve it first"
    return "its event is not yet published" if confirmation.state in PURGEABLE else "under way"


def _print_left(left: Sequence[PersonsConfirmation], broken: Mapping[UUID, Exception], unsearched: int) -> None:
    for row in left:
        why = _why_left(row, broken.get(row.id))
        print_note(f"left: offer {row.offer_id} of {row.partner_id} ({row.state}: {why})")
    if broken:
        print_error(f"{pluralize(len(broken), 'confirmation')} can't be erased because of a defect")
    if len(left) > len(broken):
        print_error("not all were erased; run it again when those that are left have ended")
    if unsearched:
        print_error(
            f"{pluralize(unsearched, 'confirmation')} of an earlier version could not be searched; "
            "run 'confirm-offer rekey', then this again"
        )
