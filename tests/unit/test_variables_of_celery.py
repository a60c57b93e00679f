"""Each variable that Celery and its libraries read is removed, or is known to do no harm."""

import importlib
import re
from pathlib import Path

import pytest

from worker import celery_environment

READS = re.compile(r"""(?:environ(?:\.get)?|getenv|_env|envvar=)\s*[(\[]?\s*['"](?P<name>[A-Za-z_]+)['"]""")
UNUSED = ("backends", "contrib", "fixups", "transport")  # parts of Celery and kombu that no worker imports
# Options of Celery's command, of which make_app takes none; the title of a process; checks of root and of Django.
HARMLESS = {
    "APP", "BROKER_URL", "CONFIG_MODULE", "C_FAKEFORK", "C_FORCE_ROOT", "DISABLE_TRACEBACKS", "DJANGO_PROJECT_DIR",
    "DJANGO_SETTINGS_MODULE", "EVENTLET_NOBLOCK", "ITERM_PROFILE", "LOADER", "MP_MAIN_FILE",
    "MULTIPROCESSING_FORKING_DISABLE", "NOSETPS", "NO_COLOR", "NUMBER_OF_PROCESSORS", "RESULT_BACKEND", "SKIP_CHECKS",
    "TERM", "_MP_FORK_LOGFILE_", "_MP_FORK_LOGFORMAT_", "_MP_FORK_LOGLEVEL_", "celery_dummy_proxy",
}  # fmt: skip


def names_read() -> set[str]:
    names = set()
    for package in ("celery", "kombu", "billiard", "amqp", "vine"):
        folder = Path(str(importlib.import_module(package).__file__)).parent
        for file in folder.rglob("*.py"):
            if file.relative_to(folder).parts[0] not in UNUSED:
                names |= {found["name"] for found in READS.finditer(file.read_text())}
    return names


def test_variables_of_celery_are_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    names = names_read() - HARMLESS
    assert {"REMAP_SIGTERM", "CELERY_BROKER_URL", "KOMBU_LOG_DEBUG", "CELERY_WORKER_REVOKES_MAX"} <= names
    monkeypatch.setattr(celery_environment, "removed", {})
    for name in names:
        monkeypatch.setenv(name, "1")

    obeyed = celery_environment.remove()

    assert celery_environment.removed == dict.fromkeys(names, "1")
    assert obeyed == "C_BENCH"
    assert celery_environment.remove() is None
