"""The help of every command: an example, JSON, and a line in the list of commands that fits."""

from collections.abc import Iterator

import click
import pytest
from click.testing import CliRunner

from worker.cli.app import cli

NO_JSON = {("worker",)}  # it logs, as LOG_FORMAT says


def commands(group: click.Group, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    for name, command in group.commands.items():
        yield (*path, name), command
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))


ALL = dict(commands(cli))


@pytest.mark.parametrize("path", [path for path in ALL if not isinstance(ALL[path], click.Group)], ids=" ".join)
def test_each_has_an_example_and_json(path: tuple[str, ...]) -> None:
    shown = CliRunner().invoke(cli, [*path, "--help"], env={"COLUMNS": "80"}).output

    assert f"Example: confirm-offer {' '.join(path)}" in " ".join(shown.split())
    assert ("--json" in shown) is (path not in NO_JSON)
    assert max(map(len, shown.splitlines())) <= 80


@pytest.mark.parametrize("path", [(), *(path for path in ALL if isinstance(ALL[path], click.Group))], ids=" ".join)
def test_the_list_of_commands_says_what_each_does_in_whole_words(path: tuple[str, ...]) -> None:
    shown = CliRunner().invoke(cli, [*path, "--help"], env={"COLUMNS": "80"}).output

    _, listed = shown.split("Commands:\n")
    group = ALL[path] if path else cli
    assert isinstance(group, click.Group)
    assert len(listed.splitlines()) == len(group.commands)
    assert "..." not in listed
