"""The gevent pool: calls in flight are greenlets of one thread, which switches to another when one waits.

gevent replaces ("patches") what waits in the standard library. This must happen before anything that uses it is
imported: at the start of ``confirm-offer worker`` with WORKER_POOL=gevent in the environment, or by Celery itself if it
is started with ``-P gevent``.
"""

import os
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any


def patch_if_requested() -> None:
    """Patches if WORKER_POOL asks for it. Must be called first of all. Without gevent, ``require`` says so later.

    Celery's own way imports parts of kombu too early: kombu then blocks all greenlets while the broker is unavailable.
    """
    if os.environ.get("WORKER_POOL") == "gevent" and is_installed():
        from gevent.monkey import patch_all

        patch_all()


def is_installed() -> bool:
    return find_spec("gevent") is not None


def is_active() -> bool:
    """Whether this process is patched."""
    return "gevent.monkey" in sys.modules and bool(sys.modules["gevent.monkey"].is_module_patched("threading"))


def unpatched(module: str, name: str) -> Any:
    """A function of the standard library as it is without gevent: it stops the whole thread."""
    if is_active():
        from gevent.monkey import get_original

        return get_original(module, name)
    return getattr(import_module(module), name)


def report_errors(report: Callable[[BaseException], None]) -> None:
    """Gives what greenlets raise to ``report``. gevent itself prints the error's text and the greenlet's arguments."""
    if is_active():
        from gevent.hub import Hub

        def print_exception(_hub: Any, _context: Any, _kind: Any, error: BaseException | None, _trace: Any) -> None:
            if error is not None:
                report(error)

        Hub.print_exception = print_exception


def restart_with_gevent() -> None:
    """Starts this program again, patched, if only its command line or ``.env`` asks for the pool."""
    if os.environ.get("WORKER_POOL") != "gevent":
        os.environ["WORKER_POOL"] = "gevent"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # noqa: S606 - no shell is wanted


def require() -> None:
    """Raises SettingsError if gevent is not installed or this process is not patched."""
    from worker.errors import SettingsError

    if not is_installed():
        raise SettingsError("WORKER_POOL: gevent is not installed; install confirm-offer[gevent]")
    if not is_active():
        raise SettingsError("WORKER_POOL: for gevent, start 'confirm-offer worker', or give Celery '-P gevent' too")
