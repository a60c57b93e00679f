"""What the files of deployment are checked with: programs that ``make tools`` installs, the settings, the commands."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

import click
import pytest

from tests.support.system import PROJECT
from worker.cli.app import cli
from worker.settings import SECTIONS, Section

MARGIN = 60.0  # seconds beyond XONE_TIMEOUT that a worker may take to end: recording, publishing, closing

SETTINGS = {name: field for section in SECTIONS for name, field in section.model_fields.items()}


def need(is_there: object, otherwise: str) -> None:
    """Skips the test where something is not there; fails it where CI is set. otherwise: the reason."""
    if not is_there and os.environ.get("CI"):
        pytest.fail(otherwise)
    elif not is_there:
        pytest.skip(otherwise, allow_module_level=True)


def need_module(name: str) -> None:
    need(find_spec(name), f"{name} is missing: 'make tools' installs it")


def run(program: str, *arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """One of the programs that ``make tools`` installs, in the project's folder, with a bare environment."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    found = shutil.which(program, path=path)
    need(found, f"{program} is missing: 'make tools' installs it")
    environment = {"PATH": path, "HOME": "/nonexistent", **environment}
    return subprocess.run([str(found), *arguments], env=environment, cwd=PROJECT, capture_output=True, text=True)


def parse(arguments: Iterable[str]) -> str:
    """The command that ``confirm-offer`` would run with these arguments. Raises click.ClickException."""
    command: click.Command = cli
    left, context = list(arguments), click.Context(cli)
    while isinstance(command, click.Group):
        name, found, left = command.resolve_command(context, left)
        assert found is not None, name
        command = found
    command.make_context(command.name, left)
    return str(command.name)


def read_sections(environment: dict[str, str]) -> dict[str, Section]:
    """What a program started with this environment, and no other, would have for settings, by section."""
    with pytest.MonkeyPatch.context() as patch:
        for name in SETTINGS:
            patch.delenv(name, raising=False)
        for name, value in environment.items():
            patch.setenv(name, value)
        return {section.__name__: section(_env_file=None) for section in SECTIONS}


def default_xone_timeout() -> float:
    return float(SETTINGS["XONE_TIMEOUT"].default)
