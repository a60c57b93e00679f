"""``confirm-offer demo``: the whole system in one process."""

import sys

import click

from worker.cli.ui.console import handle_errors, json_option, out


@click.command(short_help="Runs the whole system in one process, with nothing installed.")
@click.option("--jobs", default=20, show_default=True, type=click.IntRange(1, 2000), help="How many offers to confirm.")
@json_option
@handle_errors
def demo(jobs: int, as_json: bool) -> None:
    """Runs the whole system in one process, with nothing installed, and shows what came of each job.

    Example: confirm-offer demo --jobs 50
    """
    from worker.demo import run

    sys.exit(run(jobs, as_json, out))
