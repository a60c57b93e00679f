"""``confirm-offer demo``: the whole system in one process, and its result."""

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click
from rich.console import Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from worker.cli.ui.confirmation_screen import STYLES
from worker.cli.ui.console import handle_errors, json_option, out, print_json
from worker.cli.ui.tables import add_row, new_table

if TYPE_CHECKING:
    from tasks.operations.lookup import ConfirmationDetails
    from worker.demo import Demo, OnProgress

MAX_ROWS = 40


@click.command(short_help="Runs the whole system in one process, with nothing installed.")
@click.option("--jobs", default=20, show_default=True, type=click.IntRange(1, 2000), help="How many offers to confirm.")
@json_option
@handle_errors
def demo(jobs: int, as_json: bool) -> None:
    """Runs the whole system in one process, with nothing installed, and shows the outcome of each job.

    Example: confirm-offer demo --jobs 50
    """
    from worker import demo as scenario  # Celery: --help should not need it

    running = scenario.prepare(jobs)
    with _display(running, as_json) as on_progress:
        scenario.run(running, on_progress)
    if as_json:
        print_json(_summary(running))
    else:
        _print(running)
    sys.exit(1 if running.problems else 0)


@contextmanager
def _display(demo: "Demo", as_json: bool) -> Iterator["OnProgress"]:
    """Shows progress: a bar on a terminal, a line for each change elsewhere, nothing with --json."""
    if as_json:
        yield lambda _: None
    elif out.is_terminal:
        with Live(console=out, transient=True, auto_refresh=False) as live:
            yield lambda states: live.update(_progress(states, len(demo.offers)), refresh=True)
    else:
        last: Counter[str] = Counter()

        def print_change(states: Counter[str]) -> None:
            nonlocal last
            if states != last:
                out.print(", ".join(f"{state} {count}" for state, count in sorted(states.items())))
            last = states

        yield print_change


def _progress(states: Counter[str], total: int) -> Group:
    from worker.demo import count_ended

    line = Table.grid(padding=(0, 1))
    ended = count_ended(states)
    counts = "  ".join(f"{count} {state}" for state, count in sorted(states.items()))
    line.add_row(ProgressBar(total=total, completed=ended, width=24), f"{ended}/{total}")
    return Group(line, Text(counts, style="dim", no_wrap=True, overflow="ellipsis"))


def _summary(demo: "Demo") -> dict[str, Any]:
    return {
        "confirmations": [
            {"offer_id": offer, "state": details.state, "attempts": len(details.attempts)}
            for offer, details in demo.confirmations.items()
            if details is not None
        ],
        "events": dict(Counter(event["type"] for event in demo.events)),
        "dead_letters": [headers.get("x-dead-letter-code") for headers in demo.dead_letters],
        "seconds": round(demo.seconds, 1),
        "database": str(demo.database),
        "problems": demo.problems,
    }


def _print(demo: "Demo") -> None:
    out.print()
    out.print(_table(demo))
    events = Counter(event["type"] for event in demo.events)
    counts = ", ".join(f"{count} {name}" for name, count in sorted(events.items()))
    out.print()
    out.print(Text.assemble(("Events: ", "bold"), counts))
    for headers in demo.dead_letters:
        why = f"{headers.get('x-dead-letter-code')} - {headers.get('x-dead-letter-detail')}"
        out.print(Text.assemble(("Dead letter: ", "bold"), why))
    out.print(Text.assemble(("Published twice: ", "bold"), f"{next(iter(demo.offers))} - one booking, one event"))
    out.print()
    for problem in demo.problems:
        out.print(f"not as it should be: {problem}", style="red")
    if not demo.problems:
        out.print(f"All {len(demo.offers)} confirmations ended as they should, in {demo.seconds:.1f} s.", style="green")
    out.print(f"\nDatabase and log: {demo.folder}", soft_wrap=True)
    out.print("Look at one:")
    offer = next((offer for offer in demo.offers if "~" in offer), next(iter(demo.offers)))
    out.print(f"  DATABASE_URL=sqlite:///{demo.database} \\\n    confirm-offer show {offer}", soft_wrap=True)
    out.print("Play XONE by yourself:  confirm-offer sandbox")
    out.print("Run it for real:        README.md, from 'Run a worker' on")


def _table(demo: "Demo") -> Table:
    table = new_table("offer", "XONE", "tries", "state", "booking", numbers=("tries",))
    for offer, scenario in list(demo.offers.items())[:MAX_ROWS]:
        details = demo.confirmations[offer]
        if details is None:
            add_row(table, offer, scenario.description, None, Text("not stored", style="red"), None)
        else:
            state = Text(details.state, style=STYLES.get(details.state, ""))
            add_row(table, offer, scenario.description, len(details.attempts), state, _booking(details))
    if len(demo.offers) > MAX_ROWS:
        add_row(table, f"… {len(demo.offers) - MAX_ROWS} more", "", "", "", "")
    return table


def _booking(details: "ConfirmationDetails") -> str | None:
    """The booking's id, or the error's code."""
    if details.booking is not None:
        return details.booking.id
    return details.error.code if details.error is not None else None
