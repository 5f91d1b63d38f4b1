"""The Redis protocol, as far as moving chunks needs it.

A Redis client makes a Python object of every reply, and its caller copies that to where it belongs.
Here every byte around the payloads is known before it comes. So `ChunkProtocol` compares instead of
parsing: payloads go from the socket to their final place, and any other answer is an error. The
format is RESP2: https://redis.io/docs/latest/develop/reference/protocol-spec/
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import redis
from redis.connection import DefaultParser

from dicomstore.errors import DamagedError, DicomRedisError, MissingChunkError
from dicomstore.server.connection import our_error

Chunk = tuple[bytes, int]  # key, and length in bytes

READ_BYTES = 256 << 10
WRITE_BYTES = 256 << 10
LINE_BYTES = 1024  # of an error reply, what is read before it is reported


class Step(NamedTuple):
    """A piece of an answer: framing, and the payload that it announces."""

    frame: bytes
    key: bytes
    length: int  # of the payload, bytes


class Answer(NamedTuple):
    """What the server is to answer to a request."""

    steps: Iterator[Step]
    region: memoryview  # where the payloads go, one after the other
    done: Callable[[], None]  # called when all of it has come


NO_PAYLOAD = memoryview(b"")
SILENCE = Step(b"\0", b"", 0)  # matches no answer


class ChunkProtocol(asyncio.BufferedProtocol):
    """One connection, and the answers that it awaits.

    Parameters
    ----------
    failed
        Called with the error when the connection or an answer on it goes wrong.
    scratch
        Where bytes go that have no place of their own. All connections may share it.
    read_bytes
        How much one read takes at least.

    Notes
    -----
    Payloads lie side by side in the region, and one read takes several of them with the framing
    between. The first is then in its place, and the others are moved down over the framing,
    while they are in the processor's cache. The end of a region comes by way of the scratch,
    with what follows it, so that a read never goes beyond the region.
    """

    def __init__(
        self,
        failed: Callable[[DicomRedisError], None],
        scratch: memoryview,
        *,
        read_bytes: int = READ_BYTES,
    ) -> None:
        self._failed = failed
        self._scratch = self._target = scratch
        self._read_bytes = read_bytes
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._answers: deque[Answer] = deque()
        self._outgoing = NO_PAYLOAD
        self._requests: deque[memoryview] = deque()
        self._writable = True
        self._step = SILENCE
        self._seen = b""  # what has come of the step's framing
        self._left = 0  # bytes that are still to come of the step's payload
        self._place = 0  # in the region, where they go
        self.closed: asyncio.Future[None] | None = None
        self.heard = self._loop.time()  # when there was the last progress

    @property
    def busy(self) -> bool:
        """Whether an answer is awaited."""
        return bool(self._answers)

    def lost(self, what: str) -> DicomRedisError:
        """Return the error for a connection that is of no use any more."""
        if self.busy and not self._step.key:
            what += " before it was open; the server may allow fewer connections"
        return our_error(redis.ConnectionError(what))

    def ask(self, request: bytes | memoryview, answer: Answer) -> None:
        """Send a request, which must stay as it is until the answer is done."""
        self._answers.append(answer)
        if len(self._answers) == 1:
            self.heard = self._loop.time()
            self._next()
        self._requests.append(memoryview(request))
        if self.closed and not self._transport:
            self._fail(self.lost("a connection was closed"))
        self._write()

    def abort(self) -> None:
        """Close at once, and let go of all buffers."""
        self._answers.clear()
        self._requests.clear()
        self._outgoing, self._target, self._step = NO_PAYLOAD, self._scratch, SILENCE
        if self._transport:
            transport, self._transport = self._transport, None
            transport.abort()

    def _fail(self, error: DicomRedisError) -> None:
        self.abort()
        self._failed(error)

    # --- called by asyncio ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self.closed = self._loop.create_future()
        self.heard = self._loop.time()
        transport.set_write_buffer_limits(high=1)  # TLS would never resume with 0
        self._write()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._transport and self.busy:
            how = f"lost ({exc})" if exc else "closed by the server"
            self._fail(self.lost(f"a connection was {how}"))
        self._transport = None
        if self.closed and not self.closed.done():  # cancelling the wait cancels it
            self.closed.set_result(None)

    def pause_writing(self) -> None:
        self._writable = False

    def resume_writing(self) -> None:
        self._writable = True
        self.heard = self._loop.time()
        self._write()

    def _write(self) -> None:
        while self._transport and self._writable and (self._outgoing or self._requests):
            # asyncio may copy what the socket does not take at once, so it is offered little.
            data = self._outgoing or self._requests.popleft()
            self._outgoing = data[WRITE_BYTES:]
            self._transport.write(data[:WRITE_BYTES])

    def get_buffer(self, sizehint: int) -> memoryview:
        region = self._answers[0].region if self._answers else NO_PAYLOAD
        if len(region) - self._place <= len(self._scratch):
            self._target = self._scratch
        else:
            end = self._place + max(self._left + 64, self._read_bytes)
            self._target = region[self._place : end]
        return self._target

    def buffer_updated(self, nbytes: int) -> None:
        self.heard = self._loop.time()
        data, in_place = self._target, self._target is not self._scratch
        at = 0
        while at < nbytes and self._transport:
            if self._left:
                size = min(self._left, nbytes - at)
                if at or not in_place:
                    region, place = self._answers[0].region, self._place
                    region[place : place + size] = data[at : at + size]
                at += size
                self._place += size
                self._left -= size
                if not self._left:
                    self._next()
                continue
            frame, seen = self._step.frame, self._seen
            end = min(at + max(len(frame) - len(seen), 0), nbytes)
            self._seen = seen = seen + bytes(data[at:end])
            at = end
            if seen == frame:
                self._seen = b""
                self._left = self._step.length
                if not self._left:
                    self._next()
            elif not frame.startswith(seen):
                self._seen += bytes(data[at:nbytes])
                self._report()
                return

    def _next(self) -> None:
        """Turn to the next step of the answer; after the last one, to the next answer."""
        step = next(self._answers[0].steps, None)
        if step:
            self._step = step
            return
        done = self._answers.popleft().done
        self._place, self._step = 0, SILENCE
        if self._answers:
            self._next()
        done()

    def _report(self) -> None:
        """Fail with what the server says instead, once the whole line has come."""
        pairs = enumerate(zip(self._seen, self._step.frame, strict=False))
        same = next(at for at, (is_so, should_be) in pairs if is_so != should_be)
        begin = self._seen.rfind(b"\n", 0, same) + 1
        line, complete, _ = self._seen[begin:].partition(b"\r\n")
        if not complete and len(line) < LINE_BYTES:
            return
        key = as_text(self._step.key)
        if key and line == b"$-1":
            self._fail(MissingChunkError.of([key]))
        elif key and line.startswith(b"$") and line[1:].isdigit():
            self._fail(DamagedError.of(key))
        elif line.startswith(b"-"):
            reply = DefaultParser.parse_error(as_text(line[1:]))  # type: ignore[no-untyped-call]
            self._fail(our_error(reply))
        else:
            self._fail(our_error(redis.ConnectionError("its answer is not RESP2")))


def as_text(key: bytes) -> str:
    """Return a key as errors show it."""
    return key.decode("utf-8", "backslashreplace")


def command(*words: bytes | str) -> bytes:
    """Return a command in RESP2: an array of bulk strings."""
    coded = [word.encode() if isinstance(word, str) else word for word in words]
    strings = [b"$%d\r\n%b\r\n" % (len(word), word) for word in coded]
    return b"*%d\r\n%b" % (len(words), b"".join(strings))


def greeting(user: str | None, password: str) -> tuple[bytes, bytes]:
    """Return the first request of a connection, and the answer to it."""
    if not user and not password:
        return command("PING"), b"+PONG\r\n"
    login = (user, password) if user else (password,)
    return command("AUTH", *login), b"+OK\r\n"


def mget_steps(chunks: Sequence[Chunk]) -> Iterator[Step]:
    """Yield the answer to an MGET of `chunks`."""
    before, key = b"*%d" % len(chunks), b""
    for key, length in chunks:
        yield Step(b"%b\r\n$%d\r\n" % (before, length), key, length)
        before = b""
    yield Step(b"\r\n", key, 0)


def set_steps(chunks: Sequence[Chunk]) -> Iterator[Step]:
    """Yield the answers to a SET of each of `chunks`."""
    return (Step(b"+OK\r\n", key, 0) for key, _ in chunks)


def lay_out_sets(
    chunks: Sequence[Chunk], buffer: memoryview, ttl_ms: int | None
) -> tuple[memoryview, memoryview, list[memoryview]]:
    """Write one SET per chunk to `buffer`, without the payloads.

    Returns
    -------
    memoryview, memoryview, list of memoryview
        The commands; the buffer, a new one if it was too small; the places of the payloads.
    """
    words, tail = 3, b"\r\n"
    if ttl_ms is not None:
        words, tail = 5, b"\r\n$2\r\nPX\r\n$%d\r\n%d\r\n" % (len(str(ttl_ms)), ttl_ms)
    size = sum(len(key) + length + len(tail) + 64 for key, length in chunks)
    if len(buffer) < size:
        buffer = memoryview(bytearray(size))
    places, at = [], 0
    for key, length in chunks:
        head = b"*%d\r\n$3\r\nSET\r\n$%d\r\n%b\r\n$%d\r\n" % (words, len(key), key, length)
        begin = at + len(head)
        end = begin + length
        buffer[at:begin] = head
        places.append(buffer[begin:end])
        at = end + len(tail)
        buffer[end:at] = tail
    return buffer[:at], buffer, places
