"""``confirm-offer show``: one screen about a confirmation."""

import click
from sqlalchemy import Engine

from models.same import is_same_id
from models.states import State
from tasks.operations import lookup
from tasks.operations.audit import audit, who
from tasks.operations.lookup import FoundConfirmation
from tasks.privacy import reveal
from tasks.privacy.reveal import Persons, Secrets
from worker.cli.ui.confirmation_screen import revealed_screen, screen
from worker.cli.ui.console import Failed, by_option, handle_errors, json_option, out, print_json
from worker.cli.ui.tables import print_commands, print_text
from worker.errors import DecryptionError, SettingsError
from worker.formatting import argument, shell_word, to_json
from worker.settings import DatabaseSettings, EncryptionSettings, read
from worker.storage import database
from worker.storage.encryption import Encryption


@click.command(short_help="Shows all that is known of a confirmation.")
@click.argument("offer", metavar="OFFER_ID")
@click.option("--partner", help="If several partners have an offer or order of this name.")
@click.option("--reveal", "in_clear", is_flag=True, help="Personal data in clear; needs DATA_KEYS, and is audited.")
@by_option
@json_option
@handle_errors
def show(offer: str, partner: str | None, in_clear: bool, as_json: bool) -> None:
    """Shows a confirmation: state, error, next attempt, attempts, booking, policies, events.

    OFFER_ID may also be an order reference, if no offer has this id. Personal data is masked. Customers' links, the
    security token and kept answers are shown only with --reveal.

    Example: confirm-offer show 5c7e0b1d --partner P-100

    Example: confirm-offer show SO-1001 --reveal
    """
    encryption = Encryption(read(EncryptionSettings).keys) if in_clear else None
    engine = database.connect(read(DatabaseSettings).url)
    confirmation = the_only(lookup.find(engine, offer, partner), offer, partner)
    revealed = _reveal(engine, encryption, confirmation) if encryption is not None else None
    if as_json:
        content = to_json(confirmation.details)
        if revealed is not None:
            persons, secrets = revealed
            content["revealed"] = {**to_json(persons), **to_json(secrets)}
        print_json(content)
        return
    out.print(screen(confirmation, _persons(engine, confirmation) if revealed is None else None))
    if revealed is not None:
        out.print()
        out.print(revealed_screen(*revealed))
    details = confirmation.details
    if details.state is State.NEEDS_REVIEW:
        resolve, offer = f"confirm-offer resolve --partner {shell_word(details.partner_id)}", argument(details.offer_id)
        print_text(out)
        print_text(out, "Look in XONE whether a booking exists, then do one of")
        print_commands(out, f"{resolve} --booking FILE {offer}", f"{resolve} --failed WHY {offer}")


def the_only(found: list[FoundConfirmation], name: str, partner: str | None) -> FoundConfirmation:
    if not found:
        raise Failed(
            f"no confirmation of offer or order {name}" + (f" and partner {partner}" if partner else "") + "; "
            "its job may wait in the queue still, or be a dead letter: 'confirm-offer dead-letters list'"
        )
    if len(found) == 1:
        return found[0]
    candidates = [confirmation.details for confirmation in found]
    if is_same_id(candidates[0].offer_id, name):
        partners = ", ".join(details.partner_id for details in candidates)
        raise Failed(f"several partners have offer {name}: {partners}; choose one with --partner")
    offers = ", ".join(f"{details.offer_id} ({details.partner_id})" for details in candidates)
    at_least = "at least " if len(candidates) == lookup.MAX_FOUND else ""
    raise Failed(f"order {name} has {at_least}{len(candidates)} offers: {offers}; show one by its id and --partner")


def _reveal(engine: Engine, encryption: Encryption, found: FoundConfirmation) -> tuple[Persons, Secrets]:
    """All encrypted data of a confirmation. The audit row is written in the same transaction."""
    with engine.begin() as connection:
        persons = reveal.persons(connection, encryption, found.id)
        secrets = reveal.secrets(connection, encryption, found.id)
        ids = {"partner": found.details.partner_id, "offer": found.details.offer_id}
        audit(connection, "show --reveal", who(), None, 1, **ids)
    return persons, secrets


def _persons(engine: Engine, found: FoundConfirmation) -> Persons | None:
    """Whom a confirmation is about, to be masked. None if DATA_KEYS is not set or does not decrypt it."""
    try:
        encryption = Encryption(read(EncryptionSettings).keys)
        with engine.connect() as connection:
            return reveal.persons(connection, encryption, found.id)
    except (SettingsError, DecryptionError):
        return None
