"""Metrics of real workers, scraped by the test; and alerts, tested by Prometheus."""

import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.error import HTTPError

import pytest

from tests.support.scraping import Samples, port_of, scrape
from tests.support.servers import Prometheus, free_port, require
from tests.support.system import PROJECT, System, job, until

DEPLOY = PROJECT / "deploy"


def values_of(name: str, samples: Samples) -> Samples:
    """The values of one metric that are not 0, by labels."""
    return {
        ", ".join(re.findall(r'"(.*?)"', key)): value
        for key, value in samples.items()
        if re.split("{", key)[0] == name and value
    }


OTHER_POOLS = (pytest.param(pool, marks=pytest.mark.slow) for pool in ("prefork", "gevent"))


@pytest.mark.parametrize("pool", ["threads", *OTHER_POOLS])
def test_the_metrics_of_a_worker_count_its_jobs(system: System, pool: str) -> None:
    worker = system.start_worker(METRICS_PORT="0", WORKER_POOL=pool, WORKER_CONCURRENCY="4", RETRY_MAX_ATTEMPTS="3")
    port = port_of(worker)
    jobs = [
        job("ok"),
        job("pending~pending"),
        job("refused~http-422"),
        job("busy~http-503~1"),
        job("lost~drop-after~1"),
    ]
    system.publish([*jobs, b"no job"], timestamp=int(time.time()) - 600)
    system.publish([job("without-timestamp"), job("future~pending")], timestamp=2**40)
    system.until_events(7)

    def all_counted() -> Samples | None:
        now = scrape(port)
        done = values_of("dead_letters_total", now) and sum(values_of("events_published_total", now).values()) == 7
        return now if done else None

    now = until(all_counted)
    assert values_of("jobs_total", now) == {"confirmed": 4, "pending": 2, "failed": 1}
    assert values_of("attempts_total", now) == {
        "none, booked": 6,
        "http-422, refused": 1,
        "http-503, not_booked": 1,
        "connection-lost, unknown": 1,
    }
    assert values_of("dead_letters_total", now) == {"invalid-json": 1}
    assert values_of("events_published_total", now) == {
        "booking.confirmed": 4,
        "booking.pending": 2,
        "confirmation.failed": 1,
    }
    calls = values_of("call_duration_seconds_count", now)
    assert calls["confirm"] == 9 - 1, "the lost booking was looked up in the list, not requested again"
    assert calls["bookings"] >= 1
    assert calls["token"] == sum(values_of("token_refreshes_total", now).values()) >= 1
    assert values_of("job_to_event_seconds_count", now) == values_of("events_published_total", now)
    durations = values_of("job_to_event_seconds_bucket", now)
    assert durations["300.0, booking.confirmed"] == 1, (
        "without a valid timestamp, time counts from the arrival of the job"
    )
    assert durations["900.0, booking.confirmed"] == 4
    assert values_of("calls_in_flight", now) == {}
    assert now['last_well_timestamp_seconds{part="relay"}'] > time.time() - 600
    assert worker.stop() == 0
    assert list(system.folder.glob("confirm-offer-*/metrics/*")) == []


@pytest.mark.slow
def test_calls_in_flight_of_a_killed_process_are_not_shown(system: System) -> None:
    system.sandbox.latency = 60.0
    worker = system.start_worker(METRICS_PORT="0", WORKER_POOL="prefork", WORKER_CONCURRENCY="2", XONE_TIMEOUT="100")
    port = port_of(worker)
    system.publish([job("ok"), b"no job", b"no job either"])
    until(lambda: values_of("calls_in_flight", scrape(port)).get("confirm") == 1)
    until(lambda: values_of("dead_letters_total", scrape(port)).get("invalid-json") == 2)

    for child in children(worker.process.pid):
        os.kill(child, signal.SIGKILL)

    until(lambda: "confirm" not in values_of("calls_in_flight", scrape(port)))
    assert values_of("dead_letters_total", scrape(port)) == {"invalid-json": 2}


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow
def test_a_port_in_use_is_logged_and_opened_later(system: System) -> None:
    with socket.create_server(("127.0.0.1", free_port())) as listening:
        port = listening.getsockname()[1]
        worker = system.start_worker(METRICS_PORT=str(port))
        system.publish([job("ok")])
        system.until_events(1)
        until(lambda: [line for line in worker.logged() if line["event"] == "metrics_not_served"])

    log_lines = [line for line in worker.logged() if line["event"] == "metrics_not_served"]
    assert [(line["port"], line["level"]) for line in log_lines] == [(port, "error")]
    assert "METRICS_PORT is taken" in log_lines[0]["error"]
    assert port_of(worker) == port
    assert values_of("jobs_total", scrape(port)) == {"confirmed": 1}


def test_a_worker_serves_nothing_but_metrics(system: System) -> None:
    worker = system.start_worker(METRICS_PORT="0")
    without = system.start_worker()
    port = port_of(worker)

    for path in ("/", "/metrics/", "/../metrics", "/favicon.ico"):
        with pytest.raises(HTTPError, match="404"):
            scrape(port, path)
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(b"POST /metrics HTTP/1.1\r\nContent-Length: 0\r\n\r\n")
        assert b" 405 " in connection.recv(1000)
    assert scrape(port, "/metrics?name[]=x")["build_info" + '{version="0.1.0"}'] == 1
    assert not any(line["event"] == "metrics_served" for line in without.logged())


@pytest.mark.slow
@pytest.mark.parametrize("pool", ["threads", "gevent"])
def test_clients_that_drip_stop_neither_the_worker_nor_its_health(system: System, pool: str) -> None:
    worker = system.start_worker(METRICS_PORT="0", WORKER_POOL=pool, WORKER_CONCURRENCY="8")
    port = port_of(worker)
    resource.prlimit(worker.process.pid, resource.RLIMIT_NOFILE, (256, 256))
    is_over = threading.Event()

    def drip() -> None:
        clients: list[socket.socket] = []
        while not is_over.wait(0.1):
            while len(clients) < 1000:
                clients.append(socket.create_connection(("127.0.0.1", port), timeout=10))
            for client in list(clients):
                try:
                    client.send(b"G")
                except OSError:
                    client.close()
                    clients.remove(client)
        for client in clients:
            client.close()

    attacker = threading.Thread(target=drip)
    attacker.start()
    try:
        for number in range(20):
            system.publish([job(f"offer-{number}")])
            system.until_events(number + 1)
            assert values_of("build_info", scrape(port))
        command = [sys.executable, "-m", "worker", "health"]
        until(lambda: subprocess.run(command, env=system.environment, check=False).returncode == 0, every=0.5)
    finally:
        is_over.set()
        attacker.join()


def promtool(*arguments: str) -> str:
    require(Prometheus)
    done = subprocess.run(
        ["promtool", *arguments], cwd=DEPLOY / "prometheus", capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_each_alert_fires_on_its_condition_only() -> None:
    assert "SUCCESS" in promtool("test", "rules", "alerts_test.yml")
    assert "SUCCESS" in promtool("check", "config", "prometheus.yml")


def test_every_alert_is_tested_and_names_its_place_in_the_runbook() -> None:
    rules = (DEPLOY / "prometheus/alerts.yml").read_text()
    alerts = re.findall(r"alert: (\w+)", rules)
    tested = (DEPLOY / "prometheus/alerts_test.yml").read_text()
    runbook = re.findall(r"^## (.+)$", (PROJECT / "docs/runbook.md").read_text(), re.MULTILINE)
    anchors = {re.sub(r"\W+", "-", title.lower()) for title in runbook}

    assert [alert for alert in alerts if not re.search(rf"alertname: {alert}\n *exp_alerts:\n", tested)] == []
    assert set(re.findall(r"runbook_url: docs/runbook.md#(.+)", rules)) <= anchors
    assert rules.count("runbook_url: docs/runbook.md#") == len(alerts) == len(set(alerts))
