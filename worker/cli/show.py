"""``show``: one screen about a confirmation."""

from typing import Any

import click
from sqlalchemy import Engine

from models.states import State
from tasks.operations import lookup
from tasks.operations.audit import audit, who
from tasks.privacy import reveal
from worker import formatting
from worker.cli.ui import confirmation_screen as view
from worker.cli.ui.console import Failed, handle_errors, json_option, out, print_json
from worker.cli.ui.tables import print_commands, print_text
from worker.errors import DecryptionError, SettingsError
from worker.settings import DatabaseSettings, EncryptionSettings, read
from worker.storage import database
from worker.storage.encryption import Encryption


@click.command(short_help="Shows all that is known of a confirmation.")
@click.argument("offer", metavar="OFFER_ID")
@click.option("--partner", help="Where several partners have an offer or order of this name.")
@click.option("--reveal", "in_clear", is_flag=True, help="Personal data in clear; needs DATA_KEYS, and is audited.")
@json_option
@handle_errors
def show(offer: str, partner: str | None, in_clear: bool, as_json: bool) -> None:
    """Shows a confirmation: state, why, when next, attempts, booking, policies, events.

    OFFER_ID may be an order reference too, where no offer has this id. Personal data is masked; customers' links,
    the security token and kept answers are shown with --reveal only.

    Example: confirm-offer show 5c7e0b1d --partner P-100

    Example: confirm-offer show SO-1001 --reveal
    """
    encryption = Encryption(read(EncryptionSettings).keys) if in_clear else None
    engine = database.connect(read(DatabaseSettings).url)
    found = _the_one(lookup.find(engine, offer, partner), offer, partner)
    revealed = _revealed(engine, encryption, found) if encryption is not None else None
    if as_json:
        print_json(formatting.in_utc({**found.told, **({"revealed": revealed} if revealed is not None else {})}))
        return
    out.print(view.screen(found, _people(engine, found) if revealed is None else None))
    if revealed is not None:
        out.print()
        out.print(view.revealed_screen(revealed))
    if found.told["state"] == State.NEEDS_REVIEW:
        resolve = f"confirm-offer resolve {found.told['offer_id']} --partner {found.told['partner_id']}"
        print_text(out)
        print_text(out, "Look in XONE whether a booking exists, then do one of")
        print_commands(out, f"{resolve} --booking FILE", f"{resolve} --failed WHY")


def _the_one(found: list[lookup.Found], name: str, partner: str | None) -> lookup.Found:
    if not found:
        raise Failed(
            f"no confirmation of offer or order {name}" + (f" and partner {partner}" if partner else "") + "; "
            "its job may wait in the queue still, or be a dead letter: 'confirm-offer dead-letters list'"
        )
    if len(found) == 1:
        return found[0]
    if found[0].told["offer_id"] == name:
        partners = ", ".join(one.told["partner_id"] for one in found)
        raise Failed(f"several partners have offer {name}: {partners}; choose one with --partner")
    offers = ", ".join(f"{one.told['offer_id']} ({one.told['partner_id']})" for one in found)
    at_least = "at least " if len(found) == lookup.MAX_FOUND else ""
    raise Failed(f"order {name} has {at_least}{len(found)} offers: {offers}; show one by its id and --partner")


def _revealed(engine: Engine, encryption: Encryption, found: lookup.Found) -> dict[str, Any]:
    """All that is sealed, once it is on record who has seen it."""
    with engine.begin() as connection:
        opened = {
            **reveal.persons(connection, encryption, found.id),
            **reveal.secrets(connection, encryption, found.id),
        }
        audit(
            connection, "show --reveal", who(), None, 1, partner=found.told["partner_id"], offer=found.told["offer_id"]
        )
    return opened


def _people(engine: Engine, found: lookup.Found) -> dict[str, Any] | None:
    """Who it is about, to be masked. None where DATA_KEYS is not set or does not open it: it is left out."""
    try:
        encryption = Encryption(read(EncryptionSettings).keys)
        with engine.connect() as connection:
            return reveal.persons(connection, encryption, found.id)
    except (SettingsError, DecryptionError):
        return None
