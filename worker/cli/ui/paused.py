"""The pauses that stand, for commands that show them."""

from datetime import datetime
from typing import Any

from rich.console import Console
from sqlalchemy import Connection

from tasks.operations import pauses
from tasks.operations.pauses import whom
from worker.cli.ui.tables import command, say
from worker.formatting import in_utc as in_utc
from worker.formatting import local
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
    say(console)
    say(console, "Paused now:", style="bold yellow")
    for one in stand:
        partner = one["partner_id"]
        made: datetime = one["created_at"]
        say(console, f"{whom(partner or ALL)}, since {local(made)}, by {one['by']}: {one['reason']}", indent=2)
    say(console, "To end it:")
    command(
        console,
        *("confirm-offer resume" + (f" --partner {one['partner_id']}" * bool(one["partner_id"])) for one in stand),
    )
