"""A TCP proxy that can fail: it passes, cuts, or is a black hole."""

import asyncio
import threading
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any, Self

from tests.support.servers import free_port


class FaultProxy:
    """Listens on ``port`` of 127.0.0.1 and passes everything on to ``target``, a port of 127.0.0.1, until told not to.

    A black hole holds back what comes from either side, and leaves new connections without an answer. As with packets
    that are lost on the way, what was held back arrives when it ends.
    """

    def __init__(self, target: int) -> None:
        self.port, self.target = free_port(), target
        self._loop = asyncio.new_event_loop()
        self._open = asyncio.Event()
        self._server: asyncio.Server | None = None
        self._pipes: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=self._loop.run_forever, name=f"proxy {self.port}", daemon=True)
        self._thread.start()
        self.pass_on()

    @property
    def connections(self) -> int:
        """How many are open."""
        return len(self._pipes)

    def pass_on(self) -> None:
        """Ends a fault."""
        self._run(self._pass_on())

    def cut(self) -> None:
        """Ends all connections, and refuses new ones."""
        self._run(self._cut())

    def black_hole(self) -> None:
        """Lets nothing through, in either direction, while all connections seem to stand."""
        self._run(self._black_hole())

    def close(self) -> None:
        self.cut()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, coroutine: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    async def _pass_on(self) -> None:
        self._open.set()
        if self._server is None:
            self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port)

    async def _cut(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        for pipe in self._pipes:
            pipe.cancel()
        if self._pipes:
            await asyncio.wait(self._pipes)

    async def _black_hole(self) -> None:
        self._open.clear()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        pipe = asyncio.current_task()
        assert pipe is not None
        self._pipes.add(pipe)
        ends = [writer]
        try:
            await self._open.wait()
            target_reader, target_writer = await asyncio.open_connection("127.0.0.1", self.target)
            ends.append(target_writer)
            ways = [self._pump(reader, target_writer), self._pump(target_reader, writer)]
            tasks = [asyncio.create_task(way) for way in ways]
            try:
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in tasks:
                    task.cancel()
        except (OSError, asyncio.CancelledError):
            pass  # the target is away, or the connection is cut
        finally:
            for end in ends:
                end.transport.abort()
            self._pipes.discard(pipe)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Passes on what comes until the sender closes, or either side breaks."""
        with suppress(OSError):
            while data := await reader.read(65536):
                await self._open.wait()
                writer.write(data)
                await writer.drain()
            await self._open.wait()
