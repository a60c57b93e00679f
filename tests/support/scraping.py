"""Scrapes the metrics of a worker."""

from urllib.request import urlopen

from tests.support.system import WorkerProcess, until

Samples = dict[str, float]


def port_of(worker: WorkerProcess) -> int:
    def served_port() -> int | None:
        return next((line["port"] for line in worker.logged() if line["event"] == "metrics_served"), None)

    return int(until(served_port))


def scrape(port: int, path: str = "/metrics") -> Samples:
    """The values by name with labels, without the prefix."""
    with urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    pairs = [line.rsplit(" ", 1) for line in lines if not line.startswith("#")]
    return {name.removeprefix("confirm_offer_"): float(value) for name, value in pairs}
