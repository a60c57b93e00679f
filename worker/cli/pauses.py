"""``confirm-offer pause`` and ``resume``: a person stops calls to XONE, and lets them go on."""

import click
from sqlalchemy import Connection, exists, select

from models.job import is_path_id
from models.tables import Confirmation
from tasks.operations import pauses
from tasks.operations.audit import who
from tasks.operations.pauses import paused_scope
from worker.cli.ui.console import handle_errors, json_option, out, print_json, reason_option
from worker.cli.ui.paused import standing, tell_paused
from worker.cli.ui.tables import print_text
from worker.formatting import in_utc
from worker.settings import DatabaseSettings, read
from worker.storage import database
from worker.storage.pause_cache import ALL


def _partner(_: click.Context, param: click.Parameter, value: str | None) -> str:
    """The partner's id; ALL where none is given."""
    if value is None:
        return ALL
    if not is_path_id(value):
        raise click.BadParameter(f"{value!r} can't be the id of a partner", param=param)
    return value


def _not_empty(_: click.Context, param: click.Parameter, value: str) -> str:
    if not value.strip():
        raise click.BadParameter("say why", param=param)
    return value.strip()


@click.command("pause")
@click.option("--partner", callback=_partner, help="Only this partner's calls; all without it.")
@click.option("--reason", required=True, callback=_not_empty, help="Why, for whoever looks next.")
@json_option
@handle_errors
def pause(partner: str, reason: str, as_json: bool) -> None:
    """Stops calls to XONE, until "resume".

    It survives restarts, and all workers heed it within seconds. Jobs wait in the database; nothing is lost, and no
    attempt is used up. Calls under way come to their end.

    Example: confirm-offer pause --reason "XONE's maintenance until 04:00"
    """
    with database.connect(read(DatabaseSettings).url).begin() as connection:
        is_new = pauses.pause(connection, partner, reason, who())
        stand = standing(connection)
        is_known = partner == ALL or _has_jobs(connection, partner)
    if as_json:
        print_json({"changed": is_new, "paused": in_utc(stand)})
        return
    if is_new:
        print_text(out, f"Calls to XONE are paused for {paused_scope(partner)}.")
    else:
        print_text(out, f"Calls to XONE were paused for {paused_scope(partner)} already; the first reason stays.")
    if not is_known:
        print_text(out, f"No job of {paused_scope(partner)} has come yet: is the id right?", style="yellow")
    print_text(out, "Workers heed it within seconds. Jobs wait; nothing is lost, and no attempt is used up.")
    tell_paused(out, stand)


@click.command("resume")
@click.option("--partner", callback=_partner, help="End this partner's pause; without it, the pause for all.")
@reason_option
@json_option
@handle_errors
def resume(partner: str, reason: str | None, as_json: bool) -> None:
    """Ends a pause of calls to XONE.

    The one for all ends, or with --partner that partner's.

    Example: confirm-offer resume --partner P-100
    """
    with database.connect(read(DatabaseSettings).url).begin() as connection:
        ended = pauses.resume_calls(connection, partner, who(), reason)
        stand = standing(connection)
    if as_json:
        print_json({"changed": bool(ended), "paused": in_utc(stand)})
        return
    if ended:
        print_text(out, f"The pause for {paused_scope(partner)} has ended. What has waited goes to XONE bit by bit.")
    else:
        print_text(out, f"There was no pause for {paused_scope(partner)}; nothing was changed.")
    tell_paused(out, stand)


def _has_jobs(connection: Connection, partner: str) -> bool:
    return bool(connection.execute(select(exists().where(Confirmation.partner_id == partner))).scalar_one())
