"""The pauses of calls to XONE, for commands that show them."""

from collections.abc import Sequence

from rich.console import Console

from tasks.operations.pauses import ActivePause, paused_scope, resume_command
from worker.cli.ui.tables import print_commands, print_text
from worker.formatting import local_time


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
    print_commands(console, *(resume_command(pause.partner_id) for pause in pauses))
