"""The help of every command: an example, JSON, and a short line in the list of commands."""

import click
from click.testing import CliRunner

from tests.support.command_tree import COMMANDS
from worker.cli.app import cli

NO_JSON = {("worker",)}  # it logs in the format of LOG_FORMAT


GROUPS = {(): cli} | {path: command for path, command in COMMANDS.items() if isinstance(command, click.Group)}


def help_of(path: tuple[str, ...]) -> str:
    return CliRunner().invoke(cli, [*path, "--help"], env={"COLUMNS": "80"}).output


def test_each_command_has_an_example_and_json() -> None:
    for path in COMMANDS.keys() - GROUPS.keys():
        shown = help_of(path)
        assert f"Example: confirm-offer {' '.join(path)}" in " ".join(shown.split()), path
        assert ("--json" in shown) is (path not in NO_JSON), path
        assert max(map(len, shown.splitlines())) <= 80, path


def test_each_line_in_a_list_of_commands_is_complete() -> None:
    for path, group in GROUPS.items():
        _, listed = help_of(path).split("Commands:\n")
        assert len(listed.splitlines()) == len(group.commands), path
        assert "..." not in listed, path
