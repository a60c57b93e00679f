"""``confirm-offer resolve``: a person's answer to ``needs_review``."""

from typing import BinaryIO

import click

from tasks.operations.audit import who
from tasks.operations.resolve import check_why, read_booking, resolve_booked, resolve_failed
from worker.cli.ui.console import Failed, by_option, handle_errors, json_option, print_result
from worker.errors import ResolveError
from worker.settings import DatabaseSettings, EncryptionSettings, EventSettings, StatusSettings, read
from worker.storage import database
from worker.storage.encryption import Encryption

MAX_BYTES = 5 * 1024 * 1024


def _why(_context: click.Context, _option: click.Parameter, text: str | None) -> str | None:
    try:
        return check_why(text) if text is not None else None
    except ResolveError as error:
        raise click.BadParameter(str(error)) from None


@click.command(short_help="Records a person's answer to needs_review.")
@click.argument("offer_id")
@click.option("--partner", required=True, help="The partner of the offer.")
@click.option(
    "--booking", "file", type=click.File("rb"), help='XONE has a booking: its JSON, as XONE answers it ("-": stdin).'
)
@click.option(
    "--failed",
    "why",
    metavar="WHY",
    callback=_why,
    help="XONE has no booking. WHY is stored as the error's detail and is sent to consumers in the event: write no "
    "personal data. At most 500 characters.",
)
@click.option("--reason", help="For the audit only, such as where you looked.")
@by_option
@json_option
@handle_errors
def resolve(
    offer_id: str, partner: str, file: BinaryIO | None, why: str | None, reason: str | None, as_json: bool
) -> None:
    """Records what a person found out about a confirmation in needs_review, and publishes it as an event.

    With --booking, the booking is checked against the offer and stored as if XONE had answered with it; the
    confirmation becomes confirmed or pending. With --failed, it becomes failed, with the code "resolved". Any running
    worker publishes the event. The audit keeps who did it, and why.

    Example: confirm-offer resolve 5c7e0b1d --partner P-100 --booking it.json

    Example: confirm-offer resolve 5c7e0b1d --partner P-100 --failed "not booked"
    """
    if (file is None) == (why is None):
        raise click.UsageError("give either --booking FILE or --failed WHY")
    engine = database.connect(read(DatabaseSettings).url)
    booking_id, set_aside = None, list[str]()
    if file is not None:
        content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise Failed(f"{file.name} is larger than {MAX_BYTES // 1024**2} MiB")
        booking = read_booking(content, offer_id)
        booking_id, set_aside = booking.id, sorted(booking.leftovers())
        encryption, statuses = Encryption(read(EncryptionSettings).keys), read(StatusSettings).booking_statuses
        with_links = read(EventSettings).EVENT_LINKS == "on"
        with engine.begin() as connection:
            done = resolve_booked(connection, encryption, partner, booking, statuses, with_links, who(), reason)
    else:
        assert why is not None
        with engine.begin() as connection:
            done = resolve_failed(connection, partner, offer_id, why, who(), reason)
    lines = [
        f"offer {offer_id} of {partner} is {done.state}" + (f", booking {booking_id}" if booking_id else ""),
        f"event {done.event_type} (no. {done.sequence}) will be published by any running worker",
    ]
    if set_aside:
        lines.append(f"kept without a column of their own: {', '.join(set_aside)}")
    print_result(
        as_json,
        "\n".join(lines),
        partner_id=partner,
        offer_id=offer_id,
        state=done.state,
        booking_id=booking_id,
        event={"type": done.event_type, "sequence": done.sequence},
        set_aside=set_aside,
    )
