"""``confirm-offer enqueue``: publishes jobs from a file."""

import os
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import BinaryIO

import click

from worker.cli.ui.console import (
    Failed,
    UsageError,
    by_option,
    handle_errors,
    json_option,
    out,
    print_json,
    print_note,
    print_wrapped,
    progress,
    reason_option,
)
from worker.cli.ui.optional_audit import optional_tally
from worker.formatting import pluralize, to_json
from worker.messaging.bulk_publish import Enqueued, Progress, Rejected, publish
from worker.messaging.job_file import BadLine, Checked, Source, check
from worker.messaging.publisher import Publisher
from worker.settings import BrokerSettings, read


@dataclass(frozen=True)
class ListedLine:
    """A bad line, as JSON shows it."""

    line: int
    code: str
    detail: str


@click.command(short_help="Publishes jobs from a file, JSON Lines or CSV.")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, allow_dash=True))
@click.option("--format", "form", type=click.Choice(["jsonl", "csv"]), help="Format of FILE; by default from its name.")
@click.option(
    "--rejected",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Where bad lines go; by default FILE.rejected, or nowhere for standard input.",
)
@reason_option
@by_option
@json_option
@handle_errors
def enqueue(file: str, form: str | None, rejected: Path | None, reason: str | None, as_json: bool) -> None:
    """Publishes jobs from FILE ("-" for standard input), JSON Lines or CSV. All are checked first.

    Bad lines are named, copied to FILE.rejected and not published; exit code 1 if there are any.

    If interrupted, the same command goes on after the last line that the broker has confirmed. FILE.progress keeps its
    number until all are published. A job that is published twice is harmless.

    \b
    JSON Lines has a job a line:
      {"partner_id": "P-100", "offer_id": "5c7e", "quotes": [{"id": "q1"}], …}
    A file with one JSON document, a job or a list of jobs, is read, too.
    CSV has a first line with the place of each value in the job, such as
      partner_id, offer_id, order_reference,
      quotes.0.id, quotes.0.insured.0.first_name,
      quotes.0.brightwrite_details.bw_variant_id,
      policyholder.first_name, .last_name, .country, .email, .phone, …
      metadata.channel
    Empty cells are left out, and so are quotes and insured without any value.

    Example: confirm-offer enqueue jobs.csv
    """
    url = read(BrokerSettings).url
    path = None if file == "-" else Path(file)
    if rejected is None and path is not None:
        rejected = path.with_name(path.name + ".rejected")
    if rejected is not None and path is not None and rejected.exists() and rejected.samefile(path):
        raise UsageError("--rejected names FILE itself; name another file")
    bad: list[ListedLine] = []
    with _opened(path) as opened:
        source = Source(opened, is_csv=form == "csv" or (form is None and file.lower().endswith(".csv")))
        if not source.size:
            print_note(f"{'standard input' if path is None else path} is empty: there is nothing to publish")
        with Rejected(rejected, lambda: source.header) as rejects:
            checked = _check(source, rejects, bad if as_json else None)
        kept = _kept_progress(path, checked.digest, url) if path is not None else None
        with optional_tally("enqueue", reason, bad=len(checked.bad)) as count:
            result, after = _publish(source, checked, kept, url, count)
    number_of_bad = len(checked.bad)
    if as_json:
        print_json(
            {
                "published": result.published,
                "bad": to_json(bad),
                "refused": result.refused,
                "resumed_after_line": after or None,
                "rejected_file": str(rejected) if number_of_bad and rejected is not None else None,
            }
        )
    else:
        where = f"; the bad lines are in {rejected}" if number_of_bad and rejected is not None else ""
        print_wrapped(out, f"{result.published:,} published, {number_of_bad + len(result.refused):,} not{where}")
    if result.refused:
        again = "" if kept is None else "; run the same command again to go on from there"
        raise Failed(
            f"the broker did not take {pluralize(len(result.refused), 'job')} from line {result.refused[0]} on: is the "
            f"jobs queue full, or not declared ('confirm-offer broker declare')?{again}"
        )
    if number_of_bad:
        sys.exit(1)


@contextmanager
def _opened(path: Path | None) -> Iterator[BinaryIO]:
    """The file. What can't be read twice, as standard input, is copied to a temporary file first."""
    if path is None and sys.stdin.isatty():
        print_note("reads jobs from the terminal, one a line; Ctrl-D ends them")
    with sys.stdin.buffer if path is None else path.open("rb") as given:
        if path is not None and stat.S_ISREG(os.fstat(given.fileno()).st_mode):
            yield given
            return
        with TemporaryFile() as copy:
            shutil.copyfileobj(given, copy)
            copy.flush()
            yield copy


def _check(source: Source, rejects: Rejected, bad: list[ListedLine] | None) -> Checked:
    """Checks all lines. bad: a list for the bad ones, which are otherwise printed."""

    def on_bad(line: BadLine) -> None:
        rejects.add(line.raw)
        if bad is not None:
            bad.append(ListedLine(line.number, line.code, line.detail))
        else:
            print_note(f"{source.unit} {line.number}: {line.code}: {line.detail}")

    with progress() as bar:
        task = bar.add_task("checking (bytes)", total=source.size)
        return check(source, on_bad, lambda size: bar.advance(task, size))


def _publish(
    source: Source, checked: Checked, kept: Progress | None, url: str, count: Callable[[int], None]
) -> tuple[Enqueued, int]:
    """Publishes the good lines. Returns the result, and the line after which it began (0 for the start)."""
    after, before = _start_after(kept, checked)
    with progress() as bar, Publisher(url) as publisher:
        task = bar.add_task("publishing", total=checked.good, completed=before)
        done_up_to = after

        def confirmed(line: int, jobs: int) -> None:
            nonlocal done_up_to
            if kept is not None:
                kept.advance(line, jobs)
            done_up_to = line
            count(jobs)
            bar.advance(task, jobs)

        try:
            result = publish(source, checked, after, publisher, confirmed)
        except KeyboardInterrupt:
            again = "" if kept is None else "; the same command goes on from there"
            raise Failed(f"interrupted; the broker has all good jobs up to line {done_up_to}{again}") from None
    if kept is not None and not result.refused:
        kept.end()
    return result, after


def _kept_progress(path: Path, digest: str, url: str) -> Progress | None:
    """The file that keeps the progress; None if it can't be written, as in a read-only folder."""
    kept = Progress(path.with_name(path.name + ".progress"), digest, url)
    try:
        kept.ensure_writable()
    except OSError as error:
        print_note(f"{kept.path} can't be written ({error.strerror}): interrupted, this begins anew, which is harmless")
        return None
    return kept


def _start_after(kept: Progress | None, checked: Checked) -> tuple[int, int]:
    """The last line that the broker has from an earlier run, and how many jobs."""
    if kept is None:
        return 0, 0
    begin = kept.begin()
    if begin is None:
        print_note(f"{kept.path} is of another content or broker: this begins with the first line, which is harmless")
    elif begin[0]:
        print_note(f"goes on after line {begin[0]}: the broker has {begin[1]:,} of {checked.good:,} jobs from before")
    return begin or (0, 0)
