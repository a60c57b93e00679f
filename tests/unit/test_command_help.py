"""The help of every command: an example, JSON, and a line in the list of commands that fits."""

import click
import pytest
from click.testing import CliRunner

from tests.support.command_tree import COMMANDS
from worker.cli.app import cli

NO_JSON = {("worker",)}  # it logs, as LOG_FORMAT says


@pytest.mark.parametrize(
    "path", [path for path in COMMANDS if not isinstance(COMMANDS[path], click.Group)], ids=" ".join
)
def test_each_has_an_example_and_json(path: tuple[str, ...]) -> None:
    shown = CliRunner().invoke(cli, [*path, "--help"], env={"COLUMNS": "80"}).output

    assert f"Example: confirm-offer {' '.join(path)}" in " ".join(shown.split())
    assert ("--json" in shown) is (path not in NO_JSON)
    assert max(map(len, shown.splitlines())) <= 80


@pytest.mark.parametrize(
    "path", [(), *(path for path in COMMANDS if isinstance(COMMANDS[path], click.Group))], ids=" ".join
)
def test_the_list_of_commands_says_what_each_does_in_whole_words(path: tuple[str, ...]) -> None:
    shown = CliRunner().invoke(cli, [*path, "--help"], env={"COLUMNS": "80"}).output

    _, listed = shown.split("Commands:\n")
    group = COMMANDS[path] if path else cli
    assert isinstance(group, click.Group)
    assert len(listed.splitlines()) == len(group.commands)
    assert "..." not in listed
