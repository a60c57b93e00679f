"""``dead-letters``: what could not be accepted as a job, listed, replayed or dropped."""

import base64
import json
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import click
from rich.progress import Progress

from models.exact_json import moment
from models.job import DEAD_LETTER_CODES, JobRejected, read_job
from tasks.operations.audit import Tally
from worker.cli.ui.console import (
    Failed,
    ask,
    handle_errors,
    json_option,
    out,
    print_json,
    print_note,
    print_result,
    progress,
    reason_option,
)
from worker.cli.ui.optional_audit import recording
from worker.formatting import local_time, pluralize, printable
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

SHOWN = 50  # letters, where no --limit is given
EDITED = 100  # letters that are edited in one go, where no --limit is given
MASKED_LINES = 6  # of a body on the screen; --json has all of it


@click.group("dead-letters")
def dead_letters() -> None:
    """What could not be accepted as a job."""


code_option = click.option("--code", type=click.Choice(DEAD_LETTER_CODES), help="Only those of this code.")
yes_option = click.option("--yes", is_flag=True, help="Do not ask.")
limit_option = click.option("--limit", type=click.IntRange(min=1), help="At most so many, the first come first.")


@dataclass
class Group:
    """The letters of one code."""

    count: int
    first_at: datetime | None
    last_at: datetime | None
    letters: list[dict[str, Any]]


@dead_letters.command("list")
@code_option
@click.option("--limit", type=click.IntRange(min=0), default=SHOWN, show_default=True, help="Show at most so many.")
@click.option("--reveal", is_flag=True, help="The bodies in clear, personal data included. It is audited.")
@json_option
@handle_errors
def list_letters(code: str | None, limit: int, reveal: bool, as_json: bool) -> None:
    """Lists the dead letters by code. All are counted; they stay where they are.

    Bodies show their structure with the values replaced; ids are shown where they have the form of one.

    \b
    Codes: invalid-json, invalid-job, too-large, conflicting-job, and poison for
    those that this program or RabbitMQ gave up.

    Example: confirm-offer dead-letters list --code invalid-job
    """
    with (
        recording("dead-letters list --reveal", wanted=reveal, code=code) as record,
        DeadLetterQueue(read(BrokerSettings).url) as letters,
        progress() as bar,
    ):
        groups = _grouped(letters, code, limit, reveal, bar)
        record(sum(len(group.letters) for group in groups.values()))
    if as_json:
        print_json(
            {
                "total": sum(group.count for group in groups.values()),
                "groups": [
                    {
                        "code": name,
                        "count": group.count,
                        "first_at": _utc(group.first_at),
                        "last_at": _utc(group.last_at),
                    }
                    for name, group in groups.items()
                ],
                "letters": [
                    {**letter, "at": _utc(letter["at"])} for group in groups.values() for letter in group.letters
                ],
            }
        )
    else:
        _print(groups, code)
        if letters.held_count < letters.message_count:
            click.echo(f"\nThe first {letters.held_count:,} of {letters.message_count:,} letters were looked at.")


def _grouped(letters: DeadLetterQueue, code: str | None, limit: int, reveal: bool, bar: Progress) -> dict[str, Group]:
    """The groups, the largest first. Of all that are counted, only so many are kept."""
    groups: dict[str, Group] = {}
    kept = 0
    task = bar.add_task("reading", total=letters.held_count)
    for letter in letters:
        bar.advance(task)
        if code not in (None, letter.code):
            continue
        group = groups.setdefault(letter.code, Group(0, letter.at, letter.at, []))
        group.count += 1
        group.last_at = letter.at or group.last_at
        if kept < limit:
            kept += 1
            group.letters.append(_row(letter, reveal))
    return dict(sorted(groups.items(), key=lambda item: -item[1].count))


def _row(letter: DeadLetter, reveal: bool) -> dict[str, Any]:
    row = {
        "at": letter.at,
        "code": letter.code,
        "detail": letter.detail,
        **asdict(ids_of(letter.body)),
        "size": len(letter.body),
    }
    if not reveal:
        return {**row, "body": masked(letter.body)}
    try:
        return {**row, "body": letter.body.decode()}
    except UnicodeDecodeError:
        return {**row, "body": None, "body_base64": base64.b64encode(letter.body).decode()}


def _utc(at: datetime | None) -> str | None:
    return moment(at) if at is not None else None


def _print(groups: dict[str, Group], code: str | None) -> None:
    if not groups:
        click.echo("no dead letters" + (f" of code {code}" if code else ""))
        return
    for position, (name, group) in enumerate(groups.items()):
        click.echo(("\n" if position else "") + f"{name}: {pluralize(group.count, 'letter')}, {_span(group)}")
        for letter in group.letters:
            _print_letter(letter)
        if group.count > len(group.letters):
            click.echo(f"  and {group.count - len(group.letters):,} more; --limit shows more of them")
    click.echo("\n" + _wrapped(_NEXT, ""))


_NEXT = "'dead-letters replay' puts them back on the jobs queue, with --edit after a correction; 'drop' removes them."


def _span(group: Group) -> str:
    first, last = local_time(group.first_at), local_time(group.last_at)
    return first if first == last else f"{first} to {last}"


def _print_letter(letter: dict[str, Any]) -> None:
    who = " ".join(filter(None, (letter["partner_id"], letter["offer_id"]))) or "no ids that can be read"
    click.echo(_wrapped(f"{local_time(letter['at'])}  {printable(who)}  {letter['size']:,} bytes", "  "))
    click.echo(_wrapped(letter["detail"], "    "))
    if "body_base64" in letter:
        click.echo("    not UTF-8; --json prints it in base64")
    elif isinstance(letter["body"], str):
        click.echo(_wrapped(printable(letter["body"].replace("\n", " ")), "    "))
    elif letter["body"] is not None:
        structure = printable(json.dumps(letter["body"], ensure_ascii=False))
        lines = _wrapped(structure[: (MASKED_LINES + 1) * out.width], "    ").splitlines()
        more = ["    … --json prints all of it"] if len(lines) > MASKED_LINES else []
        click.echo("\n".join([*lines[:MASKED_LINES], *more]))


def _wrapped(text: str, indent: str) -> str:
    return textwrap.fill(text, out.width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)


@dead_letters.command("replay", short_help="Puts dead letters back on the jobs queue.")
@code_option
@limit_option
@click.option("--edit", is_flag=True, help=f"Open each in $EDITOR first, {EDITED} in one go unless --limit says else.")
@yes_option
@reason_option
@json_option
@handle_errors
def replay_letters(
    code: str | None, limit: int | None, edit: bool, yes: bool, reason: str | None, as_json: bool
) -> None:
    """Puts dead letters back on the jobs queue, their bodies unchanged or edited.

    A letter is removed when the broker has confirmed its copy: interrupted, nothing is lost. One that fails again
    comes back as a new letter and is not replayed a second time.

    With --edit a body must be a valid job when the editor closes. An empty file leaves the letter where it is.

    Example: confirm-offer dead-letters replay --code conflicting-job --limit 10
    """
    limit = limit or EDITED if edit else limit
    url, engine = read(BrokerSettings).url, database.connect(read(DatabaseSettings).url)
    count = _count(url, code, limit)
    if not count:
        return _tell_moved("replayed", 0, 0, as_json, code)
    ask(f"Put {pluralize(count, 'letter')} back on the jobs queue?", yes)
    details: dict[str, Any] = {"code": code, "limit": limit, "edit": edit}
    with (
        Tally(engine, "dead-letters replay", reason, **details) as tally,
        DeadLetterQueue(url) as letters,
        progress(shown=not edit) as bar,  # it would draw over the editor
        _Moved("replayed", count, tally, bar) as moved,
    ):
        meant = select_letters(letters, code, count)
        if edit:
            letters_held = list(meant)
            letters.stop_consuming()  # nothing waits for the broker while a person thinks
            refused = _edit_and_replay(letters, letters_held, url, moved, may_ask=not yes and sys.stdin.isatty())
        else:
            refused = _replay(letters, meant, url, moved)
    _tell_moved("replayed", moved.count, count - moved.count, as_json, code)
    if refused:
        raise Failed(
            f"the broker did not take {pluralize(refused, 'copy', 'copies')}, so those stay dead letters; "
            "is the jobs queue full, or not declared? Then try again"
        )
    if moved.count < count:
        sys.exit(1)
    return None


class _Moved:
    """How many letters have been moved: counted for the audit and the bar, and told where it is interrupted."""

    def __init__(self, what: str, total: int, tally: Tally, bar: Progress) -> None:
        self.count = 0
        self._what = what
        self._tally = tally
        self._bar = bar
        self._task = bar.add_task(what, total=total)

    def add(self, number: int) -> None:
        self.count += number
        self._tally.add(number)
        self._bar.advance(self._task, number)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is KeyboardInterrupt:
            raise Failed(f"interrupted: {self.count:,} {self._what}, the others stay dead letters") from None


def _replay(letters: DeadLetterQueue, meant: Iterator[DeadLetter], url: str, moved: _Moved) -> int:
    """Replays batch by batch. Returns how many copies the broker refused, which ends it."""
    with Publisher(url) as publisher:
        for batch in in_batches(meant):
            taken = replay(letters, batch, publisher)
            moved.add(taken)
            if taken < len(batch):
                return len(batch) - taken
    return 0


def _edit_and_replay(
    letters: DeadLetterQueue, letters_held: list[DeadLetter], url: str, moved: _Moved, may_ask: bool
) -> int:
    """Replays one by one, each after its edit. Returns how many copies the broker refused."""
    refused = 0
    with TemporaryDirectory(prefix="dead-letters-") as folder:  # readable for its owner only
        for number, letter in enumerate(letters_held, start=1):
            name = f"letter {number} of {len(letters_held)} ({letter.code}: {letter.detail})"
            body = _edited(letter, name, Path(folder) / f"letter-{number}.json", may_ask)
            if body is None:
                continue
            with _held_still():
                letters.ensure_still_held()
            with Publisher(url) as publisher:
                taken = len(publisher.publish([job_message(letter, body)]))
            if taken:
                letters.ack([letter])
            moved.add(taken)
            refused += 1 - taken
    return refused


@contextmanager
def _held_still() -> Iterator[None]:
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
    """The body after the edit, a valid job; the letter's own where nothing was changed. None: to be left alone."""
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
@click.option("--reason", required=True, help="Why, for the record.")
@yes_option
@json_option
@handle_errors
def drop_letters(code: str | None, limit: int | None, reason: str, yes: bool, as_json: bool) -> None:
    """Removes dead letters for good. No copy is kept: list them with --reveal --json first where one is wanted.

    Example: confirm-offer dead-letters drop --code invalid-json --reason "load test of a partner"
    """
    if not reason.strip():
        raise click.UsageError("--reason is empty")
    url, engine = read(BrokerSettings).url, database.connect(read(DatabaseSettings).url)
    count = _count(url, code, limit)
    if not count:
        return _tell_moved("dropped", 0, 0, as_json, code)
    ask(f"Drop {pluralize(count, 'letter')} for good?", yes)
    with (
        Tally(engine, "dead-letters drop", reason, code=code, limit=limit) as tally,
        DeadLetterQueue(url) as letters,
        progress() as bar,
        _Moved("dropped", count, tally, bar) as moved,
    ):
        for batch in in_batches(select_letters(letters, code, count)):
            letters.ack(batch)
            moved.add(len(batch))
    _tell_moved("dropped", moved.count, count - moved.count, as_json, code)
    if moved.count < count:
        sys.exit(1)
    return None


def _count(url: str, code: str | None, limit: int | None) -> int:
    """How many letters are meant. To know their codes they must be taken; then they go back."""
    with DeadLetterQueue(url) as letters:
        count = letters.held_count if code is None else sum(1 for _ in select_letters(letters, code, None))
    return min(count, limit or count)


def _tell_moved(what: str, count: int, left: int, as_json: bool, code: str | None) -> None:
    if not count and not left:
        text = "no dead letters" + (f" of code {code}" if code else "")
    else:
        text = f"{pluralize(count, 'dead letter')} {what}" + (f", {left:,} left" if left else "")
    print_result(as_json, text, **{what: count, "left": left})
