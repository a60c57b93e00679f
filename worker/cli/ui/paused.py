"""The pauses that stand, for commands that show them."""

from datetime import datetime
from typing import Any

from rich.console import Console
from sqlalchemy import Connection

from tasks.operations import pauses
from tasks.operations.pauses import paused_scope
from worker.cli.ui.tables import print_commands, print_text
from worker.formatting import local_time
from worker.storage.pause_cache import ALL


def standing(connection: Connection) -> list[dict[str, Any]]:
    """All pauses for ``--json`` (times as datetime); ``partner_id`` is None in the one for all."""
    return [
        {"partner_id": row.partner_id or None, "reason": row.reason, "by": row.by, "created_at": row.created_at}
        for row in pauses.standing(connection)
    ]


def tell_paused(console: Console, stand: list[dict[str, Any]]) -> None:
    """What is paused, since when, why, and how to end it. Nothing where nothing is."""
    if not stand:
        return
    print_text(console)
    print_text(console, "Paused now:", style="bold yellow")
    for one in stand:
        partner = one["partner_id"]
        made: datetime = one["created_at"]
        print_text(
            console,
            f"{paused_scope(partner or ALL)}, since {local_time(made)}, by {one['by']}: {one['reason']}",
            indent=2,
        )
    print_text(console, "To end it:")
    print_commands(
        console,
        *("confirm-offer resume" + (f" --partner {one['partner_id']}" * bool(one["partner_id"])) for one in stand),
    )
