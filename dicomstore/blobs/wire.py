"""Many chunks between one Redis server and memory, with asyncio, at the speed of the wire.

A *chunk* is a Redis string whose length is known beforehand. `ChunkStream.fetch` receives any
number of them into one buffer, `copy` passes them on piece by piece, `send` stores them.

A Redis client makes a Python object of every reply, and its caller copies that to where it
belongs. Here all that the server has to say around the payloads is known before it says it, so
`ChunkProtocol` compares instead of parsing: payloads go from the socket to their final place,
and any other answer is an error. The wire format is RESP2:
https://redis.io/docs/latest/develop/reference/protocol-spec/
"""

import asyncio
import contextlib
import ctypes
import functools
import itertools
import mmap
import threading
from collections import deque
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self, TypeVar

import redis
import redis.asyncio
from imagecodecs import deflate_crc32

from dicomstore.blobs.protocol import (
    NO_PAYLOAD,
    Answer,
    Chunk,
    ChunkProtocol,
    Step,
    command,
    lay_out_sets,
    mget_steps,
    shown_key,
)
from dicomstore.errors import (
    DamagedError,
    DicomRedisError,
    ServerError,
)

Argument = TypeVar("Argument")
Result = TypeVar("Result")
REQUEST_BYTES = 1 << 20  # payload of one request: one MGET, or several SETs
REQUEST_CHUNKS = 1024  # chunks in one request: as many as os.preadv takes in one call
REQUESTS = 16  # under way at a time, on all connections: either side holds so much in memory
SCRATCH_BYTES = 32 << 10
WINDOW_BYTES = 16 << 20  # what copy() passes on at a time
CONNECTING = 64  # connections opened at a time: the usual listen backlog is 511
OTHER_FILES = 128  # open files that the process may need beside the connections
POPULATE_BYTES = 16 << 20
MADV_POPULATE_WRITE = 23  # Linux 5.14; the mmap module has no name for it


#: Four times as fast as zlib's, which would take longer than the transfer.
crc32: Callable[[Any], int] = deflate_crc32


class ChunkStream:
    """Connections of its own to the server of a redis-py client: `async with ChunkStream(...)`.

    Parameters
    ----------
    client
        Says where the server is and how to log in, as `Server.wire_client` gives it.
    connections
        How many. More than the default are not faster.
    timeout
        Seconds without progress, on any connection that awaits an answer, that are an error.

    Raises
    ------
    DicomRedisError
        From every method. After an error or a cancellation all connections are closed, and the
        stream is of no more use.
    """

    def __init__(
        self,
        client: redis.Redis,
        *,
        connections: int = 8,
        timeout: float = 30.0,
    ) -> None:
        if connections < 1:
            raise ValueError(f"connections must be 1 or more, not {connections}.")
        self._class = client.connection_pool.connection_class
        self._options = client.connection_pool.connection_kwargs
        self._count = connections
        self._timeout = timeout
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
        """Run `work` to its end, or to the first error or long silence of a connection."""
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
                    raise quietest.error(f"Redis was silent for {self._timeout:g} s")
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
                self._fail(ServerError(f"Cannot connect to Redis: {error}."))
            await opened

        async def connect_some() -> None:
            for _ in others:
                await connect()

        await connect()
        others = iter(range(self._count - 1))
        await asyncio.gather(*(connect_some() for _ in range(CONNECTING)))

    async def fetch(
        self, chunks: Sequence[Chunk], buffer: Any, *, crcs: Sequence[int] | None = None
    ) -> None:
        """Receive chunks into a buffer, one after the other.

        Parameters
        ----------
        chunks
            Key and length of each, in the order in which they lie in the buffer.
        buffer
            Writable and as long as all of them. After an error its content is undefined.
        crcs
            The CRC-32 of each chunk, where it is to be checked.

        Raises
        ------
        ValueError
            The buffer is read-only or of another length.
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
        requests = _requests(chunks, REQUEST_BYTES, min(REQUEST_CHUNKS, share))
        idle = deque(self._connections * 2)
        outstanding = 0

        def ask_next() -> None:
            """Give the next request to the connection that has waited longest."""
            nonlocal outstanding
            following = next(requests, None)
            if following is None:
                if not outstanding and not received.done():
                    received.set_result(None)
                return
            first, last, begin, end = following
            asked, region, connection = chunks[first:last], view[begin:end], idle.popleft()

            def done() -> None:
                nonlocal outstanding
                outstanding -= 1
                idle.append(connection)
                if crcs is not None:
                    check = loop.run_in_executor(None, _check, asked, region, crcs[first:last])
                    checks.append(check)
                ask_next()

            outstanding += 1
            request = command("MGET", *(key for key, _ in asked))
            connection.ask(request, Answer(mget_steps(asked), region, done))

        for _ in range(min(REQUESTS, len(idle))):
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
    ) -> None:
        """Pass the bytes of chunks on, in order and piece by piece, in some 32 MiB of memory.

        Parameters
        ----------
        chunks, crcs
            As for `fetch`. What is wrong with a chunk is found before its bytes are passed on.
        write
            Called in a thread with up to 16 MiB at a time, while the next ones are received.
            The view is valid until it returns.
        """
        windows = list(_requests(chunks, WINDOW_BYTES, len(chunks)))
        size = max((end - begin for _, _, begin, end in windows), default=0)
        buffers = itertools.cycle([memoryview(bytearray(size)) for _ in windows[:2]])
        written: asyncio.Task[object] = asyncio.create_task(asyncio.sleep(0))
        try:
            for (first, last, begin, end), buffer in zip(windows, buffers, strict=False):
                view = buffer[: end - begin]
                await self.fetch(chunks[first:last], view, crcs=crcs and crcs[first:last])
                await written
                written = asyncio.create_task(_in_thread(write, view))
            await written
        finally:
            await asyncio.gather(written, return_exceptions=True)

    async def send(
        self,
        chunks: Sequence[Chunk],
        read: Callable[[list[memoryview]], int],
        *,
        ttl_ms: int | None = None,
    ) -> None:
        """Store chunks, whose bytes are read while the ones before are sent.

        Parameters
        ----------
        chunks
            Key and length of each.
        read
            Called in a thread, in order, with a view for each of the next chunks (about 1 MiB
            in all); fills them and returns the number of bytes, as
            ``lambda views: os.preadv(file, views, offset)`` does. From there the bytes go to
            the socket. The views are valid until it returns.
        ttl_ms
            Time to live of the chunks, ms.

        Raises
        ------
        EOFError
            `read` filled less than the views.

        Notes
        -----
        After an error some of the chunks may be stored: to delete them is up to the caller.
        """
        await self._watch(self._send(chunks, read, ttl_ms))

    async def _send(
        self,
        chunks: Sequence[Chunk],
        read: Callable[[list[memoryview]], int],
        ttl_ms: int | None,
    ) -> None:
        free: asyncio.Queue[tuple[ChunkProtocol, memoryview]] = asyncio.Queue()
        lanes = (self._connections * 2)[:REQUESTS]
        for connection in lanes:
            free.put_nowait((connection, NO_PAYLOAD))
        for first, last, begin, end in _requests(chunks, REQUEST_BYTES, REQUEST_CHUNKS):
            connection, buffer = await free.get()
            asked = chunks[first:last]
            request, buffer, payloads = lay_out_sets(asked, buffer, ttl_ms)
            filled = await _in_thread(read, payloads)
            if filled != end - begin:
                name = shown_key(asked[0][0])
                raise EOFError(
                    f"Only {filled} bytes of {end - begin} to read from chunk {name} on."
                )
            steps = (Step(b"+OK\r\n", key, 0) for key, _ in asked)
            done = functools.partial(free.put_nowait, (connection, buffer))
            connection.ask(request, Answer(steps, NO_PAYLOAD, done))
        for _ in lanes:
            await free.get()


def _requests(
    chunks: Sequence[Chunk], size: int, count: int
) -> Iterator[tuple[int, int, int, int]]:
    """Cut chunks into requests of at most `size` bytes and `count` chunks, but at least one chunk.

    Yields the indices of the first chunk and of the one after the last, and the bytes between
    which they lie.
    """
    first = begin = end = 0
    for index, (_, length) in enumerate(chunks):
        if index > first and (index - first >= count or end - begin + length > size):
            yield first, index, begin, end
            first, begin = index, end
        end += length
    if chunks:
        yield first, len(chunks), begin, end


def _check(chunks: Sequence[Chunk], region: memoryview, crcs: Sequence[int]) -> None:
    """Compare the CRC-32 of chunks that lie one after the other in `region`."""
    at = 0
    for (key, length), expected in zip(chunks, crcs, strict=True):
        if crc32(region[at : at + length]) != expected:
            raise DamagedError.of(shown_key(key))
        at += length


async def _in_thread(function: Callable[[Argument], Result], argument: Argument) -> Result:
    """`asyncio.to_thread`, but a cancellation waits for the thread: it uses the caller's files."""
    running = asyncio.get_running_loop().run_in_executor(None, function, argument)
    try:
        return await asyncio.shield(running)
    finally:
        await asyncio.gather(running, return_exceptions=True)


def raise_open_files(needed: int) -> None:
    """Raise the soft limit of open files to `needed`, where it is lower.

    Raises
    ------
    ServerError
        The hard limit is too low for that.
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


def finish(coroutine: Coroutine[Any, Any, Result]) -> Result:
    """Run a coroutine to its end, also where an event loop is running already (Jupyter).

    There it runs in a thread of its own, while this one waits. Ctrl-C cancels it either way, and
    is raised again when it has ended.
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
    """Writable memory of `size` bytes, all zero, that is faster to fill than a new bytearray.

    The page faults of fresh memory cost about as much time as the transfer. So this is in huge
    pages, which a thread has the kernel provide ahead of the transfer, where there is all that.
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
