"""Dashboard and alerts, in a real Prometheus: every query has data after jobs with all outcomes."""

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
    """A server with the plugin that exports metrics of queues."""
    require(RabbitMQ)
    server = RabbitMQ(tmp_path_factory.mktemp("rabbitmq"), plugins=["rabbitmq_prometheus"])
    server.start()
    yield server
    server.stop()


@pytest.fixture
def prometheus(system: System, rabbitmq: RabbitMQ, tmp_path: Path) -> Iterator[Prometheus]:
    """A Prometheus that scrapes RabbitMQ and a worker."""
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
    """The queries of all panels, by panel and legend, and of the annotations."""
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
    def publish_jobs() -> None:
        number = time.monotonic_ns()
        fates = ("ok", "pending~pending", "refused~http-422", "busy~http-503~1", "lost~drop-after~1")
        system.publish(job(f"{number}-{fate}") for fate in fates)
        system.publish([b"no job"])

    system.sandbox.revoke_tokens()
    publish_jobs()
    until(lambda: system.states()[State.FAILED] and system.queue_length(DEAD_LETTERS))
    assert run("reprocess", "--rate", "0.01", "--yes", **system.environment).returncode == 0
    missing = dashboard_queries()
    rules = prometheus.alerts()
    without_data = {series for rule in rules.values() for series in selectors(rule["query"])}
    assert len(missing) > 35
    assert len(rules) == 22
    assert len(without_data) >= 17

    def all_have_data() -> bool:
        publish_jobs()  # rates need rising counters
        for name in [name for name, query in missing.items() if prometheus.query(query)]:
            del missing[name]
        without_data.difference_update([series for series in without_data if prometheus.query(series)])
        return not missing and not without_data

    try:
        until(all_have_data, 90, every=1.0)
    except AssertionError:
        pytest.fail(f"no data for {missing} {without_data}")
    assert {name: rule["lastError"] for name, rule in prometheus.alerts().items() if rule.get("lastError")} == {}
    assert all(rule["health"] == "ok" for rule in prometheus.alerts().values())
    for query in dashboard_queries().values():
        assert all(series["value"][1] != "NaN" for series in prometheus.query(query) if "histogram" not in query), query
