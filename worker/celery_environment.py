"""What Celery reads from the environment has no effect: it is removed from the environment of this process.

Celery and its libraries read it before a program's settings, much of it as they are imported: where the broker is, what
SIGTERM does, which class keeps the values of a thread. ``confirm-offer`` removes it before they are imported. Celery's
own command has imported them already: there, what would make a worker useless is refused.
"""

import os

# CELERY_BROKER_URL, CELERY_RESULT_BACKEND, CELERY_CONFIG_MODULE and others. Celery's command line fills them from
# BROKER_URL, RESULT_BACKEND and others, and reads its options from them, such as CELERY_WORKER_PURGE.
_PREFIXES = ("CELERY_", "KOMBU_")
_WITHOUT_PREFIX = frozenset({
    "AUTOSCALE_KEEPALIVE", "C_BENCH", "C_BENCH_EVERY", "C_IMPDEBUG", "C_REMDEBUG", "C_STRICT_APP", "C_WARN_APP",
    "C_WNOCONF", "FORKED_BY_MULTIPROCESSING", "MP_LOG", "PICKLE_PROTOCOL", "REMAP_SIGTERM", "TIMER_DEBUG",
    "USE_FAST_LOCALS",
})  # fmt: skip

# As soon as Celery is imported, these are in force: another folder, a shutdown that cuts calls off, tasks that never
# run or never end.
_OBEYED_FROM_IMPORT = (
    "C_BENCH", "C_STRICT_APP", "CELERY_BENCH", "CELERY_WORKDIR", "REMAP_SIGTERM", "USE_FAST_LOCALS",
)  # fmt: skip

removed: dict[str, str] = {}  # values by name


def remove() -> str | None:
    """Removes the variables. Returns one that Celery obeys already, if it was imported before; None if all is well."""
    found = {name for name in os.environ if name.startswith(_PREFIXES) or name in _WITHOUT_PREFIX}
    removed.update((name, os.environ.pop(name)) for name in found)
    return next((name for name in _OBEYED_FROM_IMPORT if name in found), None)
