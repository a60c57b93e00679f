"""``confirm-offer health``: whether the workers of this machine are alive and consuming, for container probes."""

import json
import sys
import time
from typing import Any

import click

from worker.services import health_file
from worker.services.health_file import PartHealth, WorkerHealth


@click.command(
    "health",
    short_help="Tells whether the workers of this machine are well.",
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.option("--live", is_flag=True, help="Fail only if a restart would help, not for an outage elsewhere.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def health(live: bool, as_json: bool) -> None:
    """Exit code 0 if every worker of this machine and user is alive and consuming.

    That is: connected to RabbitMQ, with a database that answers, and with scheduler and relay at work. The command asks
    no server but reads what the workers note. With --live it fails only for a worker that is frozen or stuck, and not
    for one that waits for RabbitMQ or the database, or finishes its last calls.

    A worker whose calls to XONE have stopped, or are paused, is well: no restart helps. It is said beside it.

    \b
    Example: confirm-offer health
    Example: confirm-offer health --live
    """
    try:
        workers = health_file.read_workers()
    except OSError as error:
        raise click.ClickException(f"what workers note can't be read: {error.strerror}") from None
    is_well = bool(workers) and all(worker.is_well for worker in workers)
    is_alive = bool(workers) and all(worker.is_alive for worker in workers)
    if as_json:
        click.echo(json.dumps({"well": is_well, "alive": is_alive, "workers": [_facts(worker) for worker in workers]}))
    elif not workers:
        click.echo(
            "confirm-offer: no worker of this user runs on this machine; 'confirm-offer worker' starts one", err=True
        )
    else:
        for worker in workers:
            click.echo(_liveness(worker) if live else _wellness(worker))
    sys.exit(0 if (is_alive if live else is_well) else 1)


def _facts(worker: WorkerHealth) -> dict[str, Any]:
    return {
        "pid": worker.pid,
        "well": worker.is_well,
        "alive": worker.is_alive,
        "stopping": worker.is_stopping,
        "parts": {name: _ago(part.succeeded_at) for name, part in worker.parts.items()},
        "unwell": worker.unwell,
        "stuck": worker.stuck,
        "stopped": worker.stopped,
    }


def _ago(at: float) -> float | None:
    """Seconds since a time; None if it never was."""
    return round(time.time() - at, 1) if at else None


def _wellness(worker: WorkerHealth) -> str:
    if worker.is_frozen:
        return _liveness(worker)
    if worker.is_stopping:
        return f"worker {worker.pid} is stopping: it takes nothing new"
    if worker.unwell:
        why = "".join(f"\n  {name}: {_why(worker.parts[name])}" for name in worker.unwell)
        return f"worker {worker.pid} is not well{why}"
    stopped = "".join(f"\n  {stop['text']}" for stop in worker.stopped)
    return f"worker {worker.pid} is well: {', '.join(worker.parts)}{', but' if stopped else ''}{stopped}"


def _why(part: PartHealth) -> str:
    since = f"{_ago(part.succeeded_at):,.0f} s" if part.succeeded_at else "its start"
    if part.waits_for is not None:
        return f"waits for {part.waits_for}, since {since}"
    return f"not well since {since}" if part.succeeded_at else "not yet well since its start"


def _liveness(worker: WorkerHealth) -> str:
    if worker.is_frozen:
        return f"worker {worker.pid} is frozen: it has noted nothing for {_ago(worker.noted_at):,.0f} s"
    if worker.stuck:
        return f"worker {worker.pid} is stuck: {', '.join(worker.stuck)}"
    return f"worker {worker.pid} is alive"
