"""What all commands share: consoles, output as text or JSON, and one line for each error."""

import csv
import errno
import json
import os
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.text import Text

from worker.errors import ConfirmOfferError, SettingsError, describe, where
from worker.formatting import printable_lines, spreadsheet_cell, terminal_json

if TYPE_CHECKING:
    from rich.progress import Progress

    from worker.doctor.finding import Finding

out = Console(highlight=False, soft_wrap=False)
err = Console(stderr=True, highlight=False)

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
reason_option = click.option("--reason", help="Why, for the audit.")


def _claim(context: click.Context, _parameter: click.Parameter, name: str | None) -> None:
    from tasks.operations.audit import (  # with the database, which commands that change nothing do not need
        claim,
        claimed,
        who,
    )

    try:
        claim(name)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None
    if err.is_terminal and context.info_name != "show" and any(map(os.path.exists, _CONTAINER_FILES)) and not claimed():
        print_note(f"the audit will name {who()}, as the user of a container: say who with --by or CONFIRM_OFFER_USER")


by_option = click.option(
    "--by",
    metavar="NAME",
    expose_value=False,
    callback=_claim,
    help="Who does it, for the audit, beside the system's user. Without it: CONFIRM_OFFER_USER.",
)

_CONTAINER_FILES = ("/.dockerenv", "/run/.containerenv", "/var/run/secrets/kubernetes.io")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def print_wrapped(console: Console, text: str) -> None:
    """Prints lines: wrapped at words on a terminal, whole elsewhere, so that they can be searched."""
    console.print(Text(printable_lines(text)), soft_wrap=not console.is_terminal)


def print_note(text: str) -> None:
    """Prints a note to standard error."""
    print_wrapped(err, text)


def print_error(text: str) -> None:
    """Prints an error, and what to do about it."""
    print_note(f"confirm-offer: {text}")


class Failed(click.ClickException):
    """The command could not do its work: exit code 1."""

    def show(self, file: Any = None) -> None:
        print_error(self.message)


class UsageError(Failed):
    """The command was used wrongly: exit code 2."""

    exit_code = 2


@contextmanager
def user_error() -> Iterator[None]:
    """Turns an error that a command can meet into one line that says what to do, and exit code 1."""
    try:
        yield
    except (SettingsError, click.ClickException, click.Abort, click.exceptions.Exit):
        raise
    except ConfirmOfferError as error:
        raise Failed(str(error)) from None
    except Exception as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise Failed(f"{error.filename}: {error.strerror}") from None
        if isinstance(error, OSError) and error.errno in _FULL:
            print_error(f"what it writes to is full: {error.strerror}")
            out.on_broken_pipe()  # drops what waits to be written, and ends with exit code 1
        if (remedy := _broker_remedy(error) or _database_remedy(error)) is not None:
            raise Failed(remedy) from None
        places = "".join(f"\n  {place}" for place in where(error.__traceback__))
        raise Failed(f"a defect of this program, please report it: {describe(error)}{places}") from None


def _broker_remedy(error: Exception) -> str | None:
    """What went wrong with the broker, and what to do; None where it is not the broker."""
    from worker.messaging import broker  # kombu: most commands do without it

    if not broker.raised(error):
        return None
    if broker.lacks_queues(error):
        return "the broker lacks an exchange or queue; run 'confirm-offer broker declare'"
    from worker.doctor.broker import connection_finding
    from worker.settings import BrokerSettings, read

    return _one_line(connection_finding(error, read(BrokerSettings).url))


def _database_remedy(error: Exception) -> str | None:
    """What went wrong with the database, and what to do; None where it is not the database."""
    from worker.storage import database

    if not database.is_error(error):
        return None
    if database.lacks_tables(error):
        return "the database has not the tables of this version; run 'confirm-offer db upgrade'"
    from sqlalchemy import make_url

    from worker.doctor.database import connection_finding
    from worker.settings import DatabaseSettings, read

    return _one_line(connection_finding(error, make_url(read(DatabaseSettings).url)))


def _one_line(finding: "Finding") -> str:
    return f"{finding.check}: {finding.message}; {finding.remedy}"


def handle_errors(command: Callable[..., Any]) -> Callable[..., Any]:
    """``user_error`` around a command."""

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        with user_error():
            return command(*args, **kwargs)

    return run


def progress(shown: bool = True) -> "Progress":
    """A progress bar on a terminal, which disappears at the end. shown: False for none."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=err,
        transient=True,
        disable=not (shown and err.is_terminal),
    )


def print_json(content: Any) -> None:
    """Prints what ``json.dumps`` takes: indented on a terminal, in one line elsewhere."""
    with _ignoring_closed_pipe():
        is_unicode = (sys.stdout.encoding or "").lower().startswith("utf")  # else JSON escapes, in its own way
        indent = None if not sys.stdout.isatty() else 2
        click.echo(terminal_json(json.dumps(content, ensure_ascii=not is_unicode, indent=indent)))


def print_csv(columns: Sequence[str], rows: Iterable[dict[str, Any]]) -> None:
    """Prints a header and rows. columns: keys of the rows, in order; other keys are left out.

    The reader may be a spreadsheet, so no cell is a formula.
    """
    writer = csv.DictWriter(sys.stdout, columns, extrasaction="ignore", lineterminator="\n")
    with _ignoring_closed_pipe():
        writer.writeheader()
        writer.writerows({name: spreadsheet_cell(value) for name, value in row.items()} for row in rows)
        sys.stdout.flush()


@contextmanager
def _ignoring_closed_pipe() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:  # the reader, such as head, has enough
        out.on_broken_pipe()


def ask(question: str, yes: bool) -> None:
    """Asks a question, and raises Failed unless the answer is yes. yes: do not ask; needed without a terminal."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise UsageError("there is no terminal to ask on, so nothing was changed; add --yes")
    width = err.width - len(" [y/N]: ")
    if not click.confirm("\n".join(textwrap.fill(line, width) for line in question.splitlines()), err=True):
        raise Failed("nothing was changed")


def print_result(as_json: bool, text: str, **content: Any) -> None:
    """Prints the result of a command: the text, or the content as JSON."""
    if as_json:
        print_json(content)
    else:
        print_wrapped(out, text)
