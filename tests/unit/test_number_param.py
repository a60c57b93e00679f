"""Numbers from people are finite and bounded, on the command line and in settings."""

import click
import pytest

from worker.cli.ui.number_param import COUNT, Rate
from worker.errors import SettingsError
from worker.settings import RetrySettings, XoneSettings, read


@pytest.mark.parametrize("value", ["inf", "-inf", "nan", "1e400", "1e300", "1e-300", "0", "-1", "10001", "", "many"])
def test_a_rate_that_no_clock_can_keep_is_refused(value: str) -> None:
    with pytest.raises(click.BadParameter):
        Rate().convert(value, None, None)


@pytest.mark.parametrize(("value", "rate"), [("0.0001", 0.0001), ("1e3", 1000.0), ("10000", 10000.0)])
def test_rates(value: str, rate: float) -> None:
    assert Rate().convert(value, None, None) == rate


@pytest.mark.parametrize("value", ["0", "2147483648", "99999999999999999999", "1.5"])
def test_a_number_that_no_column_holds_is_refused(value: str) -> None:
    with pytest.raises(click.BadParameter):
        COUNT.convert(value, None, None)


@pytest.mark.parametrize("value", ["inf", "nan", "1e300"])
def test_a_setting_that_no_clock_can_keep_is_refused(value: str) -> None:
    for name in "RETRY_MAX_AGE", "RETRY_BASE_DELAY", "RETRY_MAX_DELAY":
        with pytest.raises(SettingsError, match=name):
            read(RetrySettings, **{name: value})
    with pytest.raises(SettingsError, match="XONE_RATE_LIMIT"):
        read(XoneSettings, XONE_RATE_LIMIT=value, XONE_CLIENT_ID="a", XONE_CLIENT_SECRET="b")
