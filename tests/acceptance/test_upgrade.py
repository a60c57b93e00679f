"""An upgrade without downtime: workers of this version and of the next share one database.

The next version is a copy of this one with an expand migration, and a model that uses what the migration adds.
"""

import itertools
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import text

from models.states import State
from models.tables import Booking
from tests.support.system import PROJECT, System, WorkerProcess, job, until
from worker.messaging.topology import DEAD_LETTERS
from worker.storage import migrator

pytestmark = pytest.mark.slow

NEXT = "9999"
MIGRATION = f'''
"""The next version: a column and a table"""

import sqlalchemy as sa
from alembic import op

revision = "{NEXT}"
down_revision = "{migrator.newest()}"


def upgrade() -> None:
    op.add_column("confirmations", sa.Column("written_by", sa.String(16), nullable=True))
    op.create_table("notes", sa.Column("id", sa.Integer(), primary_key=True), sa.Column("note", sa.Text()))
'''
COLUMN = """    __tablename__ = "confirmations"

    written_by: Mapped[str | None] = mapped_column(String(16), default="next", onupdate="next")
"""
TABLE = """

class Note(Base):
    __tablename__ = "notes"

    id: Mapped[int] = mapped_column(primary_key=True)
    note: Mapped[str | None] = mapped_column(Text)
"""
# The changes of the next version: in each file, each text occurs once.
CHANGES = {
    "models/tables.py": {'    __tablename__ = "confirmations"\n': COLUMN},
    "worker/services/scheduler.py": {
        "from models.tables import Confirmation\n": "from models.tables import Confirmation, Note\n",
        "            since = self._due_since(connection, paused)\n": (
            "            connection.execute(Note.__table__.insert(), {'note': 'next'})\n"
            "            since = self._due_since(connection, paused)\n"
        ),
    },
}


@pytest.fixture(scope="module")
def next_version(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the sources of the next version."""
    sources = tmp_path_factory.mktemp("next")
    for package in ("models", "tasks", "worker", "migrations"):
        shutil.copytree(PROJECT / package, sources / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name, changes in CHANGES.items():
        content = (sources / name).read_text()
        for old, new in changes.items():
            assert content.count(old) == 1, f"the next version can't be made from {name}; see CHANGES"
            content = content.replace(old, new)
        (sources / name).write_text(content)
    with (sources / "models/tables.py").open("a") as tables:
        tables.write(TABLE)
    (sources / f"migrations/versions/{NEXT}_the_next.py").write_text(MIGRATION)
    return sources


def run(sources: Path, url: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a command of one version."""
    return subprocess.run(
        [sys.executable, "-m", "worker", *arguments],
        env={**os.environ, "DATABASE_URL": url},
        cwd=sources,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def attempts(worker: WorkerProcess) -> dict[str, list[int]]:
    """The numbers of the attempts of a worker, by offer."""
    numbers: dict[str, list[int]] = {}
    for line in worker.logged():
        if line["event"] == "attempt_ended":
            numbers.setdefault(line["offer_id"], []).append(line["attempt"])
    return numbers


def handed_over(before: WorkerProcess, after: WorkerProcess) -> set[str]:
    """Offers that one worker attempted before the other."""
    first, then = attempts(before), attempts(after)
    return {offer for offer in first.keys() & then.keys() if min(first[offer]) < max(then[offer])}


def publish_until(system: System, numbers: Iterator[int], condition: Callable[[], object]) -> int:
    """Publishes jobs, every third of which needs two attempts, until the condition holds. Returns how many."""
    published = 0

    def condition_holds() -> object:
        nonlocal published
        offers = [f"offer-{number}" + ("~http-503~1" if number % 3 == 0 else "") for number in range(9)]
        system.publish(job(f"{next(numbers)}-{offer}") for offer in offers)
        published += len(offers)
        return condition()

    until(condition_holds, 60, every=0.2)
    return published


def test_two_versions_share_one_database(system: System, next_version: Path) -> None:
    numbers = itertools.count(1)
    old = system.start_worker()
    published = publish_until(system, numbers, lambda: attempts(old))

    migration = subprocess.Popen(
        [sys.executable, "-m", "worker", "db", "upgrade"],
        env={**os.environ, "DATABASE_URL": system.database_url},
        cwd=next_version,
        stdout=subprocess.PIPE,
        text=True,
    )
    published += publish_until(system, numbers, lambda: migration.poll() is not None)
    assert migration.communicate()[0] == f"database is at revision {NEXT}, was {migrator.newest()}\n"

    new = system.start_worker(sources=next_version)
    published += publish_until(system, numbers, lambda: handed_over(old, new) and handed_over(new, old))
    second_old = system.start_worker()  # as after a restart of a machine or a rollback
    published += publish_until(system, numbers, lambda: handed_over(new, second_old))
    assert [old.stop(), second_old.stop()] == [0, 0]
    published += publish_until(system, numbers, lambda: system.states()[State.CONFIRMED] > published)

    def all_confirmed() -> bool:
        return system.states() == {State.CONFIRMED: published}

    until(all_confirmed, 60)
    events = system.until_events(published)
    assert new.stop() == 0
    assert Counter(event["type"] for event in events) == {"booking.confirmed": published}
    assert len({event["subject"] for event in events}) == published
    assert system.count(Booking.__table__) == len(system.sandbox.bookings) == published
    assert system.sandbox.double_bookings == 0
    assert system.queue_length(DEAD_LETTERS) == 0
    with system.engine.connect() as connection:
        written = connection.execute(text("select written_by, count(*) from confirmations group by 1"))
        assert {by for by, _ in written} == {None, "next"}
        assert connection.execute(text("select count(*) from notes")).scalar_one() > 0
    for worker in (old, second_old, new):
        lines = worker.logged()
        assert [line for line in lines if line["level"] in ("error", "critical")] == []
        assert {line["event"] for line in lines} >= {"worker_started", "attempt_ended", "worker_stopped"}
        assert {line["event"] for line in lines} & {
            "waiting",
            "duty_waits",
            "task_raised",
            "attempt_abandoned",
        } == set()
        assert "Traceback" not in worker.log.read_text()


def test_tables_of_a_later_version_are_not_changed(next_version: Path, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/confirm-offer.db"

    assert run(PROJECT, url, "db", "upgrade").returncode == 0
    behind = run(next_version, url, "db", "check")
    assert run(next_version, url, "db", "upgrade").returncode == 0
    ahead, rolled_back = run(PROJECT, url, "db", "check"), run(PROJECT, url, "db", "upgrade")

    assert behind.returncode == 1
    assert behind.stderr.endswith(f"not at {NEXT}; run 'confirm-offer db upgrade'\n")
    assert ahead.returncode == rolled_back.returncode == 0
    assert ahead.stdout == rolled_back.stdout
    assert ahead.stdout.startswith(f"database is at revision {NEXT}, of a later version than this one")
    assert run(next_version, url, "db", "check").stdout == f"database is at revision {NEXT}, as it should be\n"
