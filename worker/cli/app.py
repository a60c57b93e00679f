"""The command line: ``confirm-offer …``. Exit codes: 0 done, 1 not or not wholly done, 2 wrong use or settings."""

import signal
import sys
from typing import Any

import click
from cryptography.fernet import Fernet

from tasks.operations.audit import audit, who
from worker import gevent_support
from worker.cli import (
    batches,
    dead_letters,
    doctor,
    enqueue,
    erase,
    events,
    failed,
    health,
    pauses,
    purge,
    rekey,
    reprocess,
    resolve,
    schema,
    show,
)
from worker.cli.ui.console import Failed, handle_errors, json_option, out, print_error, print_result
from worker.errors import SettingsError
from worker.messaging import broker, topology
from worker.runtime import current
from worker.settings import BrokerSettings, DatabaseSettings, LogSettings, WorkerSettings, read
from worker.storage import database, migrator


def main() -> None:
    """Entry of the console script."""
    for ending in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(ending) is signal.SIG_DFL:  # nohup ignores one
            signal.signal(ending, _interrupt)
    try:
        cli.main(prog_name="confirm-offer", standalone_mode=True)
    except SettingsError as error:
        print_error(str(error))
        sys.exit(2)


def _interrupt(*_: Any) -> None:
    """As Ctrl-C does: a command that is ended, or whose terminal goes, leaves nothing behind. A worker has its own."""
    raise KeyboardInterrupt


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="confirm-offer")
def cli() -> None:
    """Confirms insurance offers with XONE: from a job on a queue to a booking and an event.

    Settings come from the environment and from .env in the working folder.
    """


@cli.command(short_help="Runs the whole system in one process, with nothing installed.")
@click.option("--jobs", default=20, show_default=True, type=click.IntRange(1, 2000), help="How many offers to confirm.")
@json_option
@handle_errors
def demo(jobs: int, as_json: bool) -> None:
    """Runs the whole system in one process, with nothing installed, and shows what came of each job.

    Example: confirm-offer demo --jobs 50
    """
    from worker.demo import run

    sys.exit(run(jobs, as_json, out))


@cli.command(short_help="Runs a worker: takes jobs, retries, publishes events.")
@click.option("--concurrency", type=click.IntRange(1, 2000), help="Calls in flight (WORKER_CONCURRENCY).")
@click.option("--pool", type=click.Choice(["threads", "prefork", "gevent"]), help="Celery's pool (WORKER_POOL).")
def worker(concurrency: int | None, pool: str | None) -> None:
    """Runs a worker: takes jobs, retries what is due, publishes events. "celery -A worker worker" starts the same.

    Example: confirm-offer worker --concurrency 128
    """
    runtime = current()
    given = {"WORKER_CONCURRENCY": concurrency, "WORKER_POOL": pool}
    runtime.worker_settings = read(
        WorkerSettings, **{name: value for name, value in given.items() if value is not None}
    )
    if runtime.worker_settings.WORKER_POOL == "gevent":
        gevent_support.restart_with_gevent()
    from worker.celery import app

    running = app.Worker(
        concurrency=runtime.worker_settings.WORKER_CONCURRENCY,
        pool_cls=runtime.worker_settings.WORKER_POOL,
        loglevel=read(LogSettings).LOG_LEVEL,
        quiet=True,
    )
    running.start()
    sys.exit(running.exitcode or 0)


@cli.group()
def db() -> None:
    """The database's schema."""


@db.command("upgrade")
@json_option
@handle_errors
def db_upgrade(as_json: bool) -> None:
    """Brings the database's tables up to date. Safe to repeat, and to run twice at once.

    Example: confirm-offer db upgrade
    """
    engine = database.connect(read(DatabaseSettings).url)
    before, after = migrator.upgrade(engine)
    if before != after:
        with engine.begin() as connection:
            audit(connection, "db upgrade", who(), None, 1, before=before, after=after)
    if after is not None and not migrator.is_known(after):
        text = _later(after)
    else:
        text = f"database is at revision {after}" + ("" if before == after else f", was {before or 'empty'}")
    print_result(as_json, text, revision=after, before=before)


@db.command("check")
@json_option
@handle_errors
def db_check(as_json: bool) -> None:
    """Tells whether this version can work with the database's tables. Exit code 1 where it can't.

    It can with its own and, while a later version is rolled out or back, with those of the version after it.

    Example: confirm-offer db check
    """
    engine = database.connect(read(DatabaseSettings).url)
    with engine.connect() as connection:
        found, wanted = migrator.revision(connection), migrator.newest()
    if found is None or (found != wanted and migrator.is_known(found)):
        raise Failed(f"database is at revision {found or 'none'}, not at {wanted}; run 'confirm-offer db upgrade'")
    text = f"database is at revision {found}, as it should be" if found == wanted else _later(found)
    print_result(as_json, text, revision=found)


def _later(found: str) -> str:
    return (
        f"database is at revision {found}, of a later version than this one, which has {migrator.newest()};"
        " left as it is (docs/upgrading.md)"
    )


@cli.group("broker")
def broker_group() -> None:
    """Exchanges, queues and bindings."""


@broker_group.command("declare")
@json_option
@handle_errors
def broker_declare(as_json: bool) -> None:
    """Declares exchanges, queues and bindings. Safe to repeat; the worker does it too.

    Example: confirm-offer broker declare
    """
    with broker.connect(read(BrokerSettings).url) as connection:
        names = topology.declare(connection)
    print_result(as_json, "\n".join(f"declared {name}" for name in names), declared=names)


@cli.command(short_help="Runs the stand-in of XONE by itself.")
@click.option("--port", default=8900, show_default=True, type=click.IntRange(0, 65535), help="0 takes a free one.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 in a container.")
@json_option
@handle_errors
def sandbox(port: int, host: str, as_json: bool) -> None:
    """Runs the stand-in of XONE by itself, until it is interrupted. Its page says how to use it.

    Example: confirm-offer sandbox --port 8900
    """
    import threading

    from worker.sandbox.server import Sandbox

    with Sandbox(port=port, host=host) as running:
        try:
            print_result(
                as_json, f"stand-in of XONE at {running.url} - open it in a browser; Ctrl-C ends it", url=running.url
            )
            threading.Event().wait()
        except KeyboardInterrupt:
            click.echo()


@cli.command()
@json_option
def keygen(as_json: bool) -> None:
    """Prints a new key for DATA_KEYS.

    Example: confirm-offer keygen
    """
    key = Fernet.generate_key().decode()
    print_result(as_json, key, key=key)


cli.add_command(doctor.doctor)
cli.add_command(health.health)
cli.add_command(failed.failed)
cli.add_command(reprocess.reprocess)
cli.add_command(batches.batches)
cli.add_command(batches.batch)
cli.add_command(pauses.pause)
cli.add_command(pauses.resume)
cli.add_command(show.show)
cli.add_command(resolve.resolve)
cli.add_command(enqueue.enqueue)
cli.add_command(dead_letters.dead_letters)
cli.add_command(events.events)
cli.add_command(rekey.rekey)
cli.add_command(purge.purge)
cli.add_command(erase.erase)
cli.add_command(schema.schema)
