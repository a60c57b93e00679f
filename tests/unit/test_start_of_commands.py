"""Commands start fast: each imports only what it uses."""

import json
import subprocess
import sys
from pathlib import Path

import click
import pytest

from worker.cli.app import ENTRIES, cli

HEAVY = {
    "alembic", "amqp", "billiard", "celery", "cryptography", "kombu", "opentelemetry", "prometheus_client", "psycopg",
    "pydantic", "pydantic_settings", "requests", "rich", "sentry_sdk", "sqlalchemy", "structlog", "urllib3",
}  # fmt: skip
DATABASE = {"sqlalchemy", "pydantic", "pydantic_settings", "rich"}
REPORT = "import atexit, sys; atexit.register(lambda: print('\\n', *sorted(sys.modules), file=sys.stderr));"


def imported_by(*arguments: str, environment: dict[str, str] | None = None) -> set[str]:
    """Runs a command in its own process. Returns the packages that it imports."""
    program = f"{REPORT} sys.argv[1:] = {json.dumps(arguments)}; from worker.__main__ import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program], env={"PATH": "", **(environment or {})}, capture_output=True, text=True
    )
    assert "Traceback" not in done.stderr
    return {name.split(".")[0] for name in done.stderr.splitlines()[-1].split()}


WITHOUT_A_SERVER: dict[str, set[str]] = {
    "--help": set(),
    "--version": set(),
    "health": set(),
    "health --help": set(),
    "keygen": {"cryptography", "rich"},
    "failed --help": DATABASE,
}
WITH_THE_DATABASE: dict[str, set[str]] = {
    "failed --json": DATABASE,
    "batches": DATABASE,
    "show 5c7e": DATABASE | {"cryptography"},
    "pause --reason maintenance": DATABASE,
}


@pytest.mark.parametrize("command", WITHOUT_A_SERVER)
def test_commands_without_a_server_import_few_packages(command: str) -> None:
    imported = imported_by(*command.split())

    assert "click" in imported
    assert imported & HEAVY <= WITHOUT_A_SERVER[command]


@pytest.mark.parametrize("command", WITH_THE_DATABASE)
def test_commands_with_a_database_import_its_packages_only(command: str, tmp_path: Path) -> None:
    environment = {"DATABASE_URL": f"sqlite:///{tmp_path / 'confirm-offer.db'}"}
    assert "alembic" in imported_by("db", "upgrade", environment=environment)

    imported = imported_by(*command.split(), environment=environment)

    assert "sqlalchemy" in imported
    assert imported & HEAVY <= WITH_THE_DATABASE[command]


@pytest.mark.parametrize("name", ENTRIES)
def test_the_list_of_commands_has_the_help_of_each_command(name: str) -> None:
    command = cli.get_command(click.Context(cli), name)

    assert command is not None
    assert command.name == name
    assert ENTRIES[name].short_help == command.get_short_help_str(limit=80)


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux'")
@pytest.mark.parametrize("command", ["--version", "keygen"])
def test_no_command_dumps_core(command: str) -> None:
    """Not even where the kernel gives core dumps to a program, which no limit prevents."""
    report = (
        "import atexit, ctypes, resource, sys;"
        "get_dumpable = 3;"
        "is_dumpable = lambda: ctypes.CDLL(None).prctl(get_dumpable, 0, 0, 0, 0);"
        "limits = lambda: resource.getrlimit(resource.RLIMIT_CORE);"
        "atexit.register(lambda: print(is_dumpable(), *limits(), file=sys.stderr));"
    )
    program = f"{report} sys.argv[1:] = {[command]!r}; from worker.__main__ import main; main()"
    done = subprocess.run([sys.executable, "-c", program], env={"PATH": ""}, capture_output=True, text=True)

    assert done.stderr.splitlines()[-1] == "0 0 0"
