"""``confirm-offer pause`` and ``resume``: stopping calls to XONE, and letting them go on."""

import click
from sqlalchemy import Connection, exists, select

from models.job import is_path_id
from models.tables import Confirmation
from tasks.operations import pauses
from tasks.operations.audit import who
from tasks.operations.pauses import paused_scope
from worker.cli.ui.console import by_option, handle_errors, json_option, out, print_json, reason_option
from worker.cli.ui.paused import print_paused
from worker.cli.ui.tables import print_text
from worker.formatting import to_json
from worker.settings import DatabaseSettings, read
from worker.storage import database
from worker.storage.pause_cache import ALL


def _partner(_: click.Context, param: click.Parameter, value: str | None) -> str:
    """The partner's id; ALL if none is given."""
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
@click.option("--reason", required=True, callback=_not_empty, help="Why; other operators see it.")
@by_option
@json_option
@handle_errors
def pause(partner: str, reason: str, as_json: bool) -> None:
    """Stops calls to XONE, until "resume".

    All workers follow it within seconds, and restarts do not end it. Jobs wait in the database: nothing is lost, and no
    attempt is used up. Calls under way are finished.

    Example: confirm-offer pause --reason "XONE's maintenance until 04:00"
    """
    with database.connect(read(DatabaseSettings).url).begin() as connection:
        is_new = pauses.pause(connection, partner, reason, who())
        active_pauses = pauses.active(connection)
        is_known = partner == ALL or _has_jobs(connection, partner)
    if as_json:
        print_json({"changed": is_new, "paused": to_json(active_pauses)})
        return
    if is_new:
        print_text(out, f"Calls to XONE are paused for {paused_scope(partner)}.")
    else:
        print_text(out, f"Calls to XONE were paused for {paused_scope(partner)} already; the first reason stays.")
    if not is_known:
        print_text(out, f"No job of {paused_scope(partner)} has come yet: is the id right?", style="yellow")
    print_text(out, "Workers follow it within seconds. Jobs wait; nothing is lost, and no attempt is used up.")
    print_paused(out, active_pauses)


@click.command("resume")
@click.option("--partner", callback=_partner, help="End this partner's pause; without it, the pause for all.")
@reason_option
@by_option
@json_option
@handle_errors
def resume(partner: str, reason: str | None, as_json: bool) -> None:
    """Ends a pause of calls to XONE.

    Without --partner, the pause for all ends; pauses of single partners stay.

    Example: confirm-offer resume --partner P-100
    """
    with database.connect(read(DatabaseSettings).url).begin() as connection:
        ended = pauses.resume_calls(connection, partner, who(), reason)
        active_pauses = pauses.active(connection)
    if as_json:
        print_json({"changed": bool(ended), "paused": to_json(active_pauses)})
        return
    if ended:
        print_text(out, f"The pause for {paused_scope(partner)} has ended. Waiting jobs go to XONE bit by bit.")
    else:
        print_text(out, f"There was no pause for {paused_scope(partner)}; nothing was changed.")
    print_paused(out, active_pauses)


def _has_jobs(connection: Connection, partner: str) -> bool:
    return bool(connection.execute(select(exists().where(Confirmation.partner_id == partner))).scalar_one())
