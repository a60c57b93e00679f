"""``health``: alive and consuming, or why not."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from tests.acceptance.test_commands import run
from tests.system import System, until
from worker import health
from worker.cli import cli


def test_a_worker_is_well_while_it_runs(system: System, tmp_path: Path) -> None:
    def probe(*options: str) -> Any:
        return run("health", *options, TMPDIR=str(tmp_path))

    before = probe()
    worker = system.start_worker()
    until(lambda: probe().returncode == 0, every=0.5)
    told, as_json = probe(), json.loads(probe("--json").stdout)
    worker.stop()
    after = probe()

    assert (before.returncode, after.returncode) == (1, 1)
    assert "no worker of this user runs" in after.stderr
    assert told.stdout == f"worker {worker.process.pid} is well: scheduler, relay, consumer\n"
    assert as_json["well"]
    assert as_json["workers"][0]["parts"].keys() == {"scheduler", "relay", "consumer"}


def test_a_killed_worker_is_none(system: System, tmp_path: Path) -> None:
    worker = system.start_worker()
    until(lambda: list(tmp_path.glob("confirm-offer-*/*.json")))
    worker.kill()

    assert "no worker of this user runs" in run("health", TMPDIR=str(tmp_path)).stderr
    assert not list(tmp_path.glob("confirm-offer-*/*.json"))


@pytest.mark.parametrize("ago", [None, 100_000.0])
def test_a_part_that_was_not_well_lately_is_named(
    ago: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health.tempfile, "tempdir", str(tmp_path))
    health.folder().mkdir()
    notes = {"consumer": time.time() - ago if ago else 0.0, "relay": time.time()}
    (health.folder() / f"{os.getpid()}.json").write_text(json.dumps(notes))

    done = CliRunner().invoke(cli, ["health"])

    assert done.exit_code == 1
    assert done.stdout.startswith(f"worker {os.getpid()} is not well: consumer: it is not connected to RabbitMQ")
