"""``confirm-offer doctor``: what is wrong with this installation, and what to do."""

import sys
from collections import Counter

import click
from rich.table import Table
from rich.text import Text

from worker.cli.ui.console import handle_errors, json_option, out, print_json
from worker.cli.ui.tables import print_text
from worker.doctor import settings as of_settings
from worker.doctor.examination import examine
from worker.doctor.finding import Finding, Level
from worker.formatting import pluralize

STYLES = {Level.OK: "green", Level.WARNING: "yellow", Level.ERROR: "bold red"}


@click.command("doctor")
@json_option
@handle_errors
def doctor(as_json: bool) -> None:
    """Checks all that a worker needs, and says what to fix.

    It changes nothing, and shows no secret and no personal data. It asks XONE for a token, once. Run it where the
    workers run, with their settings.

    Exit code 1 if something is wrong, 2 if a setting is; warnings alone are no failure.

    Example: confirm-offer doctor
    """
    findings = []
    for finding in examine():
        findings.append(finding)
        if not as_json:
            out.print(_row(finding))
    count = Counter(finding.level for finding in findings)
    if as_json:
        print_json({"well": not count[Level.ERROR], "findings": [finding.as_json() for finding in findings]})
    else:
        print_text(out)
        print_text(out, _summary(count))
    is_setting_wrong = any(finding.level is Level.ERROR and finding.check == of_settings.CHECK for finding in findings)
    sys.exit(2 if is_setting_wrong else 1 if count[Level.ERROR] else 0)


def _row(finding: Finding) -> Table:
    """A finding in a line or more, aligned with all others."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(width=max(len(level) for level in Level))
    table.add_column(width=12)
    table.add_column(overflow="fold")
    text = Text(finding.message)
    if finding.remedy is not None:
        text.append(f"\n→ {finding.remedy}", style="bold")
    table.add_row(Text(finding.level, style=STYLES[finding.level]), finding.check, text)
    return table


def _summary(count: Counter[Level]) -> str:
    warnings = pluralize(count[Level.WARNING], "warning") if count[Level.WARNING] else "no warning"
    if not count[Level.ERROR]:
        return f"Nothing is wrong, {warnings}."
    return f"{count[Level.ERROR]} wrong, {warnings}. Fix that and run it again: what depends on it was not checked."
