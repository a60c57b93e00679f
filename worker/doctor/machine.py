"""Checks this machine: limit of open files, workers that run here, connection to Sentry."""

import resource
import socket
from collections.abc import Iterator
from urllib.parse import urlsplit

from worker import gevent_support
from worker.doctor.finding import Finding
from worker.services import health_file
from worker.settings import SentrySettings, WorkerSettings

IDLE_FILES = 100  # of a worker without calls: database, broker, libraries
FILES_PER_CALL = 2  # the connection to XONE, and a second while that is being replaced


def check(worker: WorkerSettings | None, sentry: SentrySettings | None) -> Iterator[Finding]:
    if worker is not None:
        yield _open_files(worker)
        if worker.WORKER_POOL == "gevent" and not gevent_support.is_installed():
            message = "WORKER_POOL=gevent, and gevent is not installed here"
            yield Finding.error("pool", message, "install confirm-offer[gevent]")
    yield _workers()
    if sentry is not None:
        yield _sentry(sentry)


def _open_files(worker: WorkerSettings) -> Finding:
    allowed, hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    calls = worker.WORKER_CONCURRENCY if worker.WORKER_POOL != "prefork" else 1
    needed = IDLE_FILES + FILES_PER_CALL * calls
    if allowed == resource.RLIM_INFINITY or allowed >= needed:
        return Finding.ok("open files", f"{_limit(allowed)} allowed; WORKER_CONCURRENCY={calls} may need {needed:,}")
    remedy = f"start workers with 'ulimit -n {needed}' (systemd: LimitNOFILE)"
    if hard_limit != resource.RLIM_INFINITY and hard_limit < needed:
        remedy = f"lower WORKER_CONCURRENCY, or have the hard limit of {hard_limit:,} raised"
    return Finding.error("open files", f"{allowed:,} are allowed, but a worker here may need {needed:,}", remedy)


def _limit(files: int) -> str:
    return "any number" if files == resource.RLIM_INFINITY else f"{files:,}"


def _workers() -> Finding:
    try:
        workers = health_file.read_workers()
    except OSError as error:
        return Finding.warning(
            "workers here", f"what they note can't be read: {error.strerror}", "set TMPDIR as the workers do"
        )
    unwell = [worker for worker in workers if not worker.is_well]
    if unwell:
        stalled = sum("tasks" in worker.unwell for worker in unwell)
        how = f", {stalled} of them with messages that do not end" if stalled else ""
        return Finding.warning("workers here", f"{len(unwell)} of {len(workers)} not well{how}", "confirm-offer health")
    all_well = f"{len(workers)}, all well" if workers else "none runs on this machine as this user"
    return Finding.ok("workers here", all_well)


def _sentry(sentry: SentrySettings) -> Finding:
    if sentry.SENTRY_DSN is None:
        return Finding.ok("Sentry", "SENTRY_DSN is not set: defects are reported in the log only")
    address = urlsplit(sentry.SENTRY_DSN.get_secret_value())
    try:
        port = address.port or (443 if address.scheme == "https" else 80)
        with socket.create_connection((address.hostname, port), timeout=5):
            return Finding.ok("Sentry", f"{address.hostname} can be reached")
    except OSError:
        return Finding.warning(
            "Sentry",
            f"{address.hostname} can't be reached: reports of defects get lost",
            "check SENTRY_DSN, and whether this machine may connect to it",
        )
