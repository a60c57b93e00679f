"""The gevent pool: calls in flight are greenlets of one thread, which take turns where one waits.

For that, gevent replaces what waits in the standard library, before anything that uses it is imported: at the start
of ``confirm-offer worker`` with WORKER_POOL=gevent in the environment, or by Celery where it is given ``-P gevent``.
"""

import os
import sys
from importlib.util import find_spec


def patch_if_requested() -> None:
    """Called first of all. Does nothing where gevent is not installed: ``check`` says so.

    Celery's own way imports parts of kombu too early: kombu then sleeps for all of us while the broker is away.
    """
    if os.environ.get("WORKER_POOL") == "gevent" and is_installed():
        from gevent.monkey import patch_all

        patch_all()


def is_installed() -> bool:
    return find_spec("gevent") is not None


def is_active() -> bool:
    """Whether this process is one for it."""
    return "gevent.monkey" in sys.modules and bool(sys.modules["gevent.monkey"].is_module_patched("threading"))


def restart_with_gevent() -> None:
    """Starts this program again where only its command line, or .env, asks for the pool."""
    if os.environ.get("WORKER_POOL") != "gevent":
        os.environ["WORKER_POOL"] = "gevent"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # noqa: S606 - no shell is wanted


def require() -> None:
    """Raises SettingsError where this process can't have the pool."""
    from worker.errors import SettingsError

    if not is_installed():
        raise SettingsError("WORKER_POOL: gevent is not installed; install confirm-offer[gevent]")
    if not is_active():
        raise SettingsError("WORKER_POOL: for gevent, start 'confirm-offer worker', or give Celery '-P gevent' too")
