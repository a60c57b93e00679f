"""This machine: open files, workers that run here, the way to Sentry."""

import resource
import socket
from collections.abc import Iterator
from urllib.parse import urlsplit

from worker import gevent_support
from worker.doctor.finding import Finding, ok, warning, wrong
from worker.services import health_file
from worker.settings import SentrySettings, WorkerSettings

FILES_BESIDES = 100  # of a worker that makes no call: database, broker, libraries
FILES_FOR_A_CALL = 2  # its connection to XONE, and another while that is being replaced


def look(worker: WorkerSettings | None, sentry: SentrySettings | None) -> Iterator[Finding]:
    if worker is not None:
        yield _open_files(worker)
        if worker.WORKER_POOL == "gevent" and not gevent_support.is_installed():
            yield wrong("pool", "WORKER_POOL=gevent, and gevent is not installed here", "install confirm-offer[gevent]")
    yield _workers()
    if sentry is not None:
        yield _sentry(sentry)


def _open_files(worker: WorkerSettings) -> Finding:
    allowed, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    calls = worker.WORKER_CONCURRENCY if worker.WORKER_POOL != "prefork" else 1
    needed = FILES_BESIDES + FILES_FOR_A_CALL * calls
    if resource.RLIM_INFINITY in (allowed,) or allowed >= needed:
        return ok("open files", f"{_limit(allowed)} allowed; WORKER_CONCURRENCY={calls} may need {needed:,}")
    mend = f"start workers with 'ulimit -n {needed}' (systemd: LimitNOFILE)"
    if most not in (resource.RLIM_INFINITY,) and most < needed:
        mend = f"lower WORKER_CONCURRENCY, or have the hard limit of {most:,} raised"
    return wrong("open files", f"{allowed:,} are allowed, but a worker here may need {needed:,}", mend)


def _limit(files: int) -> str:
    return "any number" if files == resource.RLIM_INFINITY else f"{files:,}"


def _workers() -> Finding:
    try:
        found = health_file.read_workers()
    except OSError as error:
        return warning(
            "workers here", f"what they note can't be read: {error.strerror}", "set TMPDIR as the workers do"
        )
    unwell = [worker for worker in found if not worker.is_well]
    if unwell:
        return warning("workers here", f"{len(unwell)} of {len(found)} not well", "confirm-offer health")
    return ok("workers here", f"{len(found)}, all well" if found else "none runs on this machine as this user")


def _sentry(sentry: SentrySettings) -> Finding:
    if sentry.SENTRY_DSN is None:
        return ok("Sentry", "SENTRY_DSN is not set: defects are told in the log only")
    address = urlsplit(sentry.SENTRY_DSN.get_secret_value())
    try:
        with socket.create_connection(
            (address.hostname, address.port or (443 if address.scheme == "https" else 80)), 5
        ):
            return ok("Sentry", f"{address.hostname} can be reached")
    except OSError:
        return warning(
            "Sentry",
            f"{address.hostname} can't be reached: reports of defects get lost",
            "check SENTRY_DSN, and whether this machine may connect to it",
        )
