"""The quickest three faults of `make cluster-test`, on a cluster of their own."""

from collections.abc import Iterator

import pytest

from tests.cluster.bench import Bench
from tests.cluster.trials import told, try_fault
from tests.support.servers import PostgreSQL, RabbitMQ, require

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    for server in (RabbitMQ, PostgreSQL):
        require(server)
    with Bench(tmp_path_factory.mktemp("cluster")) as running:
        yield running


@pytest.mark.parametrize("name", ["failover, synchronous", "follower killed", "worker killed"])
def test_a_fault_in_a_cluster_loses_and_doubles_nothing(bench: Bench, name: str) -> None:
    (verdict,) = try_fault(bench, name, rate=10.0, seconds=5.0).values()

    assert told(verdict) == []
    assert verdict.jobs > 50
