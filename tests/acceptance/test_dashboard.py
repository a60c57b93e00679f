"""Dashboard and alerts: every query has data, once a worker has done jobs of all fates. In a real Prometheus."""

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from models.states import State
from tests.support.commands import run
from tests.support.scraping import port_of
from tests.support.servers import Prometheus, RabbitMQ, require
from tests.support.system import PROJECT, System, job, until
from worker.messaging.topology import DEAD_LETTERS

DEPLOY = PROJECT / "deploy"


@pytest.fixture(scope="module")
def rabbitmq(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RabbitMQ]:
    """With the plugin that tells of its queues."""
    require(RabbitMQ)
    server = RabbitMQ(tmp_path_factory.mktemp("rabbitmq"), plugins=["rabbitmq_prometheus"])
    server.start()
    yield server
    server.stop()


@pytest.fixture
def prometheus(system: System, rabbitmq: RabbitMQ, tmp_path: Path) -> Iterator[Prometheus]:
    """Scrapes RabbitMQ, and a worker that has done jobs of all fates."""
    require(Prometheus)
    worker = system.start_worker(METRICS_PORT="0", RETRY_MAX_ATTEMPTS="3")
    port = port_of(worker)
    server = Prometheus(
        tmp_path / "prometheus",
        {
            "confirm-offer": f"http://127.0.0.1:{port}/metrics",
            "rabbitmq": f"http://127.0.0.1:{rabbitmq.http_ports['rabbitmq_prometheus']}/metrics/per-object",
        },
        DEPLOY / "prometheus/alerts.yml",
    )
    server.start()
    yield server
    server.kill()


def dashboard_queries() -> dict[str, str]:
    """Of every panel, and of the annotations, by panel and legend."""
    dashboard = json.loads((DEPLOY / "grafana/dashboards/confirm-offer.json").read_text())
    return {
        f"{panel['title']}: {target['legendFormat']}": target["expr"].replace("$__rate_interval", "20s")
        for panel in dashboard["panels"]
        for target in panel.get("targets", [])
    } | {note["name"]: note["expr"] for note in dashboard["annotations"]["list"]}


def selectors(expression: str) -> set[str]:
    """The series that an expression reads."""
    return set(re.findall(r"\b(?:confirm_offer|rabbitmq|process)_\w+(?:\{.*?\})?|\bup\{.*?\}", expression))


@pytest.mark.slow
def test_every_query_of_dashboard_and_alerts_has_data(prometheus: Prometheus, system: System) -> None:
    def work() -> None:
        number = time.monotonic_ns()
        fates = ("ok", "pending~pending", "refused~http-422", "busy~http-503~1", "lost~drop-after~1")
        system.publish(job(f"{number}-{fate}") for fate in fates)
        system.publish([b"no job"])

    system.sandbox.revoke_tokens()
    work()
    until(lambda: system.states()[State.FAILED] and system.queue_length(DEAD_LETTERS))
    assert run("reprocess", "--rate", "0.01", "--yes", **system.environment).returncode == 0
    missing = dashboard_queries()
    rules = prometheus.alerts()
    read = {series for rule in rules.values() for series in selectors(rule["query"])}
    assert len(missing) > 35
    assert len(rules) == 19
    assert len(read) >= 17

    def all_have_data() -> bool:
        work()  # rates need something to rise
        for where in [where for where, query in missing.items() if prometheus.query(query)]:
            del missing[where]
        read.difference_update([series for series in read if prometheus.query(series)])
        return not missing and not read

    try:
        until(all_have_data, 90, every=1.0)
    except AssertionError:
        pytest.fail(f"no data for {missing} {read}")
    assert {name: rule["lastError"] for name, rule in prometheus.alerts().items() if rule.get("lastError")} == {}
    assert all(rule["health"] == "ok" for rule in prometheus.alerts().values())
    for query in dashboard_queries().values():
        assert all(series["value"][1] != "NaN" for series in prometheus.query(query) if "histogram" not in query), query
