"""Runs commands as programs, with their own environment."""

import os
import subprocess
import sys

from tests.support.system import PROJECT, terminal


def run(*arguments: str, stdin: str | None = None, **settings: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "worker", *arguments],
        env={"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), "COLUMNS": "80", **settings},
        cwd=PROJECT,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def environment_of(url: str) -> dict[str, str]:
    home = os.environ.get("HOME", "/")
    return {"PATH": os.environ["PATH"], "HOME": home, "COLUMNS": "80", "DATABASE_URL": url}


def on_a_terminal(url: str, *arguments: str, answer: str) -> tuple[int, str]:
    """Runs a command on a terminal. Returns its exit code and output."""
    return terminal([sys.executable, "-m", "worker", *arguments], environment_of(url), PROJECT, answer)
