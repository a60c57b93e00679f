"""``confirm-offer confirmations``: a list of confirmations, by state."""

from datetime import datetime

import click
from rich.text import Text

from models.states import State
from tasks.operations.lookup import ListedConfirmation, listed
from worker.cli.ui.confirmation_screen import STYLES
from worker.cli.ui.console import handle_errors, json_option, out, print_csv, print_json
from worker.cli.ui.number_param import COUNT
from worker.cli.ui.tables import add_row, new_table, print_text
from worker.cli.ui.time_param import MOMENT
from worker.formatting import short_time, to_json
from worker.settings import DatabaseSettings, read
from worker.storage import database

COLUMNS = (
    "partner_id", "offer_id", "order_reference", "state", "code", "http_status", "attempts", "created_at", "updated_at",
    "next_attempt_at",
)  # fmt: skip
STATE = click.Choice([state.value for state in State], case_sensitive=False)


@click.command("confirmations")
@click.option(
    "--state",
    "states",
    multiple=True,
    type=STATE,
    metavar="STATE",
    help=f"Only this state; repeatable. {', '.join(State)}.",
)
@click.option("--partner", help="Only this partner's.")
@click.option("--since", type=MOMENT, help="Accepted at or after: 2026-01-31T14:00 (local), or 30m, 2h, 7d ago.")
@click.option("--until", type=MOMENT, help="Accepted before.")
@click.option("--limit", type=COUNT, default=50, show_default=True, help="At most so many.")
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV.")
@json_option
@handle_errors
def confirmations(
    states: tuple[str, ...],
    partner: str | None,
    since: datetime | None,
    until: datetime | None,
    limit: int,
    as_csv: bool,
    as_json: bool,
) -> None:
    """Lists confirmations, by state.

    The newest come first.
    To read more than --limit, go on with --until and the created_at of the last one.

    Example: confirm-offer confirmations --state pending --since 7d
    """
    with database.connect(read(DatabaseSettings).url).connect() as connection:
        rows = listed(connection, limit, [State(state) for state in states], partner, since, until)
    if as_json:
        print_json({"confirmations": to_json(rows)})
    elif as_csv:
        print_csv(COLUMNS, to_json(rows))
    elif not rows:
        print_text(out, "There are no such confirmations.")
    else:
        _print(rows, limit)


def _print(rows: list[ListedConfirmation], limit: int) -> None:
    table = new_table("accepted", "state", "partner", "offer", "order", "code")
    for row in rows:
        state = Text(row.state, style=STYLES.get(row.state, ""))
        add_row(table, short_time(row.created_at), state, row.partner_id, row.offer_id, row.order_reference, row.code)
    out.print(table)
    if len(rows) == limit:
        print_text(out, f"These are the newest {limit:,}; --limit shows more.", style="dim")
