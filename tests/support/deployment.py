"""Checks of deployment files: the programs that ``make tools`` installs, the settings, the commands."""

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


def need(is_present: object, reason: str) -> None:
    """Skips the test if something is missing; fails it in CI. reason: what is missing."""
    if not is_present and os.environ.get("CI"):
        pytest.fail(reason)
    elif not is_present:
        pytest.skip(reason, allow_module_level=True)


def need_module(name: str) -> None:
    need(find_spec(name), f"{name} is missing: 'make tools' installs it")


def run(program: str, *arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a program that ``make tools`` installs, in the project's folder, with a minimal environment."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    found = shutil.which(program, path=path)
    need(found, f"{program} is missing: 'make tools' installs it")
    environment = {"PATH": path, "HOME": "/nonexistent", **environment}
    return subprocess.run([str(found), *arguments], env=environment, cwd=PROJECT, capture_output=True, text=True)


def parse(arguments: Iterable[str]) -> str:
    """The command that ``confirm-offer`` would run with these arguments. Raises click.ClickException."""
    command: click.Command = cli
    rest, context = list(arguments), click.Context(cli)
    while isinstance(command, click.Group):
        name, found, rest = command.resolve_command(context, rest)
        assert found is not None, name
        command = found
    command.make_context(command.name, rest)
    return str(command.name)


def read_sections(environment: dict[str, str]) -> dict[str, Section]:
    """The settings, by section, of a program that has only this environment."""
    with pytest.MonkeyPatch.context() as patch:
        for name in SETTINGS:
            patch.delenv(name, raising=False)
        for name, value in environment.items():
            patch.setenv(name, value)
        return {section.__name__: section(_env_file=None) for section in SECTIONS}


def default_xone_timeout() -> float:
    return float(SETTINGS["XONE_TIMEOUT"].default)
