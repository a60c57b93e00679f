"""Whether a changed JSON Schema keeps the promises of an earlier one. Knows the keywords that our schemas use.

One rule covers both directions: everything that one schema accepts, the other accepts too. The new schema of a job
must accept all that the old schema accepts. The old schema of an event must accept all that the new schema accepts.
"""

from collections.abc import Iterator
from typing import Any

from jsonschema import Draft202012Validator

Schema = dict[str, Any]

ANNOTATIONS = {"title", "description", "examples", "default", "$comment", "$id", "$schema", "$defs"}
AT_LEAST = ("minLength", "minItems", "minProperties", "minimum")
AT_MOST = ("maxLength", "maxItems", "maxProperties", "maximum")
SAME = ("pattern", "format")
CHILDREN = ("required", "properties", "additionalProperties", "propertyNames", "items")
CHOICES = ("type", "anyOf", "$ref", "const", "enum")
KNOWN = ANNOTATIONS | {*AT_LEAST, *AT_MOST, *SAME, *CHILDREN, *CHOICES}


def refusals(wide: Schema, narrow: Schema) -> list[str]:
    """What ``narrow`` accepts and ``wide`` may refuse, each as ``place: reason``."""
    return list(_Comparison(wide, narrow).of(wide, narrow, ""))


class _Comparison:
    """Compares parts of two documents, and follows their references."""

    def __init__(self, wide: Schema, narrow: Schema) -> None:
        self.wide, self.narrow = wide, narrow

    def of(self, wide: Any, narrow: Any, place: str) -> Iterator[str]:
        wide, narrow = _followed(wide, self.wide), _followed(narrow, self.narrow)
        if unknown := (wide.keys() | narrow.keys()) - KNOWN:
            yield f"{place}: {', '.join(sorted(unknown))} can't be compared"
        elif "const" in narrow or "enum" in narrow:
            values = [narrow["const"]] if "const" in narrow else narrow["enum"]
            accepts = Draft202012Validator({**wide, "$defs": self.wide.get("$defs", {})}).is_valid
            yield from (f"{place}: {value!r} is refused" for value in values if not accepts(value))
        elif len(choices := _choices(narrow)) > 1:
            for choice in choices:
                yield from self.of(wide, choice, place)
        elif len(choices := _choices(wide)) > 1:
            refused = [list(self.of(choice, narrow, place)) for choice in choices]
            if all(refused):
                yield from min(refused, key=len)
        else:
            yield from self._of_one_kind(wide, narrow, place)

    def _of_one_kind(self, wide: Schema, narrow: Schema, place: str) -> Iterator[str]:
        if wide.get("const", wide.get("enum")) is not None:
            yield f"{place}: only some values are accepted"
        types = (wide.get("type"), narrow.get("type"))
        if types[0] not in (None, types[1]) and types != ("number", "integer"):
            yield f"{place}: is {types[1] or 'anything'}, not {types[0]}"
            return
        if narrow.get("type") == "null":
            return  # bounds concern other types
        for name in AT_LEAST:
            if narrow.get(name, float("-inf")) < wide.get(name, float("-inf")):
                yield f"{place}: {name} is {wide[name]}"
        for name in AT_MOST:
            if narrow.get(name, float("inf")) > wide.get(name, float("inf")):
                yield f"{place}: {name} is {wide[name]}"
        for name in SAME:
            if wide.get(name, narrow.get(name)) != narrow.get(name):
                yield f"{place}: {name} is {wide[name]}"
        for name in wide.get("required", []):
            if name not in narrow.get("required", []):
                yield f"{place}.{name}: is required"
        for name in wide.get("properties", {}).keys() | narrow.get("properties", {}).keys():
            yield from self._within(_property(wide, name), _property(narrow, name), f"{place}.{name}")
        yield from self._within(wide.get("additionalProperties"), narrow.get("additionalProperties"), f"{place}.*")
        yield from self._within(wide.get("propertyNames"), narrow.get("propertyNames"), f"{place}, its keys")
        yield from self._within(wide.get("items"), narrow.get("items"), f"{place}[]")

    def _within(self, wide: Any, narrow: Any, place: str) -> Iterator[str]:
        """Compares schemas that may be true, false or missing, which means true."""
        wide, narrow = ({} if schema in (None, True) else schema for schema in (wide, narrow))
        if narrow is False or wide == {}:
            return
        if wide is False:
            yield f"{place}: is not allowed"
        else:
            yield from self.of(wide, narrow, place)


def _property(schema: Schema, name: str) -> Any:
    return schema.get("properties", {}).get(name, schema.get("additionalProperties"))


def _followed(schema: Schema, document: Schema) -> Schema:
    while "$ref" in schema:
        found: Any = document
        for step in schema["$ref"].removeprefix("#/").split("/"):
            found = found[step]
        schema = {**found, **{name: value for name, value in schema.items() if name != "$ref"}}
    return schema


def _choices(schema: Schema) -> list[Schema]:
    """The alternatives of a schema. A list of types is one alternative for each type."""
    if "anyOf" in schema:
        rest = {name: value for name, value in schema.items() if name != "anyOf"}
        return [{**rest, **choice} for choice in schema["anyOf"]]
    if isinstance(schema.get("type"), list):
        return [{**schema, "type": kind} for kind in schema["type"]]
    return [schema]
