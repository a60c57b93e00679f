"""The lines of docs/getting-started.md, run in one shell, in a clone of the project.

The differences: RabbitMQ's address and the sandbox's port are private, and ``sudo`` only checks whether a package
could be installed, and becomes the superuser of PostgreSQL, not of the system.
"""

import getpass
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.support.servers import PostgreSQL, lacking, postgresql_program
from tests.support.system import PROJECT, until

pytestmark = pytest.mark.slow

PAGE = (PROJECT / "docs/getting-started.md").read_text()
BLOCKS = re.findall(r"^```sh\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)
LEFT_OUT = shutil.ignore_patterns(".git", ".venv", "node_modules", "*cache*", "*.egg-info", "*.db", ".env", "*.log")
SUDO = """#!/bin/sh -e
if [ "$1" = -u ]; then shift 2; PGUSER=postgres exec "$@"; fi
exec "$@" --simulate
"""
DONE = "--done--"
BOOKED = r"1  booking\.confirmed +[\d-]+ [\d:]+ +[\d-]+ [\d:]+"  # written, and published


class Shell:
    """One bash for all blocks. A failing command ends it."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self._bash = subprocess.Popen(
            ["bash", "-e"],
            cwd=folder,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, block: str) -> str:
        """Runs a block. Returns its output."""
        assert self._bash.stdin is not None
        assert self._bash.stdout is not None
        self._bash.stdin.write(f"{block}\necho {DONE}\n")
        self._bash.stdin.flush()
        output = []
        for line in self._bash.stdout:
            if line == f"{DONE}\n":
                return "".join(output)
            output.append(line)
        raise AssertionError(f"{block}\n{''.join(output)}")

    def close(self) -> None:
        """Ends the shell and what still runs in it."""
        if self._bash.poll() is None:
            self._bash.communicate("kill $(jobs -p) || true\n", timeout=30)


@pytest.fixture
def database(postgresql: PostgreSQL) -> Iterator[PostgreSQL]:
    user = getpass.getuser()
    yield postgresql
    postgresql.drop_database("confirm_offer")
    with postgresql.connect() as connection:
        connection.execute(f'DROP ROLE IF EXISTS "{user}"')


@pytest.fixture
def shell(tmp_path: Path, database: PostgreSQL) -> Iterator[Shell]:
    if shutil.which("apt-get") is None:
        lacking("apt-get is not here: the page is for Debian")
    clone, programs = tmp_path / "clone", tmp_path / "bin"
    shutil.copytree(PROJECT, clone, ignore=LEFT_OUT)
    (clone / ".venv").symlink_to(sys.prefix)
    made_at = (clone / ".venv/.ready").stat().st_mtime
    needs = [clone / "requirements-dev.lock", clone / "pyproject.toml"]
    assert all(file.stat().st_mtime <= made_at for file in needs), "run 'make setup' first: .venv is not up to date"
    programs.mkdir()
    (programs / "sudo").write_text(SUDO)
    (programs / "sudo").chmod(0o755)
    environment = {
        "PATH": os.pathsep.join([str(programs), os.environ["PATH"], str(Path(postgresql_program("createdb")).parent)]),
        "HOME": str(tmp_path),
        "USER": getpass.getuser(),
        "LANG": "C.UTF-8",
        "COLUMNS": "80",
        "TMPDIR": str(tmp_path),
        "PGHOST": "127.0.0.1",
        "PGPORT": str(database.port),
    }
    with closing(Shell(clone, environment)) as opened:
        yield opened


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def until_booked(shell: Shell, show: str) -> None:
    """Waits until ``show`` shows the booking: the page says "a moment later"."""
    output = ""

    def is_booked() -> bool:
        nonlocal output
        output = shell.run(f"{show.strip()} 2>&1 || true")
        return bool(re.search(r"state +confirmed", output) and re.search(BOOKED, output))

    try:
        until(is_booked, 60, every=0.5)
    except AssertionError:
        pytest.fail(f"{output}\n{shell.run('cat worker.log sandbox.log')}")


def test_the_page_leads_from_a_fresh_machine_to_the_first_booking(
    shell: Shell, broker_url: str, tmp_path: Path
) -> None:
    port = str(free_port())
    private = [
        block.replace("amqp://guest:guest@localhost:5672//", broker_url).replace("8900", port) for block in BLOCKS
    ]
    see, install, settings, tables, start, *jobs, end = private
    first, show_first, second, show_second, third, show_third = jobs

    assert "All 20 confirmations ended as they should" in shell.run(see)
    shell.run(install)
    shell.run(settings)
    assert "database is at revision" in shell.run(tables)
    shell.run(start)

    for publish, show in ((first, show_first), (second, show_second), (third, show_third)):
        shell.run(publish)
        until_booked(shell, show)

    shell.run(end)
    assert "worker_stopped" in (tmp_path / "clone/worker.log").read_text()
