"""``confirm-offer audit``: what people have changed with commands."""

from datetime import datetime

import click

from tasks.operations.audit import entries
from worker.cli.ui.console import handle_errors, json_option, out, print_json
from worker.cli.ui.number_param import COUNT
from worker.cli.ui.tables import add_row, new_table, print_text
from worker.cli.ui.time_param import MOMENT
from worker.formatting import local_time, to_json
from worker.settings import DatabaseSettings, read
from worker.storage import database


@click.command("audit")
@click.option("--since", type=MOMENT, help="At or after: 2026-01-31T14:00 (local), or 30m, 2h, 7d ago.")
@click.option("--by", metavar="WHO", help="Only theirs: a part of the name.")
@click.option("--command", metavar="NAME", help="Only this command's, such as reprocess.")
@click.option("--limit", type=COUNT, default=50, show_default=True, help="At most so many.")
@json_option
@handle_errors
def audit(since: datetime | None, by: str | None, command: str | None, limit: int, as_json: bool) -> None:
    """Lists what people have changed with commands.

    The newest comes first: who, what, why, and how many it concerned.

    Example: confirm-offer audit --since 7d --by ann
    """
    with database.connect(read(DatabaseSettings).url).connect() as connection:
        rows = entries(connection, limit, since, by, command)
    if as_json:
        print_json({"audit": to_json(rows)})
    elif not rows:
        print_text(out, "Nothing is in the audit" + (" that these filters match." if since or by or command else "."))
    else:
        table = new_table("when", "who", "command", "count", "why", numbers=("count",))
        for row in rows:
            add_row(table, local_time(row.at), row.by, row.command, row.count, row.reason)
        out.print(table)
