"""The page at `/`: explains faults and switches, and shows the latest bookings."""

import html
import importlib.resources
import json
from string import Template
from typing import Any

from worker.sandbox.answers import Answer
from worker.sandbox.faults import FAULTS, SWITCHES
from worker.sandbox.upstream import Upstream


def page(upstream: Upstream, base_url: str) -> Answer:
    with upstream.lock:
        latest = list(upstream.bookings.values())[:-21:-1]
    faults = [
        (f"demo-1~{name.replace('NNN', '500')}", fault.description, "booked" if fault.books else "not booked")
        for name, fault in FAULTS.items()
    ]
    switches = [(name, json.dumps(getattr(upstream, name)), switch.description) for name, switch in SWITCHES.items()]
    bookings = [(booking.get("offer_id"), booking.get("id"), booking.get("status")) for booking in latest]
    template = importlib.resources.files("worker.sandbox").joinpath("page.html").read_text("utf-8")
    text = Template(template).substitute(
        base_url=html.escape(base_url),
        client_id=html.escape(upstream.client_id),
        client_secret=html.escape(upstream.client_secret),
        faults=table_rows(faults),
        switches=table_rows(switches),
        bookings=table_rows(bookings or [("none yet", "", "")]),
    )
    return Answer(200, text.encode(), {"Content-Type": "text/html; charset=utf-8"})


def table_rows(rows: list[tuple[Any, ...]]) -> str:
    """HTML table rows. The first cell is code, which one click selects."""
    cells = [[html.escape(str(cell)) for cell in row] for row in rows]
    return "\n".join(
        f"<tr><td><code>{first}</code></td>{''.join(f'<td>{cell}</td>' for cell in others)}</tr>"
        for first, *others in cells
    )
