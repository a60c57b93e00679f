"""Following a batch: a progress bar on a terminal, a line now and then elsewhere. Leaving does not stop the batch."""

import time
from collections import deque

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text
from sqlalchemy import Engine

from models.states import BatchState
from tasks.operations import batches, pauses, workers
from tasks.operations.batches import BatchProgress
from tasks.operations.pauses import paused_scope
from tasks.operations.workers import StoppedCalls
from worker.cli.ui.tables import print_commands, print_text
from worker.formatting import duration, printable_lines
from worker.storage import database

READ_EVERY = 0.5  # seconds
LINE_EVERY = 5.0  # seconds, if there is no terminal
WINDOW = 20.0  # seconds that the rate is an average of
STILL_AFTER = 15.0  # seconds without any change, after which the screen says why


class Pace:
    """How many items end in a second, averaged over the last WINDOW seconds."""

    def __init__(self) -> None:
        self._records: deque[tuple[float, int]] = deque()
        self._changed_at = 0.0

    def record(self, now: float, ended: int) -> None:
        """now: monotonic seconds; ended: items so far."""
        if not self._records or self._records[-1][1] != ended:
            self._changed_at = now
        self._records.append((now, ended))
        while now - self._records[0][0] > WINDOW:
            self._records.popleft()

    @property
    def rate(self) -> float:
        """Items a second."""
        (start, before), (end, after) = self._records[0], self._records[-1]
        return (after - before) / (end - start) if end > start else 0.0

    def is_still(self, now: float) -> bool:
        """Whether no item has ended for STILL_AFTER seconds. now: monotonic seconds."""
        return now - self._changed_at > STILL_AFTER


def follow(engine: Engine, batch_id: int, console: Console) -> bool:
    """Shows progress until the batch has ended. Returns whether all items succeeded; False after Ctrl-C."""
    try:
        batch = _on_terminal(engine, batch_id, console) if console.is_terminal else _in_lines(engine, batch_id, console)
    except KeyboardInterrupt:
        print_text(console, f"\nBatch {batch_id} goes on. To look again, and to stop it:")
        print_commands(
            console, f"confirm-offer batch show {batch_id} --follow", f"confirm-offer batch cancel {batch_id}"
        )
        return False
    has_succeeded = batch.state == BatchState.DONE and not batch.failed
    print_text(console, f"Batch {batch_id} is {batch.state}: {outcome(batch)}.")
    if not has_succeeded:
        print_text(console, "To see which, and why:")
        print_commands(console, f"confirm-offer batch show {batch_id}")
    return has_succeeded


def outcome(batch: BatchProgress) -> str:
    """How many items of a batch are where, in words."""
    is_cancelled = batch.state == BatchState.CANCELLED
    parts = [
        f"{batch.confirmed:,} confirmed",
        f"{batch.failed:,} failed again" if batch.failed else "",
        f"{batch.skipped:,} skipped (no longer failed when their turn came)" if batch.skipped else "",
        f"{batch.running:,} under way" if batch.running else "",
        f"{batch.waiting:,} {'not tried' if is_cancelled else 'waiting'}" if batch.waiting else "",
    ]
    return ", ".join(part for part in parts if part)


def _has_ended(batch: BatchProgress) -> bool:
    return batch.state == BatchState.DONE or (batch.state == BatchState.CANCELLED and not batch.running)


def read_progress(engine: Engine, batch_id: int, pace: Pace) -> tuple[BatchProgress, str]:
    """The progress of a batch that exists, and why it does not move, or an empty text if it does."""
    with engine.connect() as connection:
        batch = batches.progress(connection, batch_id)
        active_pauses = pauses.active(connection)
        running = workers.running(connection)
    assert batch is not None
    now = time.monotonic()
    pace.record(now, batch.ended)
    if batch.state == BatchState.PAUSED:
        return batch, f"It is paused: confirm-offer batch resume {batch_id}"
    # A pause of one partner is the reason only if nothing moves: other partners' items may go on.
    blocking = [pause for pause in active_pauses if pause.partner_id is None or pace.is_still(now)]
    if blocking:
        scopes = ", ".join(paused_scope(pause.partner_id) for pause in blocking)
        return batch, f"Calls to XONE are paused for {scopes}: {blocking[0].reason}"
    if not running:
        return batch, "No worker runs, or none has noted anything in this database for 30 s."
    stopped = [stop for stop in workers.stopped_calls(running) if stop.is_total or pace.is_still(now)]
    if stopped:
        return batch, "\n".join(map(_sentence, stopped))
    if pace.is_still(now):
        return (
            batch,
            f"Nothing has ended for a while; {workers.summary(running)}. Some may wait for a retry.",
        )
    return batch, ""


def _sentence(stop: StoppedCalls) -> str:
    text = str(stop)
    return f"{text[0].upper()}{text[1:]}."


def _read_through_outage(engine: Engine, batch_id: int, pace: Pace, last: BatchProgress) -> tuple[BatchProgress, str]:
    try:
        return read_progress(engine, batch_id, pace)
    except Exception as error:
        if not database.is_away(error):
            raise
        return last, "The database can't be reached; waiting for it."


def _on_terminal(engine: Engine, batch_id: int, console: Console) -> BatchProgress:
    pace = Pace()
    batch, why = read_progress(engine, batch_id, pace)
    with Live(_screen(batch, pace, why), console=console, refresh_per_second=4, transient=False) as live:
        while not _has_ended(batch):
            time.sleep(READ_EVERY)
            batch, why = _read_through_outage(engine, batch_id, pace, batch)
            live.update(_screen(batch, pace, why))
    return batch


def _screen(batch: BatchProgress, pace: Pace, why: str) -> Group:
    line = Table.grid(padding=(0, 2, 0, 0), expand=True)
    line.add_column(no_wrap=True)
    line.add_column(ratio=1)
    for _ in range(3):
        line.add_column(no_wrap=True, justify="right")
    bar = ProgressBar(total=max(batch.total, 1), completed=batch.ended)
    line.add_row(Text(f"batch {batch.id}"), bar, Text(_share(batch)), Text(_rate(pace)), Text(_left(batch, pace)))
    counts = Text.assemble(
        (f"confirmed {batch.confirmed:,}", "green"),
        "   ",
        (f"failed again {batch.failed:,}", "red" if batch.failed else ""),
        f"   under way {batch.running:,}   waiting {batch.waiting:,}",
        f"   skipped {batch.skipped:,}" if batch.skipped else "",
    )
    return Group(line, counts, *([Text(printable_lines(why), style="yellow")] if why else []))


def _in_lines(engine: Engine, batch_id: int, console: Console) -> BatchProgress:
    pace = Pace()
    batch, why = read_progress(engine, batch_id, pace)
    printed_at, printed_why = 0.0, ""
    while not _has_ended(batch):
        if time.monotonic() - printed_at > LINE_EVERY:
            printed_at = time.monotonic()
            print_text(console, _line(batch, pace))
            if why and why != printed_why:
                print_text(console, why)
            printed_why = why
        time.sleep(READ_EVERY)
        batch, why = _read_through_outage(engine, batch_id, pace, batch)
    return batch


def _line(batch: BatchProgress, pace: Pace) -> str:
    return (
        f"{time.strftime('%H:%M:%S')} {_share(batch):>5}  confirmed {batch.confirmed:,}  failed {batch.failed:,}"
        f"  waiting {batch.waiting + batch.running:,}  {_rate(pace)}  {_left(batch, pace)}"
    )


def _share(batch: BatchProgress) -> str:
    return f"{100 * batch.ended // max(batch.total, 1)} %"


def _rate(pace: Pace) -> str:
    return f"{pace.rate:.0f}/s" if pace.rate >= 10 or not pace.rate else f"{pace.rate:.1f}/s"


def _left(batch: BatchProgress, pace: Pace) -> str:
    left = batch.waiting + batch.running
    if not left:
        return "done"
    return f"{duration(left / pace.rate)} left" if pace.rate else "-:-- left"
