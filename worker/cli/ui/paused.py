"""The pauses of calls to XONE, for commands that show them."""

from collections.abc import Sequence

from rich.console import Console

from tasks.operations.pauses import ActivePause, paused_scope
from worker.cli.ui.tables import print_commands, print_text
from worker.formatting import local_time, shell_word


def print_paused(console: Console, pauses: Sequence[ActivePause]) -> None:
    """What is paused, since when, why, and how to end it. Prints nothing without a pause."""
    if not pauses:
        return
    print_text(console)
    print_text(console, "Paused now:", style="bold yellow")
    for pause in pauses:
        scope = paused_scope(pause.partner_id)
        print_text(console, f"{scope}, since {local_time(pause.created_at)}, by {pause.by}: {pause.reason}", indent=2)
    print_text(console, "To end it:")
    print_commands(console, *map(_resume_command, pauses))


def _resume_command(pause: ActivePause) -> str:
    return "confirm-offer resume" + (f" --partner {shell_word(pause.partner_id)}" if pause.partner_id else "")
