"""The instructions of a Dockerfile, and the files that .dockerignore allows in the build."""

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class Instruction(NamedTuple):
    """``COPY --from=build /app /app`` has the flag ``from`` and two words."""

    name: str
    flags: dict[str, str]
    text: str

    @property
    def is_exec(self) -> bool:
        """Whether it is a JSON array, which runs without a shell that would not pass signals on."""
        return self.text.startswith("[")

    @property
    def words(self) -> list[str]:
        return json.loads(self.text) if self.is_exec else shlex.split(self.text)


def read(path: Path) -> list[Instruction]:
    lines = [line for line in path.read_text().splitlines() if line.strip() and not line.lstrip().startswith("#")]
    logical = re.sub(r"\\\n", " ", "\n".join(lines)).splitlines()
    return [_instruction(line) for line in logical]


def _instruction(line: str) -> Instruction:
    name, rest = line.split(maxsplit=1)
    flags = {}
    while match := re.match(r"--([a-z-]+)=(\S+)\s+", rest):
        flags[match[1]] = match[2]
        rest = rest[match.end() :]
    return Instruction(name.upper(), flags, rest.strip())


def stages(instructions: list[Instruction]) -> list[list[Instruction]]:
    """The stages. Each begins with its FROM."""
    found: list[list[Instruction]] = []
    for instruction in instructions:
        if instruction.name == "FROM":
            found.append([])
        found[-1].append(instruction)
    return found


class Ignore:
    """``.dockerignore``: the last pattern that matches a path, or a folder above it, decides."""

    def __init__(self, text: str) -> None:
        lines = [line.strip() for line in text.splitlines()]
        patterns = [line for line in lines if line and not line.startswith("#")]
        self._rules = [(_regex(pattern.lstrip("!")), not pattern.startswith("!")) for pattern in patterns]

    def excludes(self, path: Path) -> bool:
        """Whether this path, relative to the project, is excluded."""
        prefixes = ["/".join(path.parts[: length + 1]) for length in range(len(path.parts))]
        is_excluded = False
        for rule, excludes in self._rules:
            if any(rule.fullmatch(prefix) for prefix in prefixes):
                is_excluded = excludes
        return is_excluded

    def files(self, project: Path, source: str) -> Iterator[Path]:
        """The files of a COPY source that are in the build, relative to the project."""
        start = project / source
        for path in [start] if start.is_file() else sorted(start.rglob("*")):
            relative = path.relative_to(project)
            if path.is_file() and not self.excludes(relative):
                yield relative


def _regex(pattern: str) -> re.Pattern[str]:
    written = re.escape(pattern.strip("/"))
    return re.compile(written.replace(r"\*\*/", "(?:.*/)?").replace(r"\*", "[^/]*").replace(r"\?", "[^/]"))
