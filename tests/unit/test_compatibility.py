"""Published schemas are promises. docs/schemas has those of each version, and no change may break one."""

import json
from typing import Any

import pytest

from models.event import EventType
from tests.support.compatibility import refusals
from tests.support.system import PROJECT
from worker.published.asyncapi import document
from worker.published.json_schema import envelope_schema, event_schema, job_schema

SCHEMAS = PROJECT / "docs" / "schemas"
VERSIONS = sorted(folder.name for folder in SCHEMAS.iterdir() if folder.is_dir())


def published(version: str, name: str) -> Any:
    return json.loads((SCHEMAS / version / f"{name}.json").read_text())


def test_a_version_is_published() -> None:
    assert "0.1.0" in VERSIONS


@pytest.mark.parametrize("version", VERSIONS)
def test_an_accepted_job_stays_accepted(version: str) -> None:
    assert refusals(wide=job_schema(), narrow=published(version, "job")) == []


@pytest.mark.parametrize("version", VERSIONS)
def test_an_event_keeps_its_published_schema(version: str) -> None:
    for name, promised in published(version, "event")["$defs"].items():
        assert refusals(wide=promised, narrow=envelope_schema(EventType(name))) == []


@pytest.mark.parametrize("version", VERSIONS)
def test_channels_keep_their_addresses(version: str) -> None:
    promised = published(version, "asyncapi")["channels"]
    now = document()["channels"]

    for name, channel in promised.items():
        assert now[name]["address"] == channel["address"]
        assert now[name]["bindings"] == channel["bindings"]
        assert now[name]["messages"].keys() >= channel["messages"].keys()


# --- The checker ---

TEXT = {"type": "string", "minLength": 1, "maxLength": 8}
OPEN = {"type": "object", "properties": {"a": TEXT, "b": TEXT}, "required": ["a"]}
CLOSED = {**OPEN, "additionalProperties": False}


def with_property(schema: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**schema, "properties": {**schema["properties"], **changes}}


def without_b(schema: dict[str, Any]) -> dict[str, Any]:
    return {**schema, "properties": {"a": TEXT}}


# The schema before and after; the places where the change would break a job's schema, and an event's.
CHANGES: dict[str, tuple[Any, Any, list[str], list[str]]] = {
    "none": (OPEN, OPEN, [], []),
    "words only": (OPEN, {**OPEN, "title": "T", "description": "D", "examples": [{}]}, [], []),
    "optional key added": (OPEN, with_property(OPEN, c={}), [], []),
    "optional key with a type added": (OPEN, with_property(OPEN, c=TEXT), [".c: is anything, not string"], []),
    "optional key added, closed": (CLOSED, with_property(CLOSED, c=TEXT), [], [".c: is not allowed"]),
    "required key added": (
        OPEN,
        {**with_property(OPEN, c={}), "required": ["a", "c"]},
        [".c: is required"],
        [],
    ),
    "optional key becomes required": (OPEN, {**OPEN, "required": ["a", "b"]}, [".b: is required"], []),
    "required key becomes optional": (OPEN, {**OPEN, "required": []}, [], [".a: is required"]),
    "optional key removed": (OPEN, without_b(OPEN), [], [".b: is anything, not string"]),
    "optional key removed, closed": (CLOSED, without_b(CLOSED), [".b: is not allowed"], []),
    "required key removed": (
        OPEN,
        {"type": "object", "properties": {"b": TEXT}},
        [],
        [".a: is required", ".a: is anything, not string"],
    ),
    "key renamed, closed": (
        CLOSED,
        {**CLOSED, "properties": {"a": TEXT, "c": TEXT}},
        [".b: is not allowed"],
        [".c: is not allowed"],
    ),
    "closed": (OPEN, CLOSED, [".*: is not allowed"], []),
    "opened": (CLOSED, OPEN, [], [".*: is not allowed"]),
    "retyped": (TEXT, {"type": "integer"}, [": is string, not integer"], [": is integer, not string"]),
    "whole number to number": ({"type": "integer"}, {"type": "number"}, [], [": is number, not integer"]),
    "null allowed": (TEXT, {**TEXT, "type": ["string", "null"]}, [], [": is null, not string"]),
    "null allowed, said otherwise": (TEXT, {"anyOf": [TEXT, {"type": "null"}]}, [], [": is null, not string"]),
    "said otherwise": ({**TEXT, "type": ["string", "null"]}, {"anyOf": [TEXT, {"type": "null"}]}, [], []),
    "longer": (TEXT, {**TEXT, "maxLength": 9}, [], [": maxLength is 8"]),
    "shorter": (TEXT, {**TEXT, "maxLength": 7}, [": maxLength is 7"], []),
    "bound dropped": (TEXT, {"type": "string", "minLength": 1}, [], [": maxLength is 8"]),
    "bound added": ({"type": "string"}, {"type": "string", "minLength": 1}, [": minLength is 1"], []),
    "minimum raised": (
        {"type": "integer", "minimum": 0},
        {"type": "integer", "minimum": 1},
        [": minimum is 1"],
        [],
    ),
    "pattern added": (TEXT, {**TEXT, "pattern": "^a"}, [": pattern is ^a"], []),
    "pattern changed": (
        {"type": "string", "pattern": "^a"},
        {"type": "string", "pattern": "^b"},
        [": pattern is ^b"],
        [": pattern is ^a"],
    ),
    "format dropped": ({"type": "string", "format": "uuid"}, {"type": "string"}, [], [": format is uuid"]),
    "value added": ({"enum": ["x"]}, {"enum": ["x", "y"]}, [], [": 'y' is refused"]),
    "value removed": ({"enum": ["x", "y"]}, {"const": "x"}, [": 'y' is refused"], []),
    "any text to one": (TEXT, {"const": "x"}, [": only some values are accepted"], []),
    "inside a list": (
        {"type": "array", "items": TEXT},
        {"type": "array", "items": {"type": "string"}},
        [],
        ["[]: minLength is 1", "[]: maxLength is 8"],
    ),
    "more in a list": ({"type": "array", "maxItems": 1}, {"type": "array", "maxItems": 2}, [], [": maxItems is 1"]),
    "keys": (
        {"type": "object", "propertyNames": TEXT},
        {"type": "object", "propertyNames": {**TEXT, "maxLength": 9}},
        [],
        [", its keys: maxLength is 8"],
    ),
    "behind a reference": (
        {"properties": {"a": {"$ref": "#/$defs/t"}}, "$defs": {"t": TEXT}},
        {"properties": {"a": {"$ref": "#/$defs/u"}}, "$defs": {"u": {**TEXT, "maxLength": 7}}},
        [".a: maxLength is 7"],
        [],
    ),
    "a keyword that is not known": (
        {},
        {"not": {"type": "null"}},
        [": not can't be compared"],
        [": not can't be compared"],
    ),
}


@pytest.mark.parametrize(("before", "after", "as_job", "as_event"), CHANGES.values(), ids=CHANGES.keys())
def test_exactly_the_breaking_changes_are_found(
    before: Any, after: Any, as_job: list[str], as_event: list[str]
) -> None:
    assert refusals(wide=after, narrow=before) == as_job
    assert sorted(refusals(wide=before, narrow=after)) == sorted(as_event)


def described_keys(schema: Any, path: tuple[Any, ...] = ()) -> list[tuple[tuple[Any, ...], str]]:
    """Each key that a schema describes: the path of its ``properties``, and its name."""
    found: list[tuple[tuple[Any, ...], str]] = []
    for step, child in schema.items() if isinstance(schema, dict) else enumerate(schema) if schema else ():
        if step == "properties":
            found += [((*path, step), name) for name in child]
        if isinstance(child, dict | list) and step != "examples":
            found += described_keys(child, (*path, step))
    return found


def without_key(document: dict[str, Any], path: tuple[Any, ...], name: str) -> dict[str, Any]:
    changed: dict[str, Any] = json.loads(json.dumps(document))
    node: Any = changed
    for step in path[:-1]:
        node = node[step]
    del node["properties"][name]
    node["required"] = [other for other in node.get("required", []) if other != name]
    return changed


@pytest.mark.slow
def test_removing_any_key_of_an_event_is_breaking() -> None:
    keys = described_keys(event_schema()["$defs"])
    assert len(keys) > 100

    for path, name in keys:
        changed = without_key(event_schema()["$defs"], path, name)[path[0]]
        assert refusals(wide=envelope_schema(EventType(path[0])), narrow=changed) != [], f"{path} {name}"


def test_removing_any_key_of_a_job_is_breaking() -> None:
    keys = [name for path, name in described_keys(job_schema()) if path == ("properties",)]
    assert {"offer_id", "metadata"} <= {*keys}

    for name in keys:
        changed = without_key(job_schema(), ("properties",), name)
        assert f".{name}: is not allowed" in refusals(wide=changed, narrow=job_schema())
