"""``confirm-offer schema``: the published schemas, for checkouts, consumers and their tools."""

import json
from typing import Any

import click

always_json = click.option("--json", is_flag=True, expose_value=False, help="Print JSON, as without it.")


@click.group()
def schema() -> None:
    """The published schemas, as JSON. They are also in docs/schemas."""


@schema.command()
@always_json
def job() -> None:
    """Prints the JSON Schema of the job.

    Example: confirm-offer schema job > job.json
    """
    from worker.published.json_schema import job_schema

    _print(job_schema())


@schema.command()
@always_json
def event() -> None:
    """Prints the JSON Schema of the events.

    Each type's is in $defs, by its name.

    Example: confirm-offer schema event > event.json
    """
    from worker.published.json_schema import event_schema

    _print(event_schema())


@schema.command()
@always_json
def asyncapi() -> None:
    """Prints the AsyncAPI document of all channels.

    JSON, as tools for AsyncAPI 3 read it: exchanges, queues and messages.

    Example: confirm-offer schema asyncapi > asyncapi.json
    """
    from worker.published.asyncapi import document

    _print(document())


def _print(content: dict[str, Any]) -> None:
    """In ASCII: a pattern contains a character that is invisible."""
    click.echo(json.dumps(content, indent=2))
