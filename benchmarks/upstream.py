"""A cheap XONE for benchmarks: token, confirm, and list of bookings. Each confirm is answered after a latency.

    python -m benchmarks.upstream --latency 0.05

Prints its URL. The answers are those of the sandbox, without faults. ``GET /calls`` returns the number of confirms by
offer.
"""

import asyncio
import json
import re
from collections import Counter, defaultdict
from typing import ClassVar
from uuid import uuid4

import click

from worker.sandbox.answers import to_json
from worker.sandbox.bookings import new_booking

CONFIRM = re.compile(rb"POST /api/partners/([^/ ]+)/offers/([^/ ]+) ")
BOOKINGS = re.compile(rb"GET /api/partners/([^/ ]+)/bookings ")
OFFER, BOOKING = "00000000-offer", "INS-00000000"
SAMPLE = {
    "quotes": [{"id": "quote-1"}, {"id": "quote-2"}],
    "policyholder": {"first_name": "Ada", "last_name": "Lovelace", "country": "GB", "email": "ada@example.com"},
}
TEMPLATE = to_json({"data": {**new_booking("P-1", OFFER, SAMPLE), "id": BOOKING}})
TOKEN = json.dumps({"access_token": "benchmark", "expires_in": 86400, "token_type": "Bearer"}).encode()


class Upstream(asyncio.Protocol):
    """A connection. latency: seconds until a confirm is answered."""

    latency = 0.0
    calls: ClassVar[Counter[str]] = Counter()  # by offer
    bookings: ClassVar[defaultdict[bytes, dict[str, bytes]]] = defaultdict(dict)  # by partner and offer

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.waiting = bytearray()

    def data_received(self, data: bytes) -> None:
        self.waiting += data
        head, end, rest = self.waiting.partition(b"\r\n\r\n")
        length = re.search(rb"(?i)content-length: *(\d+)", head)
        if not end or len(rest) < (int(length[1]) if length else 0):
            return
        self.waiting.clear()  # clients do not pipeline
        if confirm := CONFIRM.match(head):
            asyncio.get_running_loop().call_later(self.latency, self.confirm, confirm[1], confirm[2].decode())
        elif listing := BOOKINGS.match(head):
            self.answer(b'{"data": [' + b",".join(self.bookings[listing[1]].values()) + b"]}")
        else:
            self.answer(json.dumps(self.calls).encode() if head.startswith(b"GET /calls") else TOKEN)

    def confirm(self, partner: bytes, offer: str) -> None:
        booking = f"INS-{uuid4().hex[:12]}"
        self.calls[offer] += 1
        self.bookings[partner][offer] = b'{"id": "%s", "offer_id": "%s", "status": "CONFIRMED"}' % (
            booking.encode(),
            offer.encode(),
        )
        self.answer(TEMPLATE.replace(OFFER.encode(), offer.encode()).replace(BOOKING.encode(), booking.encode()))

    def answer(self, body: bytes) -> None:
        if self.transport.is_closing():
            return
        head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
        self.transport.write(head + body)


@click.command(help=__doc__)
@click.option("--latency", default=0.05, show_default=True, help="Seconds until a confirm is answered.")
def main(latency: float) -> None:
    async def serve() -> None:
        Upstream.latency = latency
        server = await asyncio.get_running_loop().create_server(Upstream, "127.0.0.1", 0, backlog=1024)
        click.echo(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        await server.serve_forever()

    asyncio.run(serve())


if __name__ == "__main__":
    main()
