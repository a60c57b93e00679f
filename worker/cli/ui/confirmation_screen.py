"""What is known of a confirmation, on one screen or as JSON. Opens nothing that is sealed: see worker/reveal.py."""

import json
import re
from datetime import datetime
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text
from sqlalchemy import Row

from models.states import BatchState, State
from tasks.operations.lookup import Found
from tasks.privacy.reveal import in_short
from worker.formatting import encodable, local_time

STYLE_OF = {
    State.CONFIRMED: "green",
    State.PENDING: "yellow",
    State.FAILED: "red",
    State.NEEDS_REVIEW: "magenta",
    State.RETRYING: "yellow",
}
OVERDUE = 120.0  # seconds
MAX_ANSWER_SHOWN = 2000  # characters of a kept answer on the screen


def screen(found: Found, people: dict[str, Any] | None = None) -> Group:
    """One screen about a confirmation. people: of worker/reveal.py, to be shown masked."""
    told = found.told
    parts: list[Any] = [_head(found, people)]
    if told["attempts"]:
        parts.append(_attempts(told["attempts"]))
    if told["booking"]:
        parts.append(_booking(told["booking"]))
    if told["policies"]:
        parts.append(_policies(told["policies"]))
    if told["events"]:
        parts.append(_events(told["events"]))
    return _spaced(parts)


def _head(found: Found, people: dict[str, Any] | None) -> Group:
    told, state = found.told, State(found.told["state"])
    facts = _grid()
    facts.add_row("partner", plain(told["partner_id"]))
    facts.add_row("order", plain(told["order_reference"] or "-"))
    facts.add_row("state", Text(state, style=STYLE_OF.get(state, "")))
    if told["error"]:
        facts.add_row("why", plain(f"{told['error']['code']}: {told['error']['detail']}"))
    for name, text in _how_it_goes_on(found):
        facts.add_row(name, plain(text))
    if told.get("purged_at"):
        facts.add_row("personal data", plain(f"purged on {local_time(told['purged_at'])}"))
    elif people is not None:
        holder = people["policyholder"]["sent"] or people["policyholder"]["returned"]
        facts.add_row("policyholder", plain(in_short(holder)) if holder else "-")
        for insured in people["insured"]:
            facts.add_row("insured", plain(in_short(insured)))
    return Group(Text.assemble("offer ", (plain(told["offer_id"]).plain, "bold")), facts)


def _how_it_goes_on(found: Found) -> list[tuple[str, str]]:
    """When it goes on, and what holds it."""
    told, lines = found.told, []
    if told["next_attempt_at"] and found.pauses:
        lines.append(("next attempt", "once calls are resumed"))
    elif told["next_attempt_at"]:
        lines.append(("next attempt", when(told["next_attempt_at"], found.now)))
    elif told["state"] == State.CONFIRMING and found.due_at:
        lines.append(("next attempt", f"under way; taken over after {local_time(found.due_at)} if its worker is gone"))
    for pause in found.pauses:
        whose = f"calls for {pause.partner_id}" if pause.partner_id else "all calls"
        lines.append(("paused", f"{whose}, since {local_time(pause.created_at)}, by {pause.by}: {pause.reason}"))
    lines += [("batch", _batch(batch)) for batch in found.batches]
    return lines


def _batch(batch: Row[Any]) -> str:
    stands = "under way" if batch.fed_at else "waits for its turn"
    state = "" if batch.state == BatchState.RUNNING else f" (the batch is {batch.state})"
    return f"{batch.id}, {stands}{state}, by {batch.by}" + (f": {batch.reason}" if batch.reason else "")


def _attempts(attempts: list[dict[str, Any]]) -> Table:
    table = _table("attempts", "#", "started", "took", "outcome", "answer", right=("#", "took"))
    for attempt in attempts:
        answer = attempt["code"] or attempt["http_status"] or "-"
        outcome = attempt["outcome"] or "under way"
        row = (attempt["number"], local_time(attempt["started_at"]), took(attempt["duration_ms"]), outcome, answer)
        table.add_row(*map(plain, row))
    return table


def _booking(booking: dict[str, Any]) -> Group:
    facts = _grid()
    facts.add_row("id", plain(booking["id"]))
    facts.add_row("status", plain(booking["status"] or "-"))
    facts.add_row("price", plain(f"{_or_dash(booking['price'])} {booking['currency'] or ''}".strip()))
    facts.add_row("reference", plain(booking["provider_reference"] or "-"))
    facts.add_row("created", local_time(booking["created_at"]))
    return Group(Text("booking", style="bold"), facts)


def _policies(policies: list[dict[str, Any]]) -> Table:
    table = _table("policies", "type", "code", "status", "price", "from", "to", right=("price",))
    for policy in policies:
        table.add_row(
            *(plain(policy[name] or "-") for name in ("policy_type", "policy_code", "status")),
            plain(_or_dash(policy["price"])),
            day(policy["policy_start_date"]),
            day(policy["policy_end_date"]),
        )
    return table


def _events(events: list[dict[str, Any]]) -> Table:
    table = _table("events", "#", "type", "written", "published", right=("#",))
    for event in events:
        published = local_time(event["published_at"]) if event["published_at"] else "not yet"
        table.add_row(plain(event["sequence"]), plain(event["type"]), local_time(event["time"]), published)
    return table


def revealed_screen(revealed: dict[str, Any]) -> Group:
    """What was sealed, in clear. revealed: persons and secrets of worker/reveal.py."""
    parts = [
        _opened("policyholder, as sent", revealed["policyholder"]["sent"]),
        _opened("policyholder, as XONE returned it", revealed["policyholder"]["returned"]),
    ]
    parts += [_opened("insured", insured) for insured in revealed["insured"]]
    coi = {f"coi {name}": link for name, link in revealed["links"]["coi"].items()}
    others = {name: link for name, link in revealed["links"].items() if name != "coi"}
    parts.append(_opened("links and token", {**coi, **others, "security_token": revealed["security_token"]}))
    parts.append(_opened("other fields of the booking", revealed["other_fields"]))
    for answer in revealed["answers"]:
        body, left = answer["body"][:MAX_ANSWER_SHOWN], len(answer["body"]) - MAX_ANSWER_SHOWN
        more = f"\n… {left} characters more, with --json" if left > 0 else ""
        title = Text(f"answer to attempt {answer['attempt']}, as kept", style="bold")
        parts.append(Group(title, plain(body + more, keep_lines=True)))
    return _spaced([part for part in parts if part is not None])


def _opened(title: str, fields: dict[str, Any] | None) -> Group | None:
    facts = _grid()
    for name, value in (fields or {}).items():
        if value not in (None, ""):
            facts.add_row(
                plain(name), plain(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
            )
    return Group(Text(title, style="bold"), facts) if facts.row_count else None


def _spaced(parts: list[Any]) -> Group:
    return Group(*(item for number, part in enumerate(parts) for item in (["", part] if number else [part])))


def _grid() -> Table:
    """Names and values in two columns."""
    grid = Table.grid(padding=(0, 2), pad_edge=False)
    grid.add_column(style="dim", min_width=12, max_width=20, overflow="fold")
    grid.add_column(overflow="fold")
    return grid


def _table(title: str, *columns: str, right: tuple[str, ...] = ()) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, header_style="dim")
    table.padding = (0, 2, 0, 0)
    for column in columns:
        table.add_column(column, overflow="fold", justify="right" if column in right else "left")
    return table


_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


def plain(value: Any, keep_lines: bool = False) -> Text:
    """A value as it is: no markup in it counts, and no control character in it reaches the terminal."""
    text = encodable(str(value))
    lines = text.splitlines() if keep_lines else [text]
    return Text("\n".join(_CONTROLS.sub("�", line) for line in lines))


def _or_dash(value: Any) -> str:
    return str(value) if value is not None else "-"


def when(value: datetime, since: datetime) -> str:
    """When it is due, and how far that is."""
    seconds = (value - since).total_seconds()
    unit, length = next((pair for pair in (("h", 3600), ("min", 60)) if abs(seconds) >= 2 * pair[1]), ("s", 1))
    lasts = f"{round(abs(seconds) / length)} {unit}"
    if seconds <= -OVERDUE:
        return f"{local_time(value)}, {lasts} ago: the workers are behind, or none runs"
    return f"{local_time(value)}, due: a worker takes it next" if seconds <= 0 else f"{local_time(value)}, in {lasts}"


def took(milliseconds: int | None) -> str:
    if milliseconds is None:
        return "-"
    return f"{milliseconds} ms" if milliseconds < 10_000 else f"{milliseconds / 1000:.1f} s"


def day(value: datetime | None) -> str:
    return value.strftime("%Y-%m-%d") if value is not None else "-"
