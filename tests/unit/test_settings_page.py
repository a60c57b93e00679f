"""docs/configuration.md and .env.example list exactly the settings of worker/settings.py, with their defaults."""

import re

import pytest
from pydantic import SecretStr

from tests.support.system import PROJECT
from worker.published.settings_page import default_of, meanings_in, page
from worker.settings import NAMES, SECTIONS, Section

DEFAULTS = {name: default_of(field) for section in SECTIONS for name, field in section.model_fields.items()}
EXAMPLE = re.findall(r"^(# )?([A-Z_]+)=(.*)$", (PROJECT / ".env.example").read_text("utf-8"), re.MULTILINE)
OURS = {name for name in DEFAULTS if not name.startswith("OTEL_")}  # OpenTelemetry has its own documents
FOR_COMPOSE = {"RABBITMQ_PASSWORD", "POSTGRES_PASSWORD"}


def test_the_committed_page_is_generated_from_the_settings() -> None:
    assert (PROJECT / "docs" / "configuration.md").read_text("utf-8") == page(), "run 'make configuration'"


@pytest.mark.parametrize("section", SECTIONS)
def test_each_setting_has_a_description(section: type[Section]) -> None:
    assert section.model_fields.keys() - meanings_in(section).keys() == set()
    assert section.__doc__


def test_the_page_shows_no_value_of_a_secret() -> None:
    """Except for the defaults, which are no secrets."""
    secrets = [
        (name, field) for section in SECTIONS for name, field in section.model_fields.items() if _is_secret(field)
    ]

    assert {name for name, _ in secrets} >= {"XONE_CLIENT_SECRET", "DATA_KEYS", "SENTRY_DSN"}
    for name, _ in secrets:
        assert f"| `{name}` | {DEFAULTS[name]} | secret |" in page()


def _is_secret(field: object) -> bool:
    return SecretStr.__name__ in str(field)


def test_the_example_lists_each_setting_with_its_default() -> None:
    listed = {name: value for _, name, value in EXAMPLE if name not in FOR_COMPOSE}

    assert listed == {
        name: "" if default in ("required", "none") else default.strip("`")
        for name, default in DEFAULTS.items()
        if name in listed.keys() | OURS
    }
    assert [name for hash_sign, name, _ in EXAMPLE if not hash_sign] == [
        "DATA_KEYS",
        "XONE_CLIENT_ID",
        "XONE_CLIENT_SECRET",
    ]


def test_no_setting_is_in_two_sections() -> None:
    assert len(NAMES) == len(set(NAMES))
