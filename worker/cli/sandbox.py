"""``confirm-offer sandbox``: the stand-in of XONE by itself."""

import errno
import threading

import click

from worker.cli.ui.console import Failed, handle_errors, json_option, print_result
from worker.sandbox.server import CONFIRM_PATH, Sandbox


def _path(_context: click.Context, _parameter: click.Parameter, path: str) -> str:
    if not path.startswith("/") or "{partner_id}" not in path or "{offer_id}" not in path:
        raise click.BadParameter("should begin with / and hold {partner_id} and {offer_id}")
    return path


@click.command(short_help="Runs the stand-in of XONE by itself.")
@click.option("--port", default=8900, show_default=True, type=click.IntRange(0, 65535), help="0 takes a free one.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 in a container.")
@click.option(
    "--confirm-path",
    default=CONFIRM_PATH,
    show_default=True,
    callback=_path,
    help="The path that it takes confirm calls at, and no other: what XONE_CONFIRM_PATH should be.",
)
@json_option
@handle_errors
def sandbox(port: int, host: str, confirm_path: str, as_json: bool) -> None:
    """Runs the stand-in of XONE by itself, until it is interrupted. Its page says how to use it.

    Example: confirm-offer sandbox --port 8900
    """
    stand_in = Sandbox(port=port, host=host, confirm_path=confirm_path)
    try:
        stand_in.start()
    except OSError as error:
        reason = "another program has taken it" if error.errno == errno.EADDRINUSE else error.strerror
        raise Failed(f"can't listen on port {port} of {host}: {reason}; choose another with --port") from None
    try:
        print_result(
            as_json, f"stand-in of XONE at {stand_in.url} - open it in a browser; Ctrl-C ends it", url=stand_in.url
        )
        threading.Event().wait()
    except KeyboardInterrupt:
        click.echo()
    finally:
        stand_in.stop()
