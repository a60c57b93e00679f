"""``confirm-offer keygen``: a new key for DATA_KEYS."""

import click

from worker.cli.ui.console import json_option, print_result


@click.command()
@json_option
def keygen(as_json: bool) -> None:
    """Prints a new key for DATA_KEYS.

    Example: confirm-offer keygen
    """
    from worker.storage.encryption import new_key

    key = new_key()
    print_result(as_json, key, key=key)
