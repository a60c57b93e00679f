"""``confirm-offer dead-letters``: lists, replays or drops what could not be accepted as a job."""

import base64
import json
import sys
import textwrap
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import click
from rich.progress import Progress

from models.job import DEAD_LETTER_CODES, JobRejected, read_job
from tasks.operations.audit import Tally
from worker.cli.ui.console import (
    Failed,
    ask,
    by_option,
    handle_errors,
    json_option,
    out,
    print_json,
    print_note,
    print_result,
    progress,
    reason_option,
)
from worker.cli.ui.number_param import COUNT, COUNT_OR_ZERO
from worker.cli.ui.optional_audit import optional_tally
from worker.formatting import OMIT_IF_NONE, local_time, pluralize, printable, to_json
from worker.messaging import broker
from worker.messaging.batching import in_batches
from worker.messaging.dead_letter_queue import (
    DeadLetter,
    DeadLetterQueue,
    job_message,
    replay,
    select_letters,
)
from worker.messaging.masking import for_editor, ids_of, masked
from worker.messaging.publisher import Publisher
from worker.settings import BrokerSettings, DatabaseSettings, read
from worker.storage import database

MAX_SHOWN = 50  # letters, without --limit
MAX_DETAILS = 10  # of a code
MAX_EDITED = 100  # letters that one command edits, without --limit
MAX_BODY_LINES = 6  # on the screen; --json has all
NEXT_STEPS = (
    "'dead-letters replay' puts them back on the jobs queue, with --edit after a correction; 'drop' removes them."
)


@click.group("dead-letters")
def dead_letters() -> None:
    """What could not be accepted as a job."""


code_option = click.option("--code", type=click.Choice(DEAD_LETTER_CODES), help="Only those of this code.")
yes_option = click.option("--yes", is_flag=True, help="Do not ask.")
limit_option = click.option("--limit", type=COUNT, help="At most so many, the first come first.")


@dataclass(frozen=True)
class ListedLetter:
    """A dead letter, as JSON shows it.

    partner_id, offer_id, order_reference: if the body has them in a valid form; size: bytes; body: the masked
    structure, or with --reveal the text, None if it can't be read; body_base64: with --reveal, if it is not UTF-8.
    """

    at: datetime | None
    code: str
    detail: str
    partner_id: str | None
    offer_id: str | None
    order_reference: str | None
    size: int
    body: Any
    body_base64: str | None = field(default=None, metadata=OMIT_IF_NONE)


@dataclass(frozen=True)
class DetailCount:
    """How many dead letters of a code have a detail."""

    detail: str
    count: int


@dataclass(frozen=True)
class LetterGroup:
    """How many dead letters have a code, listed or not, and when the first and the last came.

    details: the most frequent ones, at most MAX_DETAILS.
    """

    code: str
    count: int
    first_at: datetime | None
    last_at: datetime | None
    details: list[DetailCount] = field(default_factory=list)


@dataclass(frozen=True)
class Listing:
    """What ``dead-letters list`` shows. total: of all groups; letters: by group, at most as many as were asked for."""

    total: int
    groups: list[LetterGroup]
    letters: list[ListedLetter]


@dead_letters.command("list")
@code_option
@click.option("--limit", type=COUNT_OR_ZERO, default=MAX_SHOWN, show_default=True, help="Show at most so many.")
@click.option("--reveal", is_flag=True, help="The bodies in clear, personal data included. It is audited.")
@json_option
@handle_errors
def list_letters(code: str | None, limit: int, reveal: bool, as_json: bool) -> None:
    """Lists the dead letters by code. All are counted; they stay in the queue.

    Bodies show their structure with the values replaced. Ids are shown if they have a valid form.

    \b
    Codes: invalid-json, invalid-job, too-large, conflicting-job, and poison for
    those that this program or RabbitMQ gave up.

    Example: confirm-offer dead-letters list --code invalid-job
    """
    with (
        optional_tally("dead-letters list --reveal", wanted=reveal, code=code) as count,
        DeadLetterQueue(read(BrokerSettings).url) as queue,
        progress() as bar,
    ):
        listing = _list(queue, code, limit, reveal, bar)
        count(len(listing.letters))
    if as_json:
        print_json(to_json(listing))
    else:
        _print(listing, code)
        if queue.held_count < queue.message_count:
            click.echo(f"\nThe first {queue.held_count:,} of {queue.message_count:,} letters were looked at.")


def _list(queue: DeadLetterQueue, code: str | None, limit: int, reveal: bool, bar: Progress) -> Listing:
    """Counts all letters, or those of one code, and lists the first ones. The largest group comes first."""
    groups: dict[str, LetterGroup] = {}
    details: dict[str, Counter[str]] = defaultdict(Counter)
    letters: list[ListedLetter] = []
    task = bar.add_task("reading", total=queue.held_count)
    for letter in queue:
        bar.advance(task)
        if code not in (None, letter.code):
            continue
        group = groups.get(letter.code, LetterGroup(letter.code, 0, letter.at, letter.at))
        groups[letter.code] = replace(group, count=group.count + 1, last_at=letter.at or group.last_at)
        details[letter.code][letter.detail] += 1
        if len(letters) < limit:
            letters.append(_listed(letter, reveal))
    by_size = sorted(
        (replace(group, details=_most_common(details[group.code])) for group in groups.values()),
        key=lambda group: -group.count,
    )
    order = {group.code: position for position, group in enumerate(by_size)}
    in_order = sorted(letters, key=lambda letter: order[letter.code])
    return Listing(sum(group.count for group in by_size), by_size, in_order)


def _most_common(details: Counter[str]) -> list[DetailCount]:
    return [DetailCount(detail, count) for detail, count in details.most_common(MAX_DETAILS)]


def _listed(letter: DeadLetter, reveal: bool) -> ListedLetter:
    listed = ListedLetter(
        at=letter.at,
        code=letter.code,
        detail=letter.detail,
        **asdict(ids_of(letter.body)),
        size=len(letter.body),
        body=None if reveal else masked(letter.body),
    )
    if not reveal:
        return listed
    try:
        return replace(listed, body=letter.body.decode())
    except UnicodeDecodeError:
        return replace(listed, body_base64=base64.b64encode(letter.body).decode())


def _print(listing: Listing, code: str | None) -> None:
    if not listing.groups:
        click.echo(_none(code))
        return
    for position, group in enumerate(listing.groups):
        click.echo(("\n" if position else "") + f"{group.code}: {pluralize(group.count, 'letter')}, {_span(group)}")
        for detail in group.details if group.details[0].count < group.count else []:
            click.echo(_wrapped(f"{detail.count:,} × {printable(detail.detail)}", "  "))
        letters = [letter for letter in listing.letters if letter.code == group.code]
        for letter in letters:
            _print_letter(letter)
        if group.count > len(letters):
            click.echo(f"  and {group.count - len(letters):,} more; --limit shows more of them")
    click.echo("\n" + _wrapped(NEXT_STEPS, ""))


def _none(code: str | None) -> str:
    return "no dead letters" + (f" of code {code}" if code else "")


def _span(group: LetterGroup) -> str:
    first, last = local_time(group.first_at), local_time(group.last_at)
    return first if first == last else f"{first} to {last}"


def _print_letter(letter: ListedLetter) -> None:
    ids = " ".join(filter(None, (letter.partner_id, letter.offer_id))) or "no ids that can be read"
    click.echo(_wrapped(f"{local_time(letter.at)}  {printable(ids)}  {letter.size:,} bytes", "  "))
    click.echo(_wrapped(letter.detail, "    "))
    if letter.body_base64 is not None:
        click.echo("    not UTF-8; --json prints it in base64")
    elif isinstance(letter.body, str):
        click.echo(_wrapped(printable(letter.body.replace("\n", " ")), "    "))
    elif letter.body is not None:
        structure = printable(json.dumps(letter.body, ensure_ascii=False))
        lines = _wrapped(structure[: (MAX_BODY_LINES + 1) * out.width], "    ").splitlines()
        more = ["    … --json prints all of it"] if len(lines) > MAX_BODY_LINES else []
        click.echo("\n".join([*lines[:MAX_BODY_LINES], *more]))


def _wrapped(text: str, indent: str) -> str:
    return textwrap.fill(text, out.width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)


@dead_letters.command("replay", short_help="Puts dead letters back on the jobs queue.")
@code_option
@limit_option
@click.option("--edit", is_flag=True, help=f"Open each in $EDITOR first: at most {MAX_EDITED}, or --limit.")
@yes_option
@reason_option
@by_option
@json_option
@handle_errors
def replay_letters(
    code: str | None, limit: int | None, edit: bool, yes: bool, reason: str | None, as_json: bool
) -> None:
    """Puts dead letters back on the jobs queue, their bodies unchanged or edited.

    A letter is removed when the broker has confirmed its copy, so nothing is lost if the command is interrupted. A job
    that fails again becomes a new letter; this command does not replay it a second time.

    With --edit a body must be a valid job when the editor closes. If the file is emptied, the letter stays as it is.

    Example: confirm-offer dead-letters replay --code conflicting-job --limit 10
    """
    limit = limit or MAX_EDITED if edit else limit
    url, engine = read(BrokerSettings).url, database.connect(read(DatabaseSettings).url)
    count = _count(url, code, limit)
    if not count:
        return _print_moved("replayed", 0, 0, as_json, code)
    ask(f"Put {pluralize(count, 'letter')} back on the jobs queue?", yes)
    details: dict[str, Any] = {"code": code, "limit": limit, "edit": edit}
    with (
        Tally(engine, "dead-letters replay", reason, **details) as tally,
        DeadLetterQueue(url) as queue,
        progress(shown=not edit) as bar,  # it would draw over the editor
        _Moved("replayed", count, tally, bar) as moved,
    ):
        selected = select_letters(queue, code, count)
        if edit:
            letters = list(selected)
            queue.stop_consuming()  # a person may take long; until then nothing is expected from the broker
            refused = _edit_and_replay(queue, letters, url, moved, may_ask=not yes and sys.stdin.isatty())
        else:
            refused = _replay(queue, selected, url, moved)
    _print_moved("replayed", moved.count, count - moved.count, as_json, code)
    if refused:
        raise Failed(
            f"the broker did not take {pluralize(refused, 'copy', 'copies')}, so those stay dead letters; "
            "is the jobs queue full or not declared, or are they too large for it? Then try again"
        )
    if moved.count < count:
        sys.exit(1)
    return None


class _Moved:
    """Counts the letters that were moved, for the audit and the bar, and says how many there were on Ctrl-C."""

    def __init__(self, verb: str, total: int, tally: Tally, bar: Progress) -> None:
        self.count = 0
        self._verb = verb
        self._tally = tally
        self._bar = bar
        self._task = bar.add_task(verb, total=total)

    def add(self, number: int) -> None:
        self.count += number
        self._tally.add(number)
        self._bar.advance(self._task, number)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is KeyboardInterrupt:
            raise Failed(f"interrupted: {self.count:,} {self._verb}, the others stay dead letters") from None


def _replay(queue: DeadLetterQueue, letters: Iterator[DeadLetter], url: str, moved: _Moved) -> int:
    """Replays in batches. Returns how many copies the broker refused; they stop no other."""
    refused = 0
    with Publisher(url) as publisher:
        for batch in in_batches(letters):
            taken = replay(queue, batch, publisher)
            moved.add(taken)
            refused += len(batch) - taken
    return refused


def _edit_and_replay(queue: DeadLetterQueue, letters: list[DeadLetter], url: str, moved: _Moved, may_ask: bool) -> int:
    """Replays one by one, each after its edit. Returns how many copies the broker refused."""
    refused = 0
    with TemporaryDirectory(prefix="dead-letters-") as folder:  # readable for its owner only
        for number, letter in enumerate(letters, start=1):
            name = f"letter {number} of {len(letters)} ({letter.code}: {letter.detail})"
            body = _edited(letter, name, Path(folder) / f"letter-{number}.json", may_ask)
            if body is None:
                continue
            with _explaining_return():
                queue.ensure_still_held()
            with Publisher(url) as publisher:
                taken = len(publisher.publish([job_message(letter, body)]))
            if taken:
                queue.ack([letter])
            moved.add(taken)
            refused += 1 - taken
    return refused


@contextmanager
def _explaining_return() -> Iterator[None]:
    """Says what happened if the broker has taken the letters back."""
    try:
        yield
    except Exception as error:
        if not broker.is_away(error):
            raise
        raise Failed(
            "the broker took the letters back while one was edited (it waits half an hour), so this edit was not "
            "published; run the same command again"
        ) from None


def _edited(letter: DeadLetter, name: str, file: Path, may_ask: bool) -> bytes | None:
    """The body after the edit, a valid job; the letter's own if nothing was changed; None to leave the letter."""
    before = for_editor(letter.body)
    file.write_bytes(before)
    try:
        while True:
            click.echo(_wrapped(name, ""), err=True)
            _open_editor(file)
            after = file.read_bytes()
            if not after.strip():
                click.echo("  left as it is", err=True)
                return None
            body = letter.body if after == before else after.strip()
            try:
                read_job(body)
            except JobRejected as rejected:
                print_note(f"  not a valid job yet: {rejected.code}: {rejected.detail}")
                if not may_ask or not click.confirm("  Edit it again?", default=True, err=True):
                    click.echo("  left as it is", err=True)
                    return None
            else:
                return body
    finally:
        with suppress(FileNotFoundError):
            file.unlink()


def _open_editor(file: Path) -> None:
    try:
        click.edit(filename=str(file))
    except click.ClickException as error:
        raise Failed(f"{error.message}; letters that were not replayed stay where they are") from None


@dead_letters.command("drop")
@code_option
@limit_option
@click.option("--reason", required=True, help="Why, for the audit.")
@by_option
@yes_option
@json_option
@handle_errors
def drop_letters(code: str | None, limit: int | None, reason: str, yes: bool, as_json: bool) -> None:
    """Deletes dead letters. No copy is kept: list them with --reveal --json first if you want one.

    Example: confirm-offer dead-letters drop --code invalid-json --reason "load test of a partner"
    """
    if not reason.strip():
        raise click.UsageError("--reason is empty")
    url, engine = read(BrokerSettings).url, database.connect(read(DatabaseSettings).url)
    count = _count(url, code, limit)
    if not count:
        return _print_moved("dropped", 0, 0, as_json, code)
    ask(f"Delete {pluralize(count, 'letter')}? No copy is kept.", yes)
    with (
        Tally(engine, "dead-letters drop", reason, code=code, limit=limit) as tally,
        DeadLetterQueue(url) as queue,
        progress() as bar,
        _Moved("dropped", count, tally, bar) as moved,
    ):
        for batch in in_batches(select_letters(queue, code, count)):
            queue.ack(batch)
            moved.add(len(batch))
    _print_moved("dropped", moved.count, count - moved.count, as_json, code)
    if moved.count < count:
        sys.exit(1)
    return None


def _count(url: str, code: str | None, limit: int | None) -> int:
    """How many letters the options select. To read their codes they are taken from the queue and given back."""
    with DeadLetterQueue(url) as queue:
        count = queue.held_count if code is None else sum(1 for _ in select_letters(queue, code, None))
    return min(count, limit or count)


def _print_moved(verb: str, count: int, left: int, as_json: bool, code: str | None) -> None:
    if not count and not left:
        text = _none(code)
    else:
        text = f"{pluralize(count, 'dead letter')} {verb}" + (f", {left:,} left" if left else "")
    print_result(as_json, text, **{verb: count, "left": left})
