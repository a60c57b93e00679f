"""The published schemas fit the official meta-schemas, and real messages fit the published schemas."""

import copy
import json
import shutil
import subprocess
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft7Validator, Draft202012Validator, FormatChecker

from models.booking import Booking
from models.event import BOOKING_EVENTS, EventType, booking_data, cloud_event, error_data
from models.job import JobRejected, read_job
from tests.support.jobs import ACCEPTED, ANY_JSON, FULL, MINIMAL, NOT_A_JOB, PASSED_ON, changed, to_bytes
from tests.support.messages import problems_of_event
from tests.support.servers import lacking
from tests.support.system import PROJECT
from worker.cli.app import cli
from worker.published.asyncapi import document
from worker.published.json_schema import (
    JOB_EXAMPLE,
    data_schema,
    envelope_schema,
    event_example,
    event_schema,
    job_schema,
)

OFFICIAL = PROJECT / "tests" / "schemas"
JOB = Draft202012Validator(job_schema())


# --- The documents themselves ---


@pytest.mark.parametrize("name", ["job", "event", "asyncapi"])
@pytest.mark.parametrize("option", [[], ["--json"]], ids=["plain", "json"])
def test_the_committed_schemas_are_those_that_the_command_prints(name: str, option: list[str]) -> None:
    printed = CliRunner().invoke(cli, ["schema", name, *option])

    assert printed.exit_code == 0
    assert printed.output == (PROJECT / "docs" / "schemas" / f"{name}.json").read_text(), "run 'make schemas'"


@pytest.mark.parametrize("schema", [job_schema(), event_schema()], ids=["job", "event"])
def test_each_schema_is_valid_json_schema(schema: dict[str, Any]) -> None:
    assert schema["$schema"] == Draft202012Validator.META_SCHEMA["$id"]
    Draft202012Validator.check_schema(schema)


def official_asyncapi() -> Draft7Validator:
    found = OFFICIAL / "node_modules" / "@asyncapi" / "specs" / "schemas" / "3.0.0.json"
    if not found.exists():
        lacking("the official schema of AsyncAPI is not installed: 'make node' does it, with npm")
    return Draft7Validator(json.loads(found.read_text()))


def test_the_asyncapi_document_is_valid() -> None:
    official = official_asyncapi()

    assert [error.message for error in official.iter_errors(document())] == []
    for path in (
        ("channels", "jobs", "bindings", "amqp"),
        ("operations", "sendEvent"),
        ("components", "messages", "job"),
    ):
        broken = copy.deepcopy(document())
        node: Any = broken
        for step in path:
            node = node[step]
        node["no such key"] = 1
        assert not official.is_valid(broken)


def test_references_in_the_asyncapi_document_have_targets() -> None:
    def references(node: Any) -> list[str]:
        children = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
        own = [node["$ref"]] if isinstance(node, dict) and "$ref" in node else []
        return own + [found for child in children for found in references(child)]

    assert len(references(document())) > 20
    for reference in references(document()):
        node = document()
        for step in reference.removeprefix("#/").split("/"):
            node = node[step]


def test_payloads_in_the_asyncapi_document_equal_the_schemas() -> None:
    """AsyncAPI uses JSON Schema draft 07."""
    parts = document()["components"]["schemas"]
    job = Draft7Validator({"$ref": "#/components/schemas/Job", "components": {"schemas": parts}})

    for content, accepted in [(MINIMAL, True), (FULL, True), *((content, False) for content, _ in NOT_A_JOB.values())]:
        assert job.is_valid(content) is accepted
    for name, message in document()["components"]["messages"].items():
        for example in message.get("examples", []):
            schema = {**message["payload"], "components": {"schemas": parts}}
            assert [error.message for error in Draft7Validator(schema).iter_errors(example["payload"])] == [], name


# --- Jobs ---


def accepted_by_read_job(body: bytes) -> bool | None:
    """Whether read_job accepts it. None if it is not valid JSON, which no schema can judge."""
    try:
        read_job(body)
    except JobRejected as rejected:
        return False if rejected.code == "invalid-job" else None
    return True


def test_the_schema_accepts_what_read_job_accepts() -> None:
    bodies = {**ACCEPTED, "full": to_bytes(FULL)}

    assert [name for name, body in bodies.items() if not JOB.is_valid(json.loads(body))] == []


def test_the_schema_refuses_what_read_job_refuses() -> None:
    assert [name for name, (content, _) in NOT_A_JOB.items() if JOB.is_valid(content)] == []


LETTERS = st.sampled_from(
    [*"aZ09._~-@/% \n\r\t", "\x00", "\x1c", "\x1f", "\x7f", "\x85", "\xa0", "\u2028", "\ufeff", "ä", "🎟"]
)
LENGTHS = st.sampled_from([0, 1, 2, 3, 127, 128, 129, 319, 320, 321, 511, 512, 513, 1024, 1025, 2048, 2049])
TEXTS = (
    st.text(LETTERS, max_size=6)
    | st.builds(lambda letter, length: letter * length, LETTERS, LENGTHS)
    | st.builds(lambda before, after: f"{before}@{after}", st.text(LETTERS, max_size=3), st.text(LETTERS, max_size=3))
)
STRUCTURES = (
    ANY_JSON
    | st.builds(lambda count: [{"id": "q"}] * count, st.sampled_from([0, 1, 100, 101]))
    | st.builds(lambda count: [{}] * count, st.sampled_from([0, 1, 100, 101]))
    | st.builds(lambda count: {str(number): "" for number in range(count)}, st.sampled_from([0, 20, 21]))
)
OF_TEXTS = ["partner_id", "offer_id", "order_reference", "metadata.x", "quotes.0.id", "quotes.0.insured.0.email"]
OF_TEXTS += [f"policyholder.{name}" for name in ("first_name", "country", "email", "phone", "other")]
OF_STRUCTURES = [
    "other",
    "quotes",
    "quotes.0",
    "quotes.0.insured",
    "quotes.0.insured.0",
    "quotes.0.brightwrite_details",
]
OF_STRUCTURES += ["quotes.0.other", "policyholder", "metadata", "metadata.x", "order_reference"]

FUZZ = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)


def assert_agreement(content: Any) -> None:
    body = json.dumps(content).encode()
    assert accepted_by_read_job(body) in (JOB.is_valid(json.loads(body)), None)


@FUZZ
@given(st.sampled_from(OF_TEXTS), TEXTS)
def test_schema_and_read_job_agree_on_texts(place: str, text: str) -> None:
    assert_agreement(changed(place, text, FULL))


@FUZZ
@given(TEXTS, TEXTS)
def test_schema_and_read_job_agree_on_keys(key: str, other_key: str) -> None:
    assert_agreement(changed("metadata", {key: "", other_key: ""}))
    assert_agreement({**FULL, key: ""})


@FUZZ
@given(st.sampled_from(OF_STRUCTURES), STRUCTURES)
def test_schema_and_read_job_agree_on_structures(place: str, value: Any) -> None:
    assert_agreement(changed(place, value, FULL))


def patterns(node: Any) -> set[str]:
    children = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    own = {node["pattern"]} if isinstance(node, dict) and isinstance(node.get("pattern"), str) else set()
    return own.union(*(patterns(child) for child in children))


def test_patterns_match_the_same_texts_in_javascript() -> None:
    """Many validators are written in JavaScript, whose \\s, $ and \\x differ from Python's."""
    if shutil.which("node") is None:
        lacking("node is not installed")
    texts = [
        template.replace("X", letter)
        for letter in map(chr, [*range(256), 0x1680, 0x180E, 0x2028, 0x3000, 0xFEFF])
        for template in ("X", "aX", "X@b", "a@bX", "a@Xb", "GX", "a/X", "1.X")
    ]
    texts += ["GB", "..", ".", "...", "a" * 128, "a" * 129, "a/b", "1.50", "-1", "🎟️", "http-422"]
    all_patterns = sorted(patterns(job_schema()) | patterns(event_schema()))
    program = """
        const [patterns, texts] = JSON.parse(fs.readFileSync(0));
        console.log(JSON.stringify(patterns.map(pattern => texts.map(text => new RegExp(pattern, "u").test(text)))));
    """

    done = subprocess.run(
        ["node", "-e", program], input=json.dumps([all_patterns, texts]), capture_output=True, text=True, check=True
    )

    for pattern, in_javascript in zip(all_patterns, json.loads(done.stdout), strict=True):
        validator = Draft202012Validator({"pattern": pattern})
        assert [text for text, is_valid in zip(texts, in_javascript, strict=True) if is_valid] == [
            text for text in texts if validator.is_valid(text)
        ], pattern


# --- Events ---

BOOKINGS: dict[str, Any] = {
    "full": {
        "status": "CONFIRMED",
        "currency": "EUR",
        "price": Decimal("19.90"),
        "provider_reference": "PR-1",
        "is_instant_booking": True,
        "created_at": "0900-01-01T00:00:00.5+01:00",
        "coi": {"url": "https://x/coi", "pdf": None},
        "account_url": "https://x/account",
        "fnol_link": "",
        "sign_up_url": "x",
        "policies": [{"id": 7, "price": Decimal("0E-7"), "tax": Decimal("-1E+2"), "policy_end_date": "2026-01-01"}, {}],
    },
    "of misfits": {"price": "much", "created_at": "soon", "coi": 5, "policies": [{"tax": []}], "currency": 1},
    "bare": {},
}
ERRORS = {"of an answer": ("http-422", 422, "XONE answered 422", 1), "of none": ("connect", None, None, 0)}


def common(**changes: Any) -> dict[str, Any]:
    return {
        "partner_id": "P.1",
        "offer_id": "o~1",
        "order_reference": None,
        "metadata": {"k": ""},
        "sequence": 1,
        **changes,
    }


@pytest.mark.parametrize("with_links", [False, True], ids=["no links", "links"])
@pytest.mark.parametrize("event_type", BOOKING_EVENTS)
@pytest.mark.parametrize("fields", BOOKINGS.values(), ids=BOOKINGS.keys())
def test_a_booking_event_fits_its_schema(fields: Any, event_type: EventType, with_links: bool) -> None:
    booking = Booking.model_validate({"id": "INS-1", "offer_id": "o~1", **fields})
    data = common(order_reference="SO 1", **booking_data(booking, with_links))

    assert problems_of_event(cloud_event(UUID(int=1), event_type, "P.1", "o~1", datetime.now(UTC), data)) == []


@pytest.mark.parametrize("event_type", [EventType.CONFIRMATION_FAILED, EventType.CONFIRMATION_NEEDS_REVIEW])
@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS.keys())
def test_an_error_event_fits_its_schema(error: Any, event_type: EventType) -> None:
    data = common(**error_data(*error))

    assert problems_of_event(cloud_event(UUID(int=1), event_type, "P.1", "o~1", datetime.now(UTC), data)) == []


@pytest.mark.parametrize("event_type", EventType)
def test_the_check_of_events_finds_errors(event_type: EventType) -> None:
    """Without it, the tests above and the checks of published events would prove nothing."""
    good = event_example(event_type)
    assert problems_of_event(json.dumps(good)) == []
    inner = "booking" if event_type in BOOKING_EVENTS else "error"
    for part, key, value in [
        *[(None, "id", "1"), (None, "time", "2026-01-01"), (None, "type", "booking.other"), (None, "more", 1)],
        *[(None, "subject", "P-100"), (None, "source", ""), ("data", "sequence", 0), ("data", "metadata", {"a": 1})],
        *[("data", "more", 1), ("data", "order_reference", 1), (inner, "more", 1), (inner, "status", 1)],
    ]:
        bad = copy.deepcopy(good)
        place = {None: bad, "data": bad["data"], inner: bad["data"][inner]}[part]
        place[key] = value
        assert problems_of_event(json.dumps(bad)) != [], f"{part} {key}"


def test_an_event_names_the_schema_of_its_data() -> None:
    for event_type in EventType:
        assert data_schema(event_type)["$id"] == event_example(event_type)["dataschema"]
        assert envelope_schema(event_type)["properties"]["data"] == data_schema(event_type)


def test_examples_fit_their_schemas() -> None:
    assert accepted_by_read_job(to_bytes(JOB_EXAMPLE))
    assert JOB.is_valid(JOB_EXAMPLE)
    any_event = Draft202012Validator(event_schema(), format_checker=FormatChecker())
    for event_type in EventType:
        assert any_event.is_valid(event_example(event_type))
        assert problems_of_event(json.dumps(event_example(event_type))) == []


def test_unknown_keys_that_the_schema_allows_are_passed_on() -> None:
    assert JOB.is_valid(changed("policyholder.more", PASSED_ON))
    assert not JOB.is_valid(changed("more", PASSED_ON))
