"""Files in folders that other users can write to are led astray by none of them."""

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from worker.messaging.bulk_publish import Progress, Rejected
from worker.observability import metrics
from worker.services import health_file
from worker.services.health_file import HealthFile, read_workers

SOMEBODY = 12345  # a user id
BROKER = "amqp://localhost//"

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to others")


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files, in which anybody may create files."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    folder.chmod(0o1777)
    monkeypatch.setattr(health_file.tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """A folder of ours with a file that looks like a worker's."""
    folder = tmp_path / "victim"
    folder.mkdir()
    (folder / "accounts.json").write_text("precious")
    return folder


def link(folder: Path, victim: Path) -> None:
    folder.symlink_to(victim)


def open_to_all(folder: Path, _victim: Path) -> None:
    folder.mkdir()
    folder.chmod(0o777)


def anothers(folder: Path, _victim: Path) -> None:
    folder.mkdir(mode=0o755)
    os.chown(folder, SOMEBODY, SOMEBODY)


made_by_somebody_else = pytest.mark.parametrize("prepare", [link, open_to_all, pytest.param(anothers, marks=as_root)])


@made_by_somebody_else
def test_a_folder_that_somebody_else_has_made_is_not_used(
    shared: Path, victim: Path, prepare: Callable[[Path, Path], None]
) -> None:
    prepare(shared / f"confirm-offer-{os.getuid()}", victim)

    with pytest.raises(PermissionError, match="remove it"):
        read_workers()
    with pytest.raises(PermissionError, match="remove it"):
        HealthFile().write({}, is_stopping=False)
    assert (victim / "accounts.json").read_text() == "precious"


def test_the_files_of_workers_are_their_owners(shared: Path) -> None:
    file = HealthFile()
    file.write({}, is_stopping=False)

    (path,) = (shared / f"confirm-offer-{os.getuid()}").iterdir()
    assert (stat.S_IMODE(path.stat().st_mode), stat.S_IMODE(path.parent.stat().st_mode)) == (0o600, 0o700)
    file.close()


def test_the_folder_of_shared_metrics_is_led_astray_by_no_link(shared: Path, victim: Path) -> None:
    abandoned = victim / f"worker-{2**22 + 1}"  # no process has this id
    abandoned.mkdir()
    (shared / "prometheus").symlink_to(victim)

    metrics.begin(health_file.own_directory(shared / "prometheus") / "metrics")
    metrics.end()

    assert abandoned.exists()


def test_a_folder_for_shared_metrics_that_all_may_write_to_has_one_of_our_own(shared: Path) -> None:
    """As an emptyDir of Kubernetes."""
    folder = health_file.own_directory(shared)

    assert (folder.parent, stat.S_IMODE(folder.stat().st_mode)) == (shared, 0o700)


@made_by_somebody_else
def test_a_folder_of_metrics_that_somebody_else_has_made_is_not_used(
    shared: Path, victim: Path, prepare: Callable[[Path, Path], None]
) -> None:
    prepare(shared / f"confirm-offer-{os.getuid()}", victim)

    with pytest.raises(PermissionError, match="remove it"):
        health_file.own_directory(shared)


def test_progress_follows_no_link(shared: Path, victim: Path) -> None:
    target = victim / "accounts.json"
    (shared / "jobs.progress.new").symlink_to(target)
    progress = Progress(shared / "jobs.progress", "digest", BROKER)

    progress.ensure_writable()
    progress.advance(1, 1)

    assert target.read_text() == "precious"
    assert stat.S_IMODE((shared / "jobs.progress").lstat().st_mode) == 0o600
    assert Progress(shared / "jobs.progress", "digest", BROKER).begin() == (1, 1)


def test_a_link_is_no_progress(shared: Path, victim: Path) -> None:
    (shared / "jobs.progress").symlink_to(victim / "accounts.json")

    with pytest.raises(OSError, match="symbolic link"):
        Progress(shared / "jobs.progress", "digest", BROKER).ensure_writable()


@as_root
def test_somebody_elses_progress_is_not_believed(shared: Path) -> None:
    path = shared / "jobs.progress"
    Progress(path, "digest", BROKER).advance(7, 7)
    os.chown(path, SOMEBODY, SOMEBODY)

    with pytest.raises(PermissionError, match="another user"):
        Progress(path, "digest", BROKER).ensure_writable()


@as_root
def test_rejected_lines_are_not_written_to_somebody_elses_file(shared: Path) -> None:
    path = shared / "jobs.rejected"
    path.write_text("before")
    os.chown(path, SOMEBODY, SOMEBODY)

    with pytest.raises(PermissionError, match="another user"), Rejected(path, lambda: b"") as rejected:
        rejected.add(b"personal data")
    assert path.read_text() == "before"


def test_rejected_lines_follow_no_link(shared: Path, victim: Path) -> None:
    (shared / "jobs.rejected").symlink_to(victim / "accounts.json")

    path = shared / "jobs.rejected"
    with pytest.raises(OSError, match="symbolic link"), Rejected(path, lambda: b"") as rejected:
        rejected.add(b"personal data")
    assert (victim / "accounts.json").read_text() == "precious"
