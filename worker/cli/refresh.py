"""``confirm-offer refresh``: looks at a booking at XONE now."""

import sys
from contextlib import redirect_stdout

import click

from tasks.operations import lookup
from tasks.operations.audit import who
from tasks.operations.refresh import Refreshed
from tasks.operations.refresh import refresh as look
from worker.cli.show import the_only
from worker.cli.ui.console import Failed, handle_errors, json_option, print_result
from worker.errors import RefreshError, XoneError
from worker.formatting import to_json
from worker.runtime import current
from worker.xone.circuit_breaker import CallsSuspended


@click.command("refresh")
@click.argument("offer", metavar="OFFER_ID")
@click.option("--partner", help="If several partners have an offer or order of this name.")
@json_option
@handle_errors
def refresh(offer: str, partner: str | None, as_json: bool) -> None:
    """Looks at a booking at XONE now, and records what has changed.

    Reads the partner's list of bookings, as workers do by themselves while a booking is pending. A change of the
    booking's status, or of one of its policies', is stored and announced. OFFER_ID may also be an order reference.

    Example: confirm-offer refresh 5c7e0b1d --partner P-100
    """
    runtime = current()
    before = the_only(lookup.find(runtime.engine, offer, partner), offer, partner).details
    try:
        with redirect_stdout(sys.stderr):  # where log lines go
            done = look(runtime, before, who())
    except XoneError as error:
        raise Failed(f"the list of bookings can't be read: {error.detail} ({error.code})") from None
    except CallsSuspended:
        raise Failed(f"no call may be made for {before.partner_id} now: it is paused, or all slots are taken") from None
    except RefreshError as error:
        raise Failed(str(error)) from None
    print_result(as_json, "\n".join(_lines(done)), **to_json(done))
    sys.exit(0 if done.listed else 1)


def _lines(done: Refreshed) -> list[str]:
    name = f"offer {done.offer_id} of {done.partner_id}"
    status = done.status or "no status"
    if not done.listed:
        return [f"{name}: XONE's list of bookings does not hold {done.booking_id}; it stays {done.state}, {status}"]
    if done.event_type is None:
        return [f"{name}: nothing has changed; booking {done.booking_id} is {status}, the state {done.state}"]
    return [
        f"{name}: booking {done.booking_id} was {done.status_before or 'without a status'} and is {status} now",
        f"the state is {done.state}; event {done.event_type} (no. {done.sequence}) will be published by any worker",
    ]
