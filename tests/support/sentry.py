"""A transport that keeps what would be sent to Sentry."""

import json
from typing import Any

from sentry_sdk.envelope import Envelope
from sentry_sdk.transport import Transport


class Capturing(Transport):
    def __init__(self, options: dict[str, Any] | None = None) -> None:
        super().__init__(options)
        self.sent: list[bytes] = []

    def capture_envelope(self, envelope: Envelope) -> None:
        self.sent.append(envelope.serialize())

    def events(self) -> list[dict[str, Any]]:
        return [json.loads(sent.split(b"\n")[2]) for sent in self.sent]
