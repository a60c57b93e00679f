"""A short chaos run: every promise holds under random faults. `make chaos` is the long run."""

from pathlib import Path

import pytest

from tests import chaos
from tests.support.servers import PostgreSQL, RabbitMQ, require

pytestmark = pytest.mark.slow


def test_every_promise_holds_under_random_faults(tmp_path: Path) -> None:
    for server in (RabbitMQ, PostgreSQL):
        require(server)
    plan = chaos.Plan(jobs=200, workers=2, seed=11, every=1.0, hurry=True, longest=20.0)

    report = chaos.run(plan, tmp_path, print)

    assert report.broken == {}
