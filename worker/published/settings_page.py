"""docs/configuration.md, made from the settings by ``python -m worker.published.settings_page``."""

import ast
import inspect
import sys
from itertools import groupby, pairwise
from typing import Any

from pydantic import SecretStr
from pydantic.fields import FieldInfo

from worker.settings import SECTIONS, Section

HEAD = """# Configuration

Settings come from the environment and from a file `.env` in the working folder; the environment goes before the file.
A missing or wrong one ends a program at its start with one line that names it, and exit code 2. A command asks only for
the settings that it uses. `confirm-offer doctor` checks them all, and what they lead to.

This page is made from the program (`make configuration`).
"""


def page() -> str:
    """The whole page. Sections with the same title share a table."""
    parts = [HEAD]
    for title, sections in groupby(SECTIONS, lambda section: section.__doc__):
        parts.append(
            f"## {title}\n\n| name | default | values | meaning |\n|---|---|---|---|\n" + _rows(list(sections))
        )
    return "\n".join(parts)


def _rows(sections: list[type[Section]]) -> str:
    rows = []
    for section in sections:
        schema, meanings = section.model_json_schema()["properties"], meanings_in(section)
        for name, field in section.model_fields.items():
            rows.append(f"| `{name}` | {default_of(field)} | {values_of(schema[name])} | {meanings[name]} |\n")
    return "".join(rows)


def meanings_in(section: type[Section]) -> dict[str, str]:
    """The text below each setting of a section, in one line.

    Read here and not by pydantic (``use_attribute_docstrings``): that parses the source whenever settings are imported.
    """
    meanings: dict[str, str] = {}
    for base in reversed(section.__mro__):
        if issubclass(base, Section):
            (definition,) = ast.parse(inspect.getsource(base)).body
            assert isinstance(definition, ast.ClassDef)
            for setting, text in pairwise(definition.body):
                match setting, text:
                    case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(meaning))):
                        meanings[name] = " ".join(meaning.split())
    return meanings


def default_of(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.default.get_secret_value() if isinstance(field.default, SecretStr) else field.default
    return "none" if value in (None, "") else f"`{value}`"


def values_of(schema: dict[str, Any]) -> str:
    """What a setting may be, as its JSON Schema says."""
    schema = schema.get("anyOf", [schema])[0]
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if schema["type"] == "string":
        return "secret" if schema.get("format") == "password" else "text"
    kind = {"integer": "whole number", "number": "number"}[schema["type"]]
    least = f" from {schema['minimum']}" if "minimum" in schema else f" above {schema['exclusiveMinimum']:g}"
    return kind + least + (f", at most {schema['maximum']}" if "maximum" in schema else "")


if __name__ == "__main__":
    sys.stdout.write(page())
