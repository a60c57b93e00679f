"""``confirm-offer worker``: runs a worker."""

import sys

import click

from worker import gevent_support
from worker.runtime import current
from worker.settings import LogSettings, WorkerSettings, read


@click.command(short_help="Runs a worker: takes jobs, retries, publishes events.")
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
    try:
        from worker.celery import app  # reads all settings: --help should not need them

        running = app.Worker(
            concurrency=runtime.worker_settings.WORKER_CONCURRENCY,
            pool_cls=runtime.worker_settings.WORKER_POOL,
            loglevel=read(LogSettings).LOG_LEVEL,
            quiet=True,
        )
        running.start()
    except KeyboardInterrupt:  # asked to end before Celery's own handlers are installed: nothing has begun
        sys.exit(0)
    sys.exit(running.exitcode or 0)
