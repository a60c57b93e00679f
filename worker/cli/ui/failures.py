"""What ``failed`` and ``reprocess`` share: filters, and failures by cause."""

from collections.abc import Callable, Sequence
from typing import Any

import click
from rich.text import Text

from tasks.operations.failures import FailureGroup
from worker.cli.ui.code_param import CODE
from worker.cli.ui.console import out
from worker.cli.ui.number_param import COUNT
from worker.cli.ui.tables import add_row, new_table, plain, print_text
from worker.cli.ui.time_param import MOMENT
from worker.formatting import local_time, pluralize


def filters(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options that select failed confirmations. Their names are those of ``failures.Selection``."""
    options = (
        click.option("--partner", help="Only this partner's."),
        click.option("--code", type=CODE, help="Only those that failed with this code, as http-422."),
        click.option("--since", type=MOMENT, help="Failed at or after: 2026-01-31T14:00 (local), or 30m, 2h, 7d ago."),
        click.option("--until", type=MOMENT, help="Failed before."),
        click.option("--limit", type=COUNT, help="At most so many."),
        click.option("--include-needs-review", is_flag=True, help="Also those that wait for a review."),
    )
    for option in reversed(options):
        command = option(command)
    return command


def print_groups(groups: Sequence[FailureGroup]) -> None:
    """Failures by cause, for a person."""
    total = sum(group.count for group in groups)
    print_text(out, f"{pluralize(total, 'confirmation')}, {pluralize(len(groups), 'cause')}", style="bold")
    table = new_table("count", "code", "cause", numbers=["count"])
    for number, group in enumerate(groups):
        if number:
            add_row(table)
        add_row(table, group.count, _code(group), _facts(group))
    out.print(table)


def _code(group: FailureGroup) -> str:
    status, code = group.http_status, group.code or "-"
    return code if status is None or code == f"http-{status}" else f"{code} ({status})"


def _facts(group: FailureGroup) -> Text:
    partners, sample = group.partners, group.sample
    named = ", ".join(partners[:4]) + (f" and {len(partners) - 4:,} more" if len(partners) > 4 else "")
    lines = (
        group.detail or "-",
        f"{local_time(group.first_seen)} to {local_time(group.last_seen)}",
        f"{'partner' if len(partners) == 1 else 'partners'} {named}",
        f"e.g. {sample.offer_id}" + (f" of {sample.partner_id}" if len(partners) > 1 else ""),
    )
    return Text("\n").join(map(plain, lines))
