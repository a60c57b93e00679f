"""``confirm-offer health``: whether the workers of this machine are alive and consuming, for probes of containers."""

import sys

import click

from worker import health as notes
from worker.commands.console import Failed, json_option, plainly, print_json, tell

WHY = {
    notes.CONSUMER: "it is not connected to RabbitMQ, or has just started",
    "scheduler": "database or RabbitMQ can't be reached, or it has just started",
    "relay": "database or RabbitMQ can't be reached, or it has just started",
}


@click.command("health", short_help="Tells whether the workers of this machine are well.")
@json_option
@plainly
def health(as_json: bool) -> None:
    """Exit code 0 where every worker of this machine and user is alive and consuming; it asks no server.

    Example: confirm-offer health
    """
    workers = notes.workers()
    is_well = bool(workers) and not any(worker.unwell for worker in workers)
    if as_json:
        print_json({"well": is_well, "workers": [{**worker._asdict(), "unwell": worker.unwell} for worker in workers]})
    elif not workers:
        raise Failed("no worker of this user runs on this machine; 'confirm-offer worker' starts one")
    for worker in workers if not as_json else []:
        if worker.unwell:
            what = "; ".join(f"{part}: {WHY.get(part, 'it fails, see its log')}" for part in worker.unwell)
            tell(False, f"worker {worker.pid} is not well: {what}")
        else:
            tell(False, f"worker {worker.pid} is well: {', '.join(worker.parts)}")
    sys.exit(0 if is_well else 1)
