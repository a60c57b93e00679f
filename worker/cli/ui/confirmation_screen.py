"""All that is known of a confirmation, on one screen."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from models.states import BatchState, State
from tasks.operations.lookup import (
    AttemptDetails,
    BatchMembership,
    BookingDetails,
    EventDetails,
    FoundConfirmation,
    PolicyDetails,
)
from tasks.privacy.reveal import Persons, Secrets, in_short
from worker.cli.ui.tables import add_row, new_grid, new_table, plain
from worker.formatting import local_time

STYLES = {
    State.CONFIRMED: "green",
    State.PENDING: "yellow",
    State.CANCELLED: "red",
    State.FAILED: "red",
    State.NEEDS_REVIEW: "magenta",
    State.RETRYING: "yellow",
}
OVERDUE_AFTER = 120.0  # seconds
MAX_ANSWER = 2000  # characters of a kept answer


def screen(found: FoundConfirmation, persons: Persons | None = None) -> Group:
    """One screen about a confirmation. persons: to be shown masked."""
    details = found.details
    parts: list[Any] = [_head(found, persons)]
    if details.attempts:
        parts.append(_attempts(details.attempts))
    if details.booking:
        parts.append(_booking(details.booking))
    if details.policies:
        parts.append(_policies(details.policies))
    if details.events:
        parts.append(_events(details.events))
    return _spaced(parts)


def _head(found: FoundConfirmation, persons: Persons | None) -> Group:
    details = found.details
    facts = new_grid()
    add_row(facts, "partner", details.partner_id)
    add_row(facts, "order", details.order_reference)
    add_row(facts, "state", Text(details.state, style=STYLES.get(details.state, "")))
    if details.error:
        add_row(facts, "why", f"{details.error.code}: {details.error.detail}")
    for name, text in _next_steps(found):
        add_row(facts, name, text)
    if details.confirm_by:
        add_row(facts, "confirm by", local_time(details.confirm_by))
    if details.withdrawn_at:
        add_row(facts, "withdrawn", local_time(details.withdrawn_at))
    if details.purged_at:
        add_row(facts, "personal data", f"purged on {local_time(details.purged_at)}")
    elif persons is not None:
        holder = persons.policyholder.sent or persons.policyholder.returned
        add_row(facts, "policyholder", in_short(holder) if holder else None)
        for insured in persons.insured:
            add_row(facts, "insured", in_short(insured))
    return Group(Text.assemble("offer ", (plain(details.offer_id).plain, "bold")), facts)


def _next_steps(found: FoundConfirmation) -> list[tuple[str, str]]:
    """Names and texts: when the next attempt is, and what stops it."""
    details, lines = found.details, []
    if details.next_attempt_at and found.pauses:
        lines.append(("next attempt", "once calls are resumed"))
    elif details.next_attempt_at and any(stop.is_total for stop in found.stopped):
        lines.append(("next attempt", "once calls pass again; a worker then takes it by itself"))
    elif details.next_attempt_at:
        lines.append(("next attempt", when(details.next_attempt_at, found.now, found.has_workers)))
    elif details.state == State.CONFIRMING and found.due_at:
        lines.append(("next attempt", f"under way; taken over after {local_time(found.due_at)} if its worker is gone"))
    for pause in found.pauses:
        scope = f"calls for {pause.partner_id}" if pause.partner_id else "all calls"
        lines.append(("paused", f"{scope}, since {local_time(pause.created_at)}, by {pause.by}: {pause.reason}"))
    lines += [("stopped", str(stop)) for stop in found.stopped]
    lines += [("batch", _batch(batch)) for batch in found.batches]
    return lines


def _batch(batch: BatchMembership) -> str:
    progress = "under way" if batch.fed_at else "waits for its turn"
    state = "" if batch.state == BatchState.RUNNING else f" (the batch is {batch.state})"
    return f"{batch.id}, {progress}{state}, by {batch.by}" + (f": {batch.reason}" if batch.reason else "")


def _attempts(attempts: Sequence[AttemptDetails]) -> Table:
    table = new_table("#", "started", "took", "outcome", "answer", numbers=("#", "took"), title="attempts")
    for attempt in attempts:
        answer = attempt.code or str(attempt.http_status or "-")
        outcome = attempt.outcome or "under way"
        add_row(table, attempt.number, local_time(attempt.started_at), took(attempt.duration_ms), outcome, answer)
    return table


def _booking(booking: BookingDetails) -> Group:
    facts = new_grid()
    price = str(booking.price) if booking.price is not None else "-"
    add_row(facts, "id", booking.id)
    add_row(facts, "status", booking.status)
    add_row(facts, "price", f"{price} {booking.currency or ''}".strip())
    add_row(facts, "reference", booking.provider_reference)
    add_row(facts, "created", local_time(booking.created_at))
    return Group(Text("booking", style="bold"), facts)


def _policies(policies: Sequence[PolicyDetails]) -> Table:
    table = new_table("type", "code", "status", "price", "from", "to", numbers=("price",), title="policies")
    for policy in policies:
        kind = (policy.policy_type, policy.policy_code, policy.status)
        add_row(table, *kind, policy.price, day(policy.policy_start_date), day(policy.policy_end_date))
    return table


def _events(events: Sequence[EventDetails]) -> Table:
    table = new_table("#", "type", "written", "published", numbers=("#",), title="events")
    for event in events:
        published = local_time(event.published_at) if event.published_at else "not yet"
        add_row(table, event.sequence, event.type, local_time(event.time), published)
    return table


def revealed_screen(persons: Persons, secrets: Secrets) -> Group:
    """The encrypted data of a confirmation, in clear."""
    links = secrets.links
    coi = {f"coi {name}": link for name, link in asdict(links.coi).items()}
    others = {"account_url": links.account_url, "fnol_link": links.fnol_link, "sign_up_url": links.sign_up_url}
    parts = [
        _fields("policyholder, as sent", persons.policyholder.sent),
        _fields("policyholder, as XONE returned it", persons.policyholder.returned),
        *(_fields("insured", insured) for insured in persons.insured),
        _fields("links and token", {**coi, **others, "security_token": secrets.security_token}),
        _fields("other fields of the booking", secrets.other_fields),
    ]
    for answer in secrets.answers:
        shown, left = answer.body[:MAX_ANSWER], len(answer.body) - MAX_ANSWER
        more = f"\n… {left} characters more, with --json" if left > 0 else ""
        title = Text(f"answer to attempt {answer.attempt}, as kept", style="bold")
        parts.append(Group(title, plain(shown + more, keep_lines=True)))
    return _spaced([part for part in parts if part is not None])


def _fields(title: str, fields: dict[str, Any] | None) -> Group | None:
    facts = new_grid()
    for name, value in (fields or {}).items():
        if value not in (None, ""):
            add_row(facts, name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
    return Group(Text(title, style="bold"), facts) if facts.row_count else None


def _spaced(parts: Sequence[Any]) -> Group:
    """The parts with an empty line between them."""
    return Group(*(item for number, part in enumerate(parts) for item in (["", part] if number else [part])))


def when(value: datetime, now: datetime, has_workers: bool) -> str:
    """A time when something is due, and how far away it is. has_workers: whether any runs."""
    seconds = (value - now).total_seconds()
    unit, length = next((pair for pair in (("h", 3600), ("min", 60)) if abs(seconds) >= 2 * pair[1]), ("s", 1))
    distance = f"{round(abs(seconds) / length)} {unit}"
    if not has_workers:
        text = f"{f'{distance} ago' if seconds <= 0 else f'in {distance}'}; no worker runs that could take it"
    elif seconds <= -OVERDUE_AFTER:
        text = f"{distance} ago: the workers are behind"
    else:
        text = "due: a worker takes it next" if seconds <= 0 else f"in {distance}"
    return f"{local_time(value)}, {text}"


def took(milliseconds: int | None) -> str:
    """``250 ms``, ``12.5 s``; ``-`` for None."""
    if milliseconds is None:
        return "-"
    return f"{milliseconds} ms" if milliseconds < 10_000 else f"{milliseconds / 1000:.1f} s"


def day(value: datetime | None) -> str:
    """A day, as it was sent; ``-`` for None."""
    return value.strftime("%Y-%m-%d") if value is not None else "-"
