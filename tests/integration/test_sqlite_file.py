"""The file of SQLite: who may use it, and what of it outlasts a power failure."""

import os
import stat
from pathlib import Path

from pydantic import SecretStr

from worker.doctor import database as doctor
from worker.settings import DatabaseSettings
from worker.storage import database


def test_a_file_of_sqlite_is_its_owners_and_commits_outlast_a_power_failure(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        settings = DatabaseSettings(DATABASE_URL=SecretStr(f"sqlite:///{tmp_path}/file.db"))
        engine = database.connect(settings.url)
        with engine.begin() as connection:
            connection.exec_driver_sql("create table some (id integer)")
            synchronous = connection.exec_driver_sql("pragma synchronous").scalar()
            modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in tmp_path.glob("file.db*")}
        engine.dispose()
    finally:
        os.umask(before)

    assert synchronous == 2, "FULL"
    assert [finding.check for finding in doctor.check(settings, None) if finding.check == "file"] == []
    (tmp_path / "file.db").chmod(0o644)
    assert [finding.check for finding in doctor.check(settings, None) if finding.check == "file"] == ["file"]
    assert modes == dict.fromkeys(["file.db", "file.db-wal", "file.db-shm"], 0o600)


def test_a_file_behind_a_link_is_its_owners_too(tmp_path: Path) -> None:
    (tmp_path / "link.db").symlink_to(tmp_path / "file.db")
    before = os.umask(0o022)
    try:
        with database.connect(f"sqlite:///{tmp_path}/link.db").begin() as connection:
            connection.exec_driver_sql("create table some (id integer)")
    finally:
        os.umask(before)

    assert stat.S_IMODE((tmp_path / "file.db").stat().st_mode) == 0o600
