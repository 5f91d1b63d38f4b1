"""Many chunks between one Redis server and memory, with asyncio, at the speed of the wire.

A *chunk* is a Redis string whose length is known beforehand. `ChunkStream.fetch` receives any
number of them into one buffer, `copy` passes them on piece by piece, `send` stores them. Each
moves as many chunks in one *request* as make about half a MiB, with several requests under way.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import functools
import itertools
import mmap
import queue
import threading
from collections import deque
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Self, TypeVar

import redis
import redis.asyncio
from imagecodecs import deflate_crc32

from dicomstore.blobs.protocol import (
    NO_PAYLOAD,
    Answer,
    Chunk,
    ChunkProtocol,
    Step,
    as_text,
    command,
    lay_out_sets,
    mget_steps,
    set_steps,
)
from dicomstore.errors import DamagedError, DicomRedisError, ServerError
from dicomstore.server.connection import our_error

Argument = TypeVar("Argument")
Result = TypeVar("Result")

REQUEST_BYTES = 1 << 20  # payload of one request: one MGET, or several SETs
REQUEST_CHUNKS = 1024  # as many as os.preadv takes in one call
REQUESTS = 16  # under way at a time, on all connections: either side holds so much in memory
SCRATCH_BYTES = 32 << 10
WINDOW_BYTES = 16 << 20  # what copy() passes on at a time
CONNECTING = 64  # connections opened at a time: the usual listen backlog is 511
OTHER_FILES = 128  # open files that the process may need beside the connections
POPULATE_BYTES = 16 << 20
MADV_POPULATE_WRITE = 23  # Linux 5.14; the mmap module has no name for it

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
        user, password = options.get("username"), options.get("password") or ""
        request, reply = command("PING"), b"+PONG\r\n"
        if user or password:
            login = (user, password) if user else (password,)
            request, reply = command("AUTH", *login), b"+OK\r\n"
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
        received = loop.create_future()
        checks: list[asyncio.Future[None]] = []
        share = -(-len(chunks) // (2 * self._count))
        parts = _cut(chunks, self._request_bytes, min(REQUEST_CHUNKS, share))
        idle = deque(self._connections * 2)
        under_way = 0

        def ask_next() -> None:
            """Ask for the next part on the connection that has waited longest."""
            nonlocal under_way
            part = next(parts, None)
            if part is None:
                if not under_way and not received.done():
                    received.set_result(None)
                return
            first, last, begin, end = part
            asked, region, connection = chunks[first:last], view[begin:end], idle.popleft()

            def done() -> None:
                nonlocal under_way
                under_way -= 1
                idle.append(connection)
                if crcs is not None:
                    check = loop.run_in_executor(None, _check, asked, region, crcs[first:last])
                    checks.append(check)
                ask_next()

            under_way += 1
            request = command("MGET", *(key for key, _ in asked))
            connection.ask(request, Answer(mget_steps(asked), region, done))

        for _ in range(min(self._requests, len(idle))):
            ask_next()
        try:
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
        window: int = WINDOW_BYTES,
    ) -> None:
        """Pass the bytes of chunks on, in order and piece by piece, in little memory.

        Parameters
        ----------
        chunks, crcs
            As for `fetch`. A chunk is checked before its bytes are passed on.
        write : callable
            Called in a thread with each piece, while the next one is received. The view is valid
            until it returns.
        window : int, optional
            How many bytes a piece has at most, and one chunk at least. Two pieces are in memory.
        """
        parts = list(_cut(chunks, window, len(chunks)))
        size = max((part.end - part.begin for part in parts), default=0)
        buffers = itertools.cycle([memoryview(bytearray(size)) for _ in parts[:2]])
        written: asyncio.Task[object] = asyncio.create_task(asyncio.sleep(0))
        try:
            for (first, last, begin, end), buffer in zip(parts, buffers, strict=False):
                view = buffer[: end - begin]
                await self.fetch(chunks[first:last], view, crcs=crcs and crcs[first:last])
                await written
                written = asyncio.create_task(_in_thread(write, view))
            await written
        finally:
            await asyncio.gather(written, return_exceptions=True)

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


def _check(chunks: Sequence[Chunk], region: memoryview, crcs: Sequence[int]) -> None:
    """Compare the CRC-32 of chunks that lie one after the other in `region`."""
    at = 0
    for (key, length), expected in zip(chunks, crcs, strict=True):
        if crc32(region[at : at + length]) != expected:
            raise DamagedError.of(as_text(key))
        at += length


async def _in_thread(function: Callable[[Argument], Result], argument: Argument) -> Result:
    """Call `function` in a thread; a cancellation waits for it: it uses the caller's file."""
    call = asyncio.get_running_loop().run_in_executor(None, function, argument)
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


def fresh_buffer(size: int) -> memoryview:
    """Return `size` writable bytes, all zero, that are faster to fill than a new bytearray.

    The page faults of fresh memory cost about as much time as the transfer. So this memory is in
    huge pages, which a thread has the kernel provide ahead of the transfer, where it can.
    """
    if size < POPULATE_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return memoryview(bytearray(size))
    memory = mmap.mmap(-1, size)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    threading.Thread(target=_populate, args=(memory,), name="populate", daemon=True).start()
    return memoryview(memory)


def _populate(memory: mmap.mmap) -> None:
    """Have the kernel provide pages, as far as it can; mmap.madvise would keep the GIL."""
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for at in range(0, len(memory), POPULATE_BYTES):
        if madvise(start + at, min(POPULATE_BYTES, len(memory) - at), MADV_POPULATE_WRITE):
            return
