"""What keeps calls to XONE from passing, a person or an outage, for commands that show it."""

from collections.abc import Sequence

from rich.console import Console

from tasks.operations.pauses import ActivePause, paused_scope, resume_command
from tasks.operations.workers import StoppedCalls
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


def print_stopped(console: Console, stopped: Sequence[StoppedCalls]) -> None:
    """What stops calls without a person, since when and for how long. Prints nothing where they pass."""
    if not stopped:
        return
    print_text(console)
    print_text(console, "Stopped now; the workers go on by themselves:", style="bold yellow")
    for stop in stopped:
        print_text(console, str(stop), indent=2)
