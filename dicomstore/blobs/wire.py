"""Many chunks between one Redis server and memory, with asyncio, at the speed of the wire.

A *chunk* is a Redis string whose length is known beforehand. `ChunkStream.fetch` receives any
number of them into one buffer, `copy` passes them on piece by piece, `send` stores them. Each
moves as many chunks in one *request* as make about a MiB, with several requests under way.
"""

from __future__ import annotations

import asyncio
import functools
import queue
import threading
from collections import deque
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Self, TypeVar

import redis
import redis.asyncio
from imagecodecs import deflate_crc32

from dicomstore.blobs.memory import fresh_buffer
from dicomstore.blobs.protocol import (
    NO_PAYLOAD,
    Answer,
    Chunk,
    ChunkProtocol,
    Step,
    as_text,
    command,
    greeting,
    lay_out_sets,
    mget_steps,
    set_steps,
)
from dicomstore.errors import DamagedError, DicomRedisError, ServerError
from dicomstore.server.connection import our_error

Result = TypeVar("Result")

REQUEST_BYTES = 1 << 20  # payload of one request: one MGET, or several SETs
REQUEST_CHUNKS = 1024  # as many as os.preadv takes in one call
#: Under way at a time, on all connections. With more of them bytes come no faster, and what others
#: ask the server waits behind all of them.
REQUESTS = 2
SCRATCH_BYTES = 32 << 10
WAITING = 8  # requests whose bytes copy() holds until they are passed on, beside those under way
CONNECTING = 64  # connections opened at a time: the usual listen backlog is 511
OTHER_FILES = 128  # open files that the process may need beside the connections

#: Four times as fast as zlib's, which would take longer than the transfer.
crc32: Callable[[Any], int] = deflate_crc32


class Part(NamedTuple):
    """Chunks that lie side by side: the first, the one after the last, and their bytes."""

    first: int
    last: int
    begin: int
    end: int


class ChunkStream:
    """Connections of its own to the server of a redis-py client: ``async with ChunkStream(...)``.

    After an error or a cancellation all connections are closed, and the stream cannot be used
    again.

    Parameters
    ----------
    client : redis.Redis
        Says where the server is and how to log in; see `Server.wire_client`.
    connections : int, optional
        How many. More than the default are not faster.
    timeout : float, optional
        For how many seconds a connection that awaits an answer may be silent.
    requests, request_bytes : int, optional
        How many requests are under way at a time, and how many bytes of chunks each has at most.

    Raises
    ------
    MissingChunkError, DamagedError
        From `fetch` and `copy`, if a chunk is gone, or has the wrong length or CRC-32.
    RefusedError
        From every method, if the server answers with an error.
    ServerError
        From every method, if a connection cannot be made, is lost, or is silent for too long.
    """

    def __init__(
        self,
        client: redis.Redis,
        *,
        connections: int = 8,
        timeout: float = 30.0,
        requests: int = REQUESTS,
        request_bytes: int = REQUEST_BYTES,
    ) -> None:
        if connections < 1:
            raise ValueError(f"connections must be 1 or more, not {connections}.")
        self._class = client.connection_pool.connection_class
        self._options = client.connection_pool.connection_kwargs
        self._count = connections
        self._timeout = timeout
        self._requests = requests
        self._request_bytes = request_bytes
        self._scratch = memoryview(bytearray(SCRATCH_BYTES))
        self._connections: list[ChunkProtocol] = []

    async def __aenter__(self) -> Self:
        raise_open_files(self._count + OTHER_FILES)
        self._error: asyncio.Future[DicomRedisError] = asyncio.get_running_loop().create_future()
        await self._watch(self._connect())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._abort("is closed")
        await self._closed()

    def _fail(self, error: DicomRedisError) -> None:
        if not self._error.done():
            self._error.set_result(error)

    def _abort(self, why: str) -> None:
        self._fail(ServerError(f"This ChunkStream {why}."))
        for connection in self._connections:
            connection.abort()

    async def _closed(self) -> None:
        await asyncio.gather(*(each.closed for each in self._connections if each.closed))

    async def _watch(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Await `work`, the first error of a connection, or a long silence of one."""
        loop = asyncio.get_running_loop()
        task = loop.create_task(work)
        try:
            while not task.done():
                busy = [each for each in self._connections if each.busy]
                quietest = min(busy, key=lambda each: each.heard, default=None)
                patience = self._timeout
                if quietest:
                    patience -= loop.time() - quietest.heard
                if quietest and patience <= 0:
                    raise quietest.lost(f"a connection was silent for {self._timeout:g} s")
                if self._error.done():
                    raise self._error.result()
                await asyncio.wait(
                    (task, self._error), timeout=patience, return_when="FIRST_COMPLETED"
                )
            return task.result()
        except BaseException:
            self._abort("has failed before")  # from here on nothing touches the buffer
            task.cancel()
            await asyncio.gather(task, self._closed(), return_exceptions=True)
            raise

    # --- connecting ---

    async def _connect(self) -> None:
        """Open all connections, the first one alone: the others use the address it found."""
        options = self._options
        address = host = options.get("host") or "localhost"
        port = int(options.get("port") or 6379)
        request, reply = greeting(options.get("username"), options.get("password") or "")
        tls: dict[str, Any] = {}
        if self._class is redis.SSLConnection:
            of_tls = {k: v for k, v in options.items() if k.startswith("ssl_") and "ocsp" not in k}
            context = redis.asyncio.SSLConnection(**of_tls).ssl_context.get()
            tls = {"ssl": context, "server_hostname": host}
        loop = asyncio.get_running_loop()

        async def connect() -> None:
            nonlocal address
            connection = ChunkProtocol(self._fail, self._scratch)
            self._connections.append(connection)
            opened = loop.create_future()
            steps = iter([Step(reply, b"", 0)])
            connection.ask(request, Answer(steps, NO_PAYLOAD, lambda: opened.set_result(None)))
            try:
                if self._class is redis.UnixDomainSocketConnection:
                    await loop.create_unix_connection(lambda: connection, options["path"])
                else:
                    made = await loop.create_connection(lambda: connection, address, port, **tls)
                    address = made[0].get_extra_info("peername")[0]
            except OSError as error:
                self._fail(our_error(redis.ConnectionError(f"cannot connect: {error}")))
            await opened

        async def connect_some() -> None:
            for _ in others:
                await connect()

        await connect()
        others = iter(range(self._count - 1))
        await asyncio.gather(*(connect_some() for _ in range(CONNECTING)))

    # --- out ---

    async def fetch(
        self, chunks: Sequence[Chunk], buffer: Any, *, crcs: Sequence[int] | None = None
    ) -> None:
        """Receive chunks into a buffer, one after the other.

        Parameters
        ----------
        chunks : sequence of (bytes, int)
            Key and length of each, in the order in which they lie in the buffer.
        buffer : writable buffer
            As long as all of them together. After an error its content is undefined.
        crcs : sequence of int, optional
            The CRC-32 of each chunk, where it is to be checked.

        Raises
        ------
        ValueError
            If the buffer is read-only or has the wrong length.
        """
        view = memoryview(buffer)
        size = sum(length for _, length in chunks)
        if view.readonly or view.nbytes != size:
            kind = "read-only" if view.readonly else "writable"
            raise ValueError(f"{size} writable bytes are needed, not {view.nbytes} {kind} ones.")
        await self._watch(self._fetch(chunks, view.cast("B"), crcs))

    async def _fetch(
        self, chunks: Sequence[Chunk], view: memoryview, crcs: Sequence[int] | None
    ) -> None:
        loop = asyncio.get_running_loop()
        share = -(-len(chunks) // (2 * self._count))
        parts = list(_cut(chunks, self._request_bytes, min(REQUEST_CHUNKS, share)))
        checks: list[asyncio.Future[None]] = []
        received = loop.create_future()
        left = len(parts)

        def arrived(part: Part, region: memoryview) -> None:
            nonlocal left
            if crcs is not None:
                checks.append(loop.run_in_executor(None, _check, chunks, crcs, part, region))
            left -= 1
            if not left:
                received.set_result(None)

        regions = deque(view[part.begin : part.end] for part in parts)
        _asker(self._connections * 2, self._requests, chunks, parts, regions, arrived)()
        try:
            if parts:
                await received
        finally:
            outcomes = await asyncio.gather(*checks, return_exceptions=True)
        for outcome in filter(None, outcomes):
            raise outcome

    async def copy(
        self,
        chunks: Sequence[Chunk],
        write: Callable[[memoryview], object],
        *,
        crcs: Sequence[int] | None = None,
    ) -> None:
        """Pass the bytes of chunks on, in order and piece by piece, in little memory.

        Parameters
        ----------
        chunks, crcs
            As for `fetch`. A chunk is checked before its bytes are passed on.
        write : callable
            Called in a thread with the bytes of one request, while others are received. The view
            is valid until it returns.
        """
        await self._watch(self._copy(chunks, write, crcs))

    async def _copy(
        self,
        chunks: Sequence[Chunk],
        write: Callable[[memoryview], object],
        crcs: Sequence[int] | None,
    ) -> None:
        parts = list(_cut(chunks, self._request_bytes, REQUEST_CHUNKS))
        size = max((part.end - part.begin for part in parts), default=0)
        count = min(self._requests + WAITING, len(parts))
        memory = fresh_buffer(count * size)
        free = deque(memory[n * size : (n + 1) * size] for n in range(count))
        loop = asyncio.get_running_loop()
        whole = {part: loop.create_future() for part in parts}

        def pass_on(part: Part, region: memoryview) -> None:
            if crcs is not None:
                _check(chunks, crcs, part, region)
            write(region)

        ask = _asker(
            self._connections * 2,
            self._requests,
            chunks,
            parts,
            free,
            lambda part, buffer: whole[part].set_result(buffer),
        )
        ask()
        for part, arrival in whole.items():
            buffer = await arrival
            await _in_thread(pass_on, part, buffer[: part.end - part.begin])
            free.append(buffer)
            ask()

    # --- in ---

    async def send(
        self,
        chunks: Sequence[Chunk],
        read: Callable[[list[memoryview]], int],
        *,
        ttl_ms: int | None = None,
    ) -> None:
        """Store chunks, whose bytes are read while those before them are on the way.

        After an error some of the chunks may be stored; the caller has to delete them.

        Parameters
        ----------
        chunks : sequence of (bytes, int)
            Key and length of each.
        read : callable
            Called in one thread, in order, with a view for each chunk of a request; fills the
            views and returns the number of bytes, as
            ``lambda views: os.preadv(file, views, offset)`` does. The bytes go from there to the
            socket. The views are valid until it returns.
        ttl_ms : int, optional
            Time to live of the chunks, ms.

        Raises
        ------
        EOFError
            If `read` filled less than the views.
        """
        await self._watch(self._send(chunks, read, ttl_ms))

    async def _send(
        self,
        chunks: Sequence[Chunk],
        read: Callable[[list[memoryview]], int],
        ttl_ms: int | None,
    ) -> None:
        loop = asyncio.get_running_loop()
        places = (self._connections * 2)[: self._requests]
        free: queue.SimpleQueue[tuple[ChunkProtocol, memoryview]] = queue.SimpleQueue()
        for connection in places:
            free.put((connection, NO_PAYLOAD))
        stop = threading.Event()

        def read_all() -> None:
            for first, last, begin, end in _cut(chunks, self._request_bytes, REQUEST_CHUNKS):
                connection, buffer = free.get()
                if stop.is_set():
                    return
                asked = chunks[first:last]
                request, buffer, payloads = lay_out_sets(asked, buffer, ttl_ms)
                filled = read(payloads)
                if filled != end - begin:
                    raise EOFError(
                        f"{filled} bytes could be read where {end - begin} were expected, from "
                        f"the chunk {as_text(asked[0][0])} on."
                    )
                release = functools.partial(free.put, (connection, buffer))
                answer = Answer(set_steps(asked), NO_PAYLOAD, release)
                loop.call_soon_threadsafe(connection.ask, request, answer)
            for _ in places:
                free.get()  # when its last answer has come

        reading = loop.run_in_executor(None, read_all)
        try:
            await asyncio.shield(reading)
        finally:
            stop.set()
            for connection in places:
                free.put((connection, NO_PAYLOAD))
            await asyncio.gather(reading, return_exceptions=True)


def _asker(
    connections: Sequence[ChunkProtocol],
    requests: int,
    chunks: Sequence[Chunk],
    parts: Sequence[Part],
    buffers: deque[memoryview],
    arrived: Callable[[Part, memoryview], None],
) -> Callable[[], None]:
    """Return what asks for the next parts, as long as there are buffers for them.

    It takes buffers from the left; `arrived` gets each back with the part that is in it.
    """
    waiting = deque(parts)
    idle = deque(connections)
    under_way = 0

    def ask() -> None:
        nonlocal under_way
        while waiting and buffers and under_way < min(requests, len(connections)):
            part, buffer = waiting.popleft(), buffers.popleft()
            connection = idle.popleft()  # the one that has waited longest
            under_way += 1
            asked = chunks[part.first : part.last]
            region = buffer[: part.end - part.begin]
            done = functools.partial(received, part, buffer, connection)
            request = command("MGET", *(key for key, _ in asked))
            connection.ask(request, Answer(mget_steps(asked), region, done))

    def received(part: Part, buffer: memoryview, connection: ChunkProtocol) -> None:
        nonlocal under_way
        under_way -= 1
        idle.append(connection)
        arrived(part, buffer)
        ask()

    return ask


def _cut(chunks: Sequence[Chunk], size: int, count: int) -> Iterator[Part]:
    """Cut chunks into parts of at most `size` bytes and `count` chunks, but at least one chunk."""
    first = begin = end = 0
    for index, (_, length) in enumerate(chunks):
        if index > first and (index - first >= count or end - begin + length > size):
            yield Part(first, index, begin, end)
            first, begin = index, end
        end += length
    if chunks:
        yield Part(first, len(chunks), begin, end)


def _check(chunks: Sequence[Chunk], crcs: Sequence[int], part: Part, region: memoryview) -> None:
    """Compare the CRC-32 of the chunks of `part`, which lie one after the other in `region`."""
    at = 0
    for number in range(part.first, part.last):
        key, length = chunks[number]
        if crc32(region[at : at + length]) != crcs[number]:
            raise DamagedError.of(as_text(key))
        at += length


async def _in_thread(function: Callable[..., Result], *arguments: Any) -> Result:
    """Call `function` in a thread; a cancellation waits for it: it uses the caller's file."""
    call = asyncio.get_running_loop().run_in_executor(None, function, *arguments)
    try:
        return await asyncio.shield(call)
    finally:
        await asyncio.gather(call, return_exceptions=True)


def raise_open_files(needed: int) -> None:
    """Raise the soft limit of open files to `needed`, where it is lower.

    Raises
    ------
    ServerError
        If the hard limit is too low for that.
    """
    try:
        import resource
    except ImportError:
        return  # Windows has no such limit
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise ServerError(
            f"{needed} open files are needed and {hard} are allowed: type `ulimit -n {needed}` "
            "first, as root if that is refused, or ask for fewer connections."
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def complete(coroutine: Coroutine[Any, Any, Result]) -> Result:
    """Await a coroutine from plain code, also where an event loop is at work already (Jupyter).

    There it has a thread of its own, while this one waits. Ctrl-C cancels it either way, and is
    raised again when it has ended.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    loop = asyncio.new_event_loop()
    task = loop.create_task(coroutine)

    def drive() -> Result:
        try:
            return loop.run_until_complete(task)
        finally:
            loop.run_until_complete(loop.shutdown_default_executor())

    try:
        with ThreadPoolExecutor(1) as executor:
            try:
                return executor.submit(drive).result()
            except BaseException:
                loop.call_soon_threadsafe(task.cancel)
                raise
    finally:
        loop.close()
