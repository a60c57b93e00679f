"""The command line: ``confirm-offer …``. Exit codes: 0 done, 1 not or not wholly done, 2 wrong use or settings.

A command's module is imported when the command is called, so that ``confirm-offer --help`` imports none of them.
"""

import gc
import io
import signal
import sys
from collections import UserDict
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, NamedTuple

import click

from worker.errors import SettingsError
from worker.formatting import printable_lines


class CommandEntry(NamedTuple):
    """Where a command is (``module:attribute``), and its line in the list of commands."""

    target: str
    short_help: str


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """For imports: what they make stays, and looking through it for garbage takes a fifth of their time."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


class LazyCommands(UserDict[str, click.Command]):
    """Commands by name. Each is imported when it is looked up."""

    def __init__(self, entries: dict[str, CommandEntry]) -> None:
        super().__init__()
        self.entries = entries

    def __getitem__(self, name: str) -> click.Command:
        if name not in self.data:
            module, _, attribute = self.entries[name].target.partition(":")
            with _without_garbage_collection():
                self.data[name] = getattr(import_module(module), attribute)
        return self.data[name]

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


@contextmanager
def _printable_errors() -> Iterator[None]:
    """For errors that quote arguments, which may come from a file or another program."""
    try:
        yield
    except click.ClickException as error:
        error.message = printable_lines(error.message)  # type: ignore[misc]  # marked as final, and read when shown
        raise


class LazyGroup(click.Group):
    """A group whose help takes the line of each command from its entry, and so imports none of them."""

    def __init__(self, entries: dict[str, CommandEntry], **kwargs: Any) -> None:
        super().__init__(commands=LazyCommands(entries), **kwargs)
        self.entries = entries

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, self.entries[name].short_help) for name in sorted(self.entries)])

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        with _printable_errors():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        with _printable_errors():
            return super().invoke(ctx)


class RootGroup(LazyGroup):
    """The whole command line. With --json, an error is JSON on standard output, beside its line on standard error."""

    is_json = False

    def make_context(self, info_name: str | None, args: list[str], *rest: Any, **extra: Any) -> click.Context:
        self.is_json = "--json" in args
        with self._json_errors():
            return super().make_context(info_name, args, *rest, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        with self._json_errors():
            return super().invoke(ctx)

    @contextmanager
    def _json_errors(self) -> Iterator[None]:
        try:
            yield
        except SettingsError as error:
            self._print_error("settings", str(error), 2)
            raise
        except click.ClickException as error:
            self._print_error("usage" if error.exit_code == 2 else "failed", error.format_message(), error.exit_code)
            raise
        except (KeyboardInterrupt, click.Abort):
            self._print_error("interrupted", "interrupted", 1)
            raise

    def _print_error(self, kind: str, message: str, exit_code: int) -> None:
        if self.is_json:
            from worker.cli.ui.console import print_json

            print_json({"error": {"kind": kind, "message": message, "exit_code": exit_code}})


ENTRIES = {
    "audit": CommandEntry("worker.cli.audit:audit", "Lists what people have changed with commands."),
    "batch": CommandEntry("worker.cli.batches:batch", "One batch of reprocessing."),
    "batches": CommandEntry("worker.cli.batches:batches", "Lists the batches of reprocessing."),
    "broker": CommandEntry("worker.cli.broker:broker_group", "Exchanges, queues and bindings."),
    "confirmations": CommandEntry("worker.cli.confirmations:confirmations", "Lists confirmations, by state."),
    "db": CommandEntry("worker.cli.db:db", "The database's schema."),
    "dead-letters": CommandEntry("worker.cli.dead_letters:dead_letters", "What could not be accepted as a job."),
    "demo": CommandEntry("worker.cli.demo:demo", "Runs the whole system in one process, with nothing installed."),
    "doctor": CommandEntry("worker.cli.doctor:doctor", "Checks all that a worker needs, and says what to fix."),
    "enqueue": CommandEntry("worker.cli.enqueue:enqueue", "Publishes jobs from a file, JSON Lines or CSV."),
    "erase": CommandEntry("worker.cli.erase:erase", "Forgets a person, found by an e-mail."),
    "events": CommandEntry("worker.cli.events:events", "The events that consumers get."),
    "failed": CommandEntry("worker.cli.failed:failed", "Shows what has failed, by cause."),
    "health": CommandEntry("worker.cli.health:health", "Tells whether the workers of this machine are well."),
    "keygen": CommandEntry("worker.cli.keygen:keygen", "Prints a new key for DATA_KEYS."),
    "pause": CommandEntry("worker.cli.pauses:pause", 'Stops calls to XONE, until "resume".'),
    "purge": CommandEntry("worker.cli.purge:purge", "Blanks the personal data of what ended long ago."),
    "reconcile": CommandEntry(
        "worker.cli.reconcile:reconcile", "Takes in bookings that XONE has and the database lost."
    ),
    "refresh": CommandEntry(
        "worker.cli.refresh:refresh", "Looks at a booking at XONE now, and records what has changed."
    ),
    "rekey": CommandEntry("worker.cli.rekey:rekey", "Encrypts what is stored with the first of DATA_KEYS again."),
    "reprocess": CommandEntry("worker.cli.reprocess:reprocess", "Tries failed confirmations again, as a batch."),
    "resolve": CommandEntry("worker.cli.resolve:resolve", "Records a person's answer to needs_review."),
    "resume": CommandEntry("worker.cli.pauses:resume", "Ends a pause of calls to XONE."),
    "sandbox": CommandEntry("worker.cli.sandbox:sandbox", "Runs the stand-in of XONE by itself."),
    "schema": CommandEntry("worker.cli.schema:schema", "The published schemas, as JSON."),
    "show": CommandEntry("worker.cli.show:show", "Shows all that is known of a confirmation."),
    "withdraw": CommandEntry("worker.cli.withdraw:withdraw", "Ends offers whose order was cancelled."),
    "worker": CommandEntry("worker.cli.worker:worker", "Runs a worker: takes jobs, retries, publishes events."),
}


@click.group(
    cls=RootGroup,
    entries=ENTRIES,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(package_name="confirm-offer")
def cli() -> None:
    """Confirms insurance offers with XONE: from a job on a queue to a booking and an event.

    Settings come from the environment and from .env in the working folder.
    """


def main() -> None:
    """Entry of the console script."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what the terminal or pipe can't show is written as \u2026
            stream.reconfigure(errors="backslashreplace")
    for ending in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(ending) is signal.SIG_DFL:  # nohup ignores SIGHUP
            signal.signal(ending, _interrupt)
    try:
        cli.main(prog_name="confirm-offer", standalone_mode=True)
    except SettingsError as error:
        from worker.cli.ui.console import print_error

        print_error(str(error))
        sys.exit(2)


def _interrupt(*_: Any) -> None:
    """Ends a command as Ctrl-C does: it cleans up after itself. A worker installs its own handlers."""
    raise KeyboardInterrupt
