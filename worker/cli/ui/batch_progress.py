"""Following a batch: a progress bar on a terminal, a line now and then elsewhere. Leaving does not stop it."""

import time
from collections import deque
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text
from sqlalchemy import Engine

from models.states import BatchState
from tasks.operations import batches
from tasks.operations.pauses import paused_scope
from worker.cli.ui.paused import standing
from worker.cli.ui.tables import print_commands, print_text
from worker.formatting import duration
from worker.storage import database
from worker.storage.pause_cache import ALL

LOOK_EVERY = 0.5  # seconds
LINE_EVERY = 5.0  # seconds, where there is no terminal
WINDOW = 20.0  # seconds that the rate is taken over
STILL_FOR = 15.0  # seconds without any change that are worth a word


class Pace:
    """How fast items end: a second, over the last WINDOW seconds."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque()
        self._moved_at = 0.0

    def see(self, now: float, ended: int) -> None:
        """now: monotonic seconds; ended: items so far."""
        if not self._seen or self._seen[-1][1] != ended:
            self._moved_at = now
        self._seen.append((now, ended))
        while now - self._seen[0][0] > WINDOW:
            self._seen.popleft()

    @property
    def rate(self) -> float:
        (start, before), (end, after) = self._seen[0], self._seen[-1]
        return (after - before) / (end - start) if end > start else 0.0

    def is_still(self, now: float) -> bool:
        return now - self._moved_at > STILL_FOR


def follow(engine: Engine, batch_id: int, console: Console) -> bool:
    """Shows progress until the batch has ended. Returns whether all of it went well; False where it is left before."""
    try:
        batch = _on_terminal(engine, batch_id, console) if console.is_terminal else _in_lines(engine, batch_id, console)
    except KeyboardInterrupt:
        print_text(console, f"\nBatch {batch_id} goes on. To look again, and to stop it:")
        print_commands(
            console, f"confirm-offer batch show {batch_id} --follow", f"confirm-offer batch cancel {batch_id}"
        )
        return False
    print_text(console, f"Batch {batch_id} is {batch['state']}: {outcome(batch)}.")
    if batch["failed"] or batch["state"] != BatchState.DONE:
        print_text(console, "To see which, and why:")
        print_commands(console, f"confirm-offer batch show {batch_id}")
    return batch["state"] == BatchState.DONE and not batch["failed"]


def outcome(batch: dict[str, Any]) -> str:
    """What came of a batch so far, in words."""
    is_over = batch["state"] == BatchState.CANCELLED
    parts = [
        f"{batch['confirmed']:,} confirmed",
        f"{batch['failed']:,} failed again" if batch["failed"] else "",
        f"{batch['skipped']:,} skipped (no longer failed when their turn came)" if batch["skipped"] else "",
        f"{batch['running']:,} under way" if batch["running"] else "",
        f"{batch['waiting']:,} {'not tried' if is_over else 'waiting'}" if batch["waiting"] else "",
    ]
    return ", ".join(part for part in parts if part)


def _is_over(batch: dict[str, Any]) -> bool:
    return batch["state"] == BatchState.DONE or (batch["state"] == BatchState.CANCELLED and not batch["running"])


def look(engine: Engine, batch_id: int, pace: Pace) -> tuple[dict[str, Any], str]:
    """The batch, and why it does not move, if so."""
    with engine.connect() as connection:
        (batch,) = batches.overview(connection, batch_id)
        stand = standing(connection)
    now = time.monotonic()
    pace.see(now, batch["total"] - batch["waiting"] - batch["running"])
    if batch["state"] == BatchState.PAUSED:
        return batch, f"It is paused: confirm-offer batch resume {batch_id}"
    holds = [one for one in stand if one["partner_id"] is None or pace.is_still(now)]  # else it may go on without them
    if holds:
        paused = ", ".join(paused_scope(one["partner_id"] or ALL) for one in holds)
        return batch, f"Calls to XONE are paused for {paused}: {holds[0]['reason']}"
    if pace.is_still(now):
        return batch, "Nothing has ended for a while. What is under way may wait for a retry; or does no worker run?"
    return batch, ""


def _patiently_look(engine: Engine, batch_id: int, pace: Pace, last: dict[str, Any]) -> tuple[dict[str, Any], str]:
    try:
        return look(engine, batch_id, pace)
    except Exception as error:
        if not database.is_away(error):
            raise
        return last, "The database is away; waiting for it."


def _on_terminal(engine: Engine, batch_id: int, console: Console) -> dict[str, Any]:
    pace = Pace()
    batch, why = look(engine, batch_id, pace)
    with Live(_screen(batch, pace, why), console=console, refresh_per_second=4, transient=False) as live:
        while not _is_over(batch):
            time.sleep(LOOK_EVERY)
            batch, why = _patiently_look(engine, batch_id, pace, batch)
            live.update(_screen(batch, pace, why))
    return batch


def _screen(batch: dict[str, Any], pace: Pace, why: str) -> Group:
    ended = batch["total"] - batch["waiting"] - batch["running"]
    line = Table.grid(padding=(0, 2, 0, 0), expand=True)
    line.add_column(no_wrap=True)
    line.add_column(ratio=1)
    for _ in range(3):
        line.add_column(no_wrap=True, justify="right")
    bar = ProgressBar(total=max(batch["total"], 1), completed=ended)
    line.add_row(Text(f"batch {batch['id']}"), bar, Text(_share(batch)), Text(_rate(pace)), Text(_left(batch, pace)))
    counts = Text.assemble(
        (f"confirmed {batch['confirmed']:,}", "green"),
        "   ",
        (f"failed again {batch['failed']:,}", "red" if batch["failed"] else ""),
        f"   under way {batch['running']:,}   waiting {batch['waiting']:,}",
        f"   skipped {batch['skipped']:,}" if batch["skipped"] else "",
    )
    return Group(line, counts, *([Text(why, style="yellow")] if why else []))


def _in_lines(engine: Engine, batch_id: int, console: Console) -> dict[str, Any]:
    pace = Pace()
    batch, why = look(engine, batch_id, pace)
    told_at, told = 0.0, ""
    while not _is_over(batch):
        if time.monotonic() - told_at > LINE_EVERY:
            told_at = time.monotonic()
            print_text(console, _line(batch, pace))
            if why and why != told:
                print_text(console, why)
            told = why
        time.sleep(LOOK_EVERY)
        batch, why = _patiently_look(engine, batch_id, pace, batch)
    return batch


def _line(batch: dict[str, Any], pace: Pace) -> str:
    return (
        f"{time.strftime('%H:%M:%S')} {_share(batch):>5}  confirmed {batch['confirmed']:,}  failed {batch['failed']:,}"
        f"  waiting {batch['waiting'] + batch['running']:,}  {_rate(pace)}  {_left(batch, pace)}"
    )


def _share(batch: dict[str, Any]) -> str:
    ended = batch["total"] - batch["waiting"] - batch["running"]
    return f"{100 * ended // max(batch['total'], 1)} %"


def _rate(pace: Pace) -> str:
    return f"{pace.rate:.0f}/s" if pace.rate >= 10 or not pace.rate else f"{pace.rate:.1f}/s"


def _left(batch: dict[str, Any], pace: Pace) -> str:
    left = batch["waiting"] + batch["running"]
    if not left:
        return "done"
    return f"{duration(left / pace.rate)} left" if pace.rate else "-:-- left"
