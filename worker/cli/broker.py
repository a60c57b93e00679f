"""``confirm-offer broker declare``: exchanges, queues and bindings."""

import click

from worker.cli.ui.console import handle_errors, json_option, print_result
from worker.messaging import broker, topology
from worker.settings import BrokerSettings, read


@click.group("broker")
def broker_group() -> None:
    """Exchanges, queues and bindings."""


@broker_group.command("declare")
@json_option
@handle_errors
def declare(as_json: bool) -> None:
    """Declares exchanges, queues and bindings. Safe to repeat; the worker does it too.

    Example: confirm-offer broker declare
    """
    with broker.connect(read(BrokerSettings).url) as connection:
        names = topology.declare(connection)
    print_result(as_json, "\n".join(f"declared {name}" for name in names), declared=names)
