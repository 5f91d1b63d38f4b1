"""wire: the protocol driven directly, and the stream against a real server."""

import asyncio
import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st

from dicomstore.blobs import wire
from dicomstore.blobs.memory import POPULATE_BYTES, fresh_buffer
from dicomstore.blobs.protocol import READ_BYTES, Answer, Chunk, ChunkProtocol, mget_steps
from dicomstore.blobs.wire import ChunkStream
from dicomstore.errors import (
    DamagedError,
    DicomRedisError,
    MissingChunkError,
    RefusedError,
    ServerError,
)
from dicomstore.server.connection import Server
from dicomstore.server.embedded import RedisServer

# The protocol, fed by hand


class Wire(asyncio.Transport):
    """A transport that only remembers whether it was given up."""

    aborted = False

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    def write(self, data: Any) -> None:
        pass

    def abort(self) -> None:
        self.aborted = True


PATTERN = 0xEE
GUARD = 16
payloads = st.binary(max_size=300) | st.sampled_from(
    [b"", b"\r\n", b"$-1\r\n", b"\r\n$5\r\n", b"x" * 1000]
)
answers = st.lists(st.lists(payloads, min_size=1, max_size=5), min_size=1, max_size=4)
split_sizes = st.lists(st.integers(1, 400), min_size=1, max_size=30)


def reply(payloads: Sequence[bytes], other: dict[int, bytes] | None = None) -> bytes:
    """What a server answers to an MGET; `other` replaces some of the elements."""
    elements = [b"$%d\r\n%b\r\n" % (len(payload), payload) for payload in payloads]
    for index, element in (other or {}).items():
        elements[index] = element
    return b"*%d\r\n" % len(payloads) + b"".join(elements)


class Driven:
    """A protocol that awaits MGETs, all of whose data have a place in one guarded buffer."""

    def __init__(
        self, answers: Sequence[Sequence[bytes]], scratch: int, read_bytes: int = READ_BYTES
    ) -> None:
        self.payloads = [b"".join(each) for each in answers]
        self.buffer = bytearray([PATTERN]) * (2 * GUARD + sum(map(len, self.payloads)))
        self.done: list[int] = []
        self.errors: list[DicomRedisError] = []
        self.protocol = ChunkProtocol(
            self.errors.append, memoryview(bytearray(scratch)), read_bytes=read_bytes
        )
        self.wire = Wire()
        self.protocol.connection_made(self.wire)
        begin = GUARD
        for number, (pieces, data) in enumerate(zip(answers, self.payloads, strict=True)):
            chunks = [(b"k%d.%d" % (number, i), len(one)) for i, one in enumerate(pieces)]
            region = memoryview(self.buffer)[begin : begin + len(data)]
            steps = mget_steps(chunks)
            self.protocol.ask(b"?", Answer(steps, region, lambda n=number: self.done.append(n)))
            begin += len(data)

    def feed(self, stream: bytes, sizes: Sequence[int]) -> None:
        at, turn = 0, 0
        while at < len(stream) and not self.wire.aborted:
            place = self.protocol.get_buffer(-1)
            assert len(place) > 0
            size = min(len(place), sizes[turn % len(sizes)], len(stream) - at)
            place[:size] = stream[at : at + size]
            self.protocol.buffer_updated(size)
            at, turn = at + size, turn + 1
            self.check_regions()

    def check_regions(self) -> None:
        """What is done is right, what is to come is untouched, and so is all around."""
        begin = GUARD
        for number, data in enumerate(self.payloads):
            held = self.buffer[begin : begin + len(data)]
            if number in self.done:
                assert held == data
            elif number > len(self.done):
                assert held == bytes([PATTERN]) * len(data)
            begin += len(data)
        guards = self.buffer[:GUARD] + self.buffer[begin:]
        assert guards == bytes([PATTERN]) * (2 * GUARD)


def in_loop(function: Callable[[], None]) -> None:
    async def call() -> None:
        function()

    asyncio.run(call())


@given(answers, split_sizes, st.integers(1, 80), st.integers(1, 400))
def test_any_split_gives_the_same_bytes(
    answers: list[list[bytes]], sizes: list[int], scratch: int, read: int
) -> None:
    """However the answers are cut into reads, every payload ends in its place and only there."""

    def check() -> None:
        driven = Driven(answers, scratch, read)
        driven.feed(b"".join(map(reply, answers)), sizes)
        assert driven.done == list(range(len(answers)))
        assert not driven.errors and not driven.protocol.busy

    in_loop(check)


WRONG = {
    b"$-1\r\n": (MissingChunkError, "The chunk {} is missing."),
    b"$2000\r\n" + bytes(2000) + b"\r\n": (DamagedError, "The chunk {} is damaged: its length"),
    b"-OOM out of memory\r\n": (RefusedError, "refused a command: out of memory."),
    b"+OK\r\n": (ServerError, "not RESP2"),
    b"$x\r\n": (ServerError, "not RESP2"),
    b"*1\r\n$1\r\nx\r\n": (ServerError, "not RESP2"),
}


@given(answers, split_sizes, st.integers(1, 80), st.sampled_from(list(WRONG)), st.data())
def test_any_split_of_a_wrong_answer_gives_the_same_error(
    answers: list[list[bytes]], sizes: list[int], scratch: int, wrong: bytes, data: st.DataObject
) -> None:
    """A wrong element is reported with its key; what came before it is kept, and nothing more."""
    bad = data.draw(st.integers(0, len(answers) - 1))
    index = data.draw(st.integers(0, len(answers[bad]) - 1))
    kind, words = WRONG[wrong]
    replies = [reply(one, {index: wrong} if n == bad else None) for n, one in enumerate(answers)]

    def check() -> None:
        driven = Driven(answers, scratch)
        driven.feed(b"".join(replies), sizes)
        assert driven.done == list(range(bad))
        assert driven.wire.aborted
        (error,) = driven.errors
        key = f"k{bad}.{index}"
        assert type(error) is kind and words.format(key) in str(error)
        assert getattr(error, "keys", (key,)) == (key,)

    in_loop(check)


@given(
    split_sizes,
    st.sampled_from([(b"-LOADING in memory\r\n", ServerError), (b"-NOPERM no\r\n", RefusedError)]),
)
def test_error_in_place_of_the_array(
    sizes: list[int], wrong: tuple[bytes, type[ServerError]]
) -> None:
    """An error to the MGET as a whole is reported in the server's words."""

    def check() -> None:
        driven = Driven([[b"abc", b"def"]], 8)
        line, kind = wrong
        driven.feed(line, sizes)
        (error,) = driven.errors
        assert type(error) is kind and line.decode().split(" ", 1)[1].strip() in str(error)

    in_loop(check)


def test_arguments_of_an_unknown_command_are_not_repeated() -> None:
    """An error text of the server that quotes the data sent is cut before them."""

    def check() -> None:
        driven = Driven([[b"abc"]], 64)
        driven.feed(b"-ERR unknown command 'SET', with args beginning with: 'Doe^Jane'\r\n", [99])
        assert "unknown command" in str(driven.errors[0]) and "Doe" not in str(driven.errors[0])

    in_loop(check)


def test_answer_that_nobody_asked_for() -> None:
    """Bytes that come when nothing is outstanding are an error, not the next answer."""

    def check() -> None:
        driven = Driven([[b"abc"]], 64)
        driven.feed(reply([b"abc"]) + b"$3\r\nabc\r\n", [999])
        assert driven.done == [0] and type(driven.errors[0]) is ServerError

    in_loop(check)


# The stream, against a server


def make_chunks(name: str, sizes: Sequence[int]) -> tuple[list[Chunk], bytes]:
    data = random.Random(name).randbytes(sum(sizes))
    return [(f"chunk:{name}:{n}".encode(), size) for n, size in enumerate(sizes)], data


def store(client: redis.Redis, chunks: Sequence[Chunk], data: bytes) -> None:
    pipeline, at = client.pipeline(transaction=False), 0
    for key, length in chunks:
        pipeline.set(key, data[at : at + length])
        at += length
    pipeline.execute()


def reader(data: bytes) -> Callable[[list[memoryview]], int]:
    """A `read` that takes the bytes from memory."""
    at = 0

    def read(views: list[memoryview]) -> int:
        nonlocal at
        begin = at
        for view in views:
            piece = data[at : at + len(view)]
            view[: len(piece)] = piece
            at += len(piece)
        return at - begin

    return read


async def fetch(client: redis.Redis, chunks: Sequence[Chunk], **options: Any) -> bytearray:
    buffer = bytearray(sum(length for _, length in chunks))
    crcs = options.pop("crcs", None)
    async with ChunkStream(client, **options) as stream:
        await stream.fetch(chunks, buffer, crcs=crcs)
    return buffer


def in_own_loop(work: Coroutine[Any, Any, Any]) -> Any:
    """Run `work`; afterwards no task of it and no connection may be left."""

    async def checked() -> Any:
        try:
            return await work
        finally:
            assert asyncio.all_tasks() == {asyncio.current_task()}

    with contextlib.closing(asyncio.Runner()) as runner:
        return runner.run(checked())


def connected(client: redis.Redis) -> int:
    return client.info("clients")["connected_clients"]


def assert_connected(client: redis.Redis, number: int) -> None:
    """The server has just so many clients, as soon as it has noticed who left."""
    for _ in range(100):
        if connected(client) == number:
            return
        time.sleep(0.05)
    raise AssertionError(f"{connected(client)} clients are connected, not {number}.")


@pytest.fixture
def client(server: RedisServer) -> Any:
    with redis.Redis.from_url(server.url) as client:
        yield client


SIZES = [30_720] * 200 + [1, 0, 17, 262_080, 3_000_000, 0, 5]


@pytest.fixture(scope="module")
def stored(server: RedisServer) -> tuple[list[Chunk], bytes]:
    chunks, data = make_chunks("stored", SIZES)
    with redis.Redis.from_url(server.url) as client:
        store(client, chunks, data)
    return chunks, data


@pytest.mark.parametrize("connections", [1, 2, 8, 300])
def test_fetch(client: redis.Redis, stored: Any, connections: int) -> None:
    """Chunks of all sizes arrive as stored, over any number of connections."""
    chunks, data = stored
    assert in_own_loop(fetch(client, chunks, connections=connections)) == data


def test_fetch_nothing(client: redis.Redis) -> None:
    """No chunks are no bytes, at once."""
    assert in_own_loop(fetch(client, [])) == b""


def test_every_connection_is_at_work(client: redis.Redis, stored: Any) -> None:
    """With as many connections as chunks, each of them fetches one."""
    chunks, _ = stored
    before = client.info("commandstats").get("cmdstat_mget", {"calls": 0})["calls"]
    in_own_loop(fetch(client, chunks[:200], connections=200))
    assert client.info("commandstats")["cmdstat_mget"]["calls"] - before == 200


def test_one_stream_serves_many_transfers(client: redis.Redis, stored: Any) -> None:
    """Connections are opened once, and closed at the end."""
    chunks, data = stored
    assert_connected(client, 1)

    async def work() -> None:
        async with ChunkStream(client, connections=3) as stream:
            assert await asyncio.to_thread(connected, client) == 4
            for _ in range(3):
                buffer = bytearray(len(data))
                await stream.fetch(chunks, buffer)
                assert buffer == data
            assert await asyncio.to_thread(connected, client) == 4

    in_own_loop(work())
    assert_connected(client, 1)


def test_buffer_of_another_length_or_read_only(client: redis.Redis) -> None:
    """A buffer that does not fit is refused before anything is asked for."""

    async def work(buffer: Any) -> None:
        async with ChunkStream(client, connections=1) as stream:
            await stream.fetch([(b"chunk:none", 5)], buffer)

    with pytest.raises(ValueError, match="5 writable bytes are needed, not 4 writable"):
        in_own_loop(work(bytearray(4)))
    with pytest.raises(ValueError, match="not 5 read-only"):
        in_own_loop(work(b"12345"))


def test_wrong_chunks(client: redis.Redis, stored: Any) -> None:
    """A missing, longer, shorter or foreign chunk amid others is named, with both lengths."""
    chunks, data = make_chunks("wrong", [5_000] * 100)
    store(client, chunks, data)
    key = chunks[61][0].decode()
    for value, kind, words in (
        (None, MissingChunkError, f"The chunk {key} is missing."),
        (b"x" * 5_001, DamagedError, f"The chunk {key} is damaged: its length"),
        (b"x" * 4_999, DamagedError, f"The chunk {key} is damaged: its length"),
    ):
        client.set(key, value) if value else client.delete(key)
        with pytest.raises(kind) as caught:
            in_own_loop(fetch(client, chunks))
        assert str(caught.value).startswith(words) and caught.value.keys == (key,)


def test_crc(client: redis.Redis, stored: Any) -> None:
    """The CRC-32 of every chunk is compared, and a wrong one is an error that names the chunk."""
    chunks, data = stored
    ends = [sum(SIZES[: n + 1]) for n in range(len(SIZES))]
    crcs = [zlib.crc32(data[end - size : end]) for end, size in zip(ends, SIZES, strict=True)]
    assert in_own_loop(fetch(client, chunks, crcs=crcs)) == data
    for index in (0, 150, len(crcs) - 1):
        wrong = [crc ^ (n == index) for n, crc in enumerate(crcs)]
        with pytest.raises(DamagedError, match="CRC-32") as caught:
            in_own_loop(fetch(client, chunks, crcs=wrong))
        assert caught.value.keys == (chunks[index][0].decode(),)


# Windows


def test_copy(client: redis.Redis, stored: Any) -> None:
    """Bytes are passed on in order, in pieces of bounded size, and checked before."""
    chunks, data = stored
    written, largest = bytearray(), 0

    def write(view: memoryview) -> None:
        nonlocal largest
        written.extend(view)
        largest = max(largest, len(view))

    async def work(crcs: Sequence[int] | None) -> None:
        async with ChunkStream(client) as stream:
            await stream.copy(chunks, write, crcs=crcs)

    in_own_loop(work(None))
    assert written == data and largest == max(SIZES)
    written.clear()
    with pytest.raises(DamagedError):
        in_own_loop(work([0] * len(chunks)))
    assert not written


def test_copy_ends_with_the_error_of_its_writer(client: redis.Redis, stored: Any) -> None:
    """What `write` raises comes out, and `write` is not called again."""
    calls = []

    def write(view: memoryview) -> None:
        calls.append(len(view))
        raise OSError("disk full")

    async def work() -> None:
        async with ChunkStream(client) as stream:
            await stream.copy(stored[0], write)

    with pytest.raises(OSError, match="disk full"):
        in_own_loop(work())
    assert len(calls) == 1


def test_failed_copy_waits_for_its_writer(client: redis.Redis, stored: Any) -> None:
    """After an error no thread uses the caller's file any more."""
    chunks, _ = stored
    go_on, ended = threading.Event(), []

    def write(view: memoryview) -> None:
        go_on.wait(10)
        ended.append(len(view))

    async def work() -> None:
        async with ChunkStream(client) as stream:
            asyncio.get_running_loop().call_later(0.1, go_on.set)
            with pytest.raises(MissingChunkError):
                missing = (b"chunk:none", 1)
                await stream.copy([*chunks[:100], missing], write)
            assert ended

    in_own_loop(work())


def test_cancelled_copy_waits_for_its_writer(client: redis.Redis, stored: Any) -> None:
    """After a cancellation no thread uses the caller's file any more."""
    writing, go_on, ended = threading.Event(), threading.Event(), []

    def write(view: memoryview) -> None:
        writing.set()
        go_on.wait(10)
        ended.append(len(view))

    async def work() -> None:
        async with ChunkStream(client) as stream:
            task = asyncio.create_task(stream.copy(stored[0], write))
            await asyncio.to_thread(writing.wait, 10)
            task.cancel()
            asyncio.get_running_loop().call_later(0.05, go_on.set)
            with pytest.raises(asyncio.CancelledError):
                await task
            assert ended

    in_own_loop(work())


# The way in


async def send(client: redis.Redis, chunks: Sequence[Chunk], read: Any, **options: Any) -> None:
    ttl_ms = options.pop("ttl_ms", None)
    async with ChunkStream(client, **options) as stream:
        await stream.send(chunks, read, ttl_ms=ttl_ms)


@pytest.mark.parametrize("connections", [1, 8, 40])
def test_send(client: redis.Redis, connections: int, tmp_path: Path) -> None:
    """What is read from a file is stored under its keys, without a time to live."""
    chunks, data = make_chunks(f"sent{connections}", SIZES * 3)
    (tmp_path / "file").write_bytes(data)
    file = os.open(tmp_path / "file", os.O_RDONLY)
    offset = 0

    def read(views: list[memoryview]) -> int:
        nonlocal offset
        size = os.preadv(file, views, offset)
        offset += size
        return size

    try:
        in_own_loop(send(client, chunks, read, connections=connections))
    finally:
        os.close(file)
    assert b"".join(client.mget([key for key, _ in chunks])) == data
    assert client.pttl(chunks[0][0]) == -1


def test_send_with_expiry(client: redis.Redis) -> None:
    """Every chunk gets the time to live."""
    chunks, data = make_chunks("expiring", [1_000] * 50 + [0])
    in_own_loop(send(client, chunks, reader(data), ttl_ms=60_000))
    assert b"".join(client.mget([key for key, _ in chunks])) == data
    assert all(50_000 < client.pttl(key) <= 60_000 for key, _ in chunks)


def test_send_of_a_file_that_is_too_short(client: redis.Redis) -> None:
    """A short read is an error, and what was not read is not sent."""
    chunks, data = make_chunks("short", [400_000] * 10)
    with pytest.raises(EOFError, match="chunk:short:"):
        in_own_loop(send(client, chunks, reader(data[:-1])))
    assert not client.exists(chunks[-1][0])


def test_send_ends_with_the_error_of_its_reader(client: redis.Redis) -> None:
    """What `read` raises comes out."""

    def read(views: list[memoryview]) -> int:
        raise OSError("disk gone")

    with pytest.raises(OSError, match="disk gone"):
        in_own_loop(send(client, make_chunks("gone", [10])[0], read))


def test_send_to_a_full_server() -> None:
    """A SET that the server refuses is the same error by the wire as by a pipeline."""
    chunks, data = make_chunks("full", [100_000] * 300)
    config = "maxmemory 12mb\nmaxmemory-policy noeviction"
    with RedisServer(config=config.splitlines()) as full, redis.Redis.from_url(full.url) as client:
        with pytest.raises(RefusedError) as by_wire:
            in_own_loop(send(client, chunks, reader(data)))
        client.config_set("maxmemory", 1)  # what was in the buffers of the stream is free again
        with pytest.raises(RefusedError) as by_pipeline:
            Server(client).command("SET", "a", "x")
        assert str(by_wire.value) == str(by_pipeline.value)
        assert by_wire.value.reply == by_pipeline.value.reply
        assert not client.exists(chunks[-1][0])


# Ways to connect


def test_acl_user(server: RedisServer, client: redis.Redis, stored: Any) -> None:
    """An ACL user logs in by name, and may do what it may do."""
    chunks, data = stored
    client.acl_setuser(
        "reader",
        enabled=True,
        reset=True,
        passwords=["+s3cret"],
        keys=["chunk:*"],
        commands=["+mget"],
    )
    with redis.Redis(port=server.port, username="reader", password="s3cret") as other:
        assert in_own_loop(fetch(other, chunks)) == data
        new, new_data = make_chunks("new", [9])
        with pytest.raises(RefusedError) as by_wire:
            in_own_loop(send(other, new, reader(new_data)))
        with pytest.raises(RefusedError, match="permission") as by_pipeline:
            Server(other).command("SET", *new[0])
        assert str(by_wire.value) == str(by_pipeline.value)


def test_wrong_password(server: RedisServer) -> None:
    """A refused login is an error in the server's words, without the password."""
    other = redis.Redis(port=server.port, password="not-the-one")
    with other, pytest.raises(ServerError, match="invalid username-password pair") as caught:
        in_own_loop(fetch(other, [(b"chunk:x", 1)]))
    assert "not-the-one" not in str(caught.value)


def test_no_password_and_unix_socket(tmp_path: Path) -> None:
    """A server without a password is reached over TCP and over its unix socket."""
    path = tmp_path / "redis.sock"
    chunks, data = make_chunks("open", SIZES)
    with RedisServer(config=[f"unixsocket {path}"]) as other:
        with redis.Redis.from_url(other.url) as client:
            store(client, chunks, data)
            client.config_set("requirepass", "")
        for url in (f"redis://localhost:{other.port}", f"unix://{path}"):
            with redis.Redis.from_url(url) as client:
                assert in_own_loop(fetch(client, chunks, connections=100)) == data
                in_own_loop(send(client, chunks, reader(data)))


def make_certificates(folder: Path) -> None:
    """A private CA, and a certificate for localhost that it signed, with the openssl command."""
    new = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    new += ["-noenc", "-days", "2"]
    ca = ["-subj", "/CN=test CA", "-keyout", "ca.key", "-out", "ca.crt"]
    # From Python 3.13 on, TLS takes only an authority whose certificate says what it is for.
    ca += ["-addext", "keyUsage=critical,keyCertSign"]
    own = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-CA", "ca.crt"]
    own += ["-CAkey", "ca.key", "-keyout", "own.key", "-out", "own.crt"]
    own += ["-addext", "basicConstraints=critical,CA:FALSE"]
    for arguments in (ca, own):
        subprocess.run([*new, *arguments], cwd=folder, check=True, capture_output=True)


def test_tls(tmp_path: Path) -> None:
    """TLS with a private CA and a client certificate; without them it is refused."""
    make_certificates(tmp_path)
    with RedisServer() as probe:
        pass  # its port is free now
    own, key, ca = (tmp_path / name for name in ("own.crt", "own.key", "ca.crt"))
    tls = f"tls-port {probe.port}\ntls-cert-file {own}\ntls-key-file {key}\ntls-ca-cert-file {ca}"
    chunks, data = make_chunks("tls", SIZES)
    with RedisServer(config=tls.splitlines()) as other:
        url = other.url.replace("redis://", "rediss://").replace(str(other.port), str(probe.port))
        url = url.replace("127.0.0.1", "localhost")
        good = f"{url}?ssl_ca_certs={ca}&ssl_certfile={own}&ssl_keyfile={key}"
        with redis.Redis.from_url(good) as client:
            assert client.connection_pool.connection_class is redis.SSLConnection
            in_own_loop(send(client, chunks, reader(data)))
            assert in_own_loop(fetch(client, chunks, connections=20)) == data
        for wrong, words in (
            (url, "CERTIFICATE_VERIFY_FAILED"),
            (good.replace("localhost", "127.0.0.1"), "certificate is not valid for"),
            (f"{url}?ssl_ca_certs={ca}", "connection"),
        ):
            client = redis.Redis.from_url(wrong)
            with client, pytest.raises(ServerError, match=words):
                in_own_loop(fetch(client, chunks))


# What goes wrong


def test_nobody_listens() -> None:
    """No server is one sentence."""
    with RedisServer() as gone:
        pass
    with (
        redis.Redis.from_url(gone.url) as client,
        pytest.raises(ServerError, match="Redis does not answer: cannot connect"),
    ):
        in_own_loop(fetch(client, [(b"chunk:x", 1)]))


@contextlib.asynccontextmanager
async def proxy(port: int, cut: int) -> AsyncIterator[redis.Redis]:
    """A client of a server in between that ends a connection after `cut` bytes of answers."""
    handlers = []

    async def upwards(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await source.read(1 << 16):
                sink.write(data)
        sink.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        handlers.append(asyncio.current_task())
        above, below = await asyncio.open_connection("127.0.0.1", port)
        asking = asyncio.create_task(upwards(reader, below))
        left = cut
        with contextlib.suppress(ConnectionError):
            while left and (data := await above.read(min(left, 1 << 16))):
                writer.write(data)
                await writer.drain()
                left -= len(data)
        below.close()
        writer.transport.abort() if cut % 2 else writer.close()
        await asyncio.gather(
            asking, below.wait_closed(), writer.wait_closed(), return_exceptions=True
        )

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as listener:
        with redis.Redis(port=listener.sockets[0].getsockname()[1]) as client:
            yield client
        await asyncio.gather(*handlers)


def test_connection_cut_anywhere(server: RedisServer, client: redis.Redis, stored: Any) -> None:
    """A connection that ends after any number of bytes is an error, at the login and later."""
    chunks, _ = stored
    whole = sum(length for _, length in chunks)
    draw = random.Random(3)
    password = client.connection_pool.connection_kwargs["password"]

    async def work(cut: int) -> None:
        async with proxy(server.port, cut) as between:
            between.connection_pool.connection_kwargs["password"] = password
            with pytest.raises(ServerError, match="Redis does not answer") as caught:
                await fetch(between, chunks, connections=2, timeout=5)
        assert ("before it was open" in str(caught.value)) == (cut < 5)

    for cut in [0, 1, 4, 5, 6, 7, *(draw.randrange(whole // 2) for _ in range(25))]:
        in_own_loop(work(cut))


@contextlib.asynccontextmanager
async def scripted(*answers: bytes) -> AsyncIterator[redis.Redis]:
    """A client of an endpoint that gives one answer to each request, and then none."""
    handlers = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        handlers.append(asyncio.current_task())
        for answer in answers:
            await reader.read(1000)
            writer.write(answer)
        while await reader.read(1000):
            pass
        writer.close()
        await writer.wait_closed()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as listener:
        with redis.Redis(port=listener.sockets[0].getsockname()[1]) as client:
            yield client
        await asyncio.gather(*handlers)


@pytest.mark.parametrize(
    "answers",
    [
        [],
        [b"+PO"],
        [b"+PONG\r\n"],
        [b"+PONG\r\n", b"*1\r\n$3\r\nabc\r\n", b"*1\r\n$3\r\nx"],
    ],
)
def test_stalled_server(answers: list[bytes]) -> None:
    """A server that falls silent, at whatever point, is an error within the timeout."""

    async def work() -> None:
        async with scripted(*answers) as client:
            chunks = [(b"chunk:a", 3), (b"chunk:b", 3)]
            with pytest.raises(ServerError, match=r"silent for 0\.3 s"):
                work = fetch(client, chunks, connections=1, requests=1, timeout=0.3)
                await asyncio.wait_for(work, 5)

    in_own_loop(work())


def test_loading_server() -> None:
    """A server that is still loading its data says so."""

    async def work() -> None:
        async with scripted(b"-LOADING Redis is loading the dataset in memory\r\n") as client:
            with pytest.raises(ServerError, match="is loading the dataset"):
                await fetch(client, [(b"chunk:x", 1)], timeout=5)

    in_own_loop(work())


@pytest.mark.parametrize("way", ["copy", "send"])
def test_server_killed_in_mid_transfer(way: str) -> None:
    """A server that dies while it sends, or while it is sent to, is an error."""
    chunks, data = make_chunks("killed", [1_000_000] * 60)
    calls = iter(range(60))

    with RedisServer() as victim, redis.Redis.from_url(victim.url) as client:
        process = client.info("server")["process_id"]

        def pass_on(views: Any) -> int:
            if next(calls) == 30:
                os.kill(process, signal.SIGKILL)
            return 1_000_000

        async def work() -> None:
            async with ChunkStream(client, timeout=5) as stream:
                await getattr(stream, way)(chunks, pass_on)

        store(client, chunks, data)
        with pytest.raises(ServerError, match=r"a connection was (closed|lost)"):
            in_own_loop(work())


def test_connections_closed_between_transfers(client: redis.Redis, stored: Any) -> None:
    """A connection that the server closed meanwhile is an error at once."""
    chunks, data = stored

    async def work() -> None:
        async with ChunkStream(client, connections=2, timeout=20) as stream:
            await stream.fetch(chunks, bytearray(len(data)))
            await asyncio.to_thread(client.client_kill_filter, _type="normal", skipme=True)
            await asyncio.sleep(0.1)
            with pytest.raises(ServerError, match="a connection was closed"):
                await asyncio.wait_for(stream.fetch(chunks, bytearray(len(data))), 5)

    in_own_loop(work())


def test_cancelled_fetch(client: redis.Redis, stored: Any) -> None:
    """A cancellation in mid-transfer closes every connection and lets go of the buffer."""
    chunks, data = stored
    assert_connected(client, 1)

    async def work() -> None:
        buffer = bytearray(len(data))
        async with ChunkStream(client) as stream:
            task = asyncio.create_task(stream.fetch(chunks, buffer))
            await asyncio.sleep(0.001)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            with pytest.raises(ServerError, match="failed before"):
                await stream.fetch(chunks, bytearray(len(data)))

    in_own_loop(work())
    assert_connected(client, 1)


def test_too_many_connections_for_the_server() -> None:
    """A server that allows fewer clients is one sentence, and no connection stays."""
    with RedisServer(config=["maxclients 20"]) as small, redis.Redis.from_url(small.url) as client:
        assert connected(client) == 1
        with pytest.raises(ServerError, match=r"fewer|max number of clients"):
            in_own_loop(fetch(client, [(b"chunk:x", 1)], connections=100, timeout=5))
        assert_connected(client, 1)


LIMITED = """
import resource, sys
sys.path.insert(0, {folder!r})
resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))
import asyncio, redis
from dicomstore.blobs.wire import ChunkStream
async def work():
    async with ChunkStream(redis.Redis.from_url({url!r}), connections=300):
        print("open")
asyncio.run(work())
"""


def test_open_files(server: RedisServer) -> None:
    """The soft limit of open files is raised; the hard one is an error with a command to type."""
    folder = str(Path(wire.__file__).parents[2])

    def limited(soft: int, hard: int) -> subprocess.CompletedProcess[str]:
        code = LIMITED.format(folder=folder, soft=soft, hard=hard, url=server.url)
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    assert limited(100, 1000).stdout == "open\n"
    assert "`ulimit -n 428`" in limited(100, 400).stderr


# complete() and fresh_buffer()


def test_complete_with_and_without_a_loop(client: redis.Redis, stored: Any) -> None:
    """A transfer comes to its end in plain code, and where a loop is at work already."""
    chunks, data = stored

    async def notebook() -> bytearray:
        with pytest.raises(MissingChunkError):
            wire.complete(fetch(client, [(b"chunk:none", 1)]))
        return wire.complete(fetch(client, chunks))

    before = threading.active_count()
    assert wire.complete(fetch(client, chunks)) == data
    assert asyncio.run(notebook()) == data
    assert threading.active_count() == before


@pytest.mark.parametrize("inside", [False, True])
def test_interrupt(inside: bool) -> None:
    """Ctrl-C cancels the coroutine, waits for its clean-up, and comes out."""
    ended = []

    async def work() -> None:
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
        try:
            await asyncio.sleep(10)
        except asyncio.CancelledError:
            await asyncio.sleep(0.01)
            ended.append(True)
            raise

    async def notebook() -> None:
        wire.complete(work())

    with pytest.raises(KeyboardInterrupt):
        if inside:
            loop = asyncio.new_event_loop()
            try:
                loop.run_until_complete(notebook())
            finally:
                loop.close()
        else:
            wire.complete(work())
    assert ended


@pytest.mark.parametrize("size", [0, 1, 5_000, POPULATE_BYTES * 2 + 5])
def test_fresh_buffer(size: int) -> None:
    """It is a writable buffer of zeros, of just this size, and populating it changes nothing."""
    buffer = fresh_buffer(size)
    assert len(buffer) == size and not buffer.readonly
    buffer[: size // 2] = b"x" * (size // 2)
    for thread in threading.enumerate():
        if thread.name == "populate":
            thread.join(10)
    assert buffer == b"x" * (size // 2) + bytes(size - size // 2)
