"""The reader behaves as Python's own files do, and fetches what it says and no more."""

import gc
import hashlib
import io
import multiprocessing
import os
import pickle
import shutil
import threading
import tracemalloc
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from itertools import chain

import numpy as np
import pytest
from conftest import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import dicom

from dicomstore import DicomStore
from dicomstore.blobs.manifest import Manifest, plan_tail
from dicomstore.blobs.reader import ChunkReader
from dicomstore.errors import AmbiguousNameError, DamagedError, MissingChunkError, NotStoredError

RANDOM = np.random.default_rng(4).bytes(1 << 20)
#: The same with lines of about five bytes, empty ones among them.
LINES = RANDOM.translate(b"\n" * 50 + bytes(range(50, 256)))


class Memory:
    """Chunks in memory in the place of a server, and what was asked of them."""

    def __init__(self, data, chunk_size, tail=None):
        tail = plan_tail(len(data), chunk_size) if tail is None else tail
        self.manifest = Manifest("file:x", "0" * 12, len(data), chunk_size, tail)
        self.broken = set()
        self.asked = []
        self._data = data

    def fetch(self, numbers):
        self.asked.append(list(numbers))
        for number in numbers:
            if number in self.broken:
                raise MissingChunkError(self.manifest.chunk_key(number))
        starts = [(self.manifest.offset(n), self.manifest.length(n)) for n in numbers]
        return [self._data[start : start + length] for start, length in starts]

    def open(self, **options):
        return ChunkReader(self.manifest, self.fetch, name="x", **options)


# --- as io.BytesIO -------------------------------------------------------------------------------


def outcome(action):
    """Return what an action gives, or the type of what it raises."""
    try:
        return action()
    except Exception as error:
        return type(error)


def compare(reader, peer, steps):
    """Take the same steps in both files; they give and raise the same and end at one place."""
    for name, *arguments in steps:
        if name == "readinto":
            ours, theirs = bytearray(arguments[0]), bytearray(arguments[0])
            assert outcome(lambda b=ours: reader.readinto(b)) == outcome(
                lambda b=theirs: peer.readinto(b)
            )
            assert ours == theirs
        elif name == "peek" or (name == "read1" and arguments in ([], [-1])):
            # As much as is at hand: more than nothing before the end.
            found = outcome(lambda name=name: getattr(reader, name)())
            position = outcome(peer.tell)
            whole = outcome(peer.read)
            if isinstance(found, bytes):
                assert whole.startswith(found) and bool(found) == bool(whole)
                peer.seek(position + (len(found) if name == "read1" else 0))
            else:
                assert found == whole
        else:
            ours, theirs = (
                outcome(lambda f=f, n=name, a=arguments: getattr(f, n)(*a)) for f in (reader, peer)
            )
            assert ours == theirs, (name, arguments)
        assert outcome(reader.tell) == outcome(peer.tell)


def steps(size):
    near = st.integers(-size - 3, 2 * size + 3)
    count = st.one_of(st.none(), st.integers(-2, size + 3))
    return st.lists(
        st.one_of(
            st.tuples(st.just("seek"), near, st.sampled_from([0, 1, 2])),
            st.tuples(st.just("seek"), near),
            st.tuples(st.just("read"), count),
            st.tuples(st.just("read"), st.integers(0, 5)),
            st.tuples(st.just("read1"), st.integers(-1, size + 3)),
            st.tuples(st.just("readinto"), st.integers(0, size + 3)),
            st.tuples(st.just("readline"), st.integers(-1, size)),
            st.tuples(st.just("readlines"), st.integers(-1, size)),
            st.tuples(st.sampled_from(["readline", "__next__", "__next__", "readlines"])),
            st.tuples(st.sampled_from(["read", "read1", "peek", "tell", "readable", "seekable"])),
            st.sampled_from(
                [("seek", 0, 3), ("seek", 1.5), ("read", "1"), ("seek", np.int64(1)), ("close",)]
            ),
        ),
        max_size=10,
    )


@st.composite
def files(draw):
    """Sizes 0, 1 and around a chunk and its multiples, the tail whole or cut anywhere."""
    chunk_size = draw(st.integers(1, 40))
    whole = draw(st.integers(0, 4)) * chunk_size
    size = max(0, whole + draw(st.sampled_from([-1, 0, 1, chunk_size // 2])))
    rest = size % chunk_size
    cut = draw(st.integers(0, max(0, rest - 1)))
    tail = (cut, rest - cut) if cut else (rest,) if rest else ()
    data = draw(st.sampled_from([RANDOM, LINES]))
    return data[:size], chunk_size, tail, draw(steps(size))


@settings(max_examples=examples(2000), deadline=None)
@given(
    file=files(),
    cache_bytes=st.sampled_from([0, 1, 30, 80, 1000]),
    least=st.sampled_from([0, 20, 1000]),
    sequential=st.sampled_from([1, 10, 1000]),
)
def test_any_sequence_of_calls_gives_what_bytesio_gives(file, cache_bytes, least, sequential):
    """Whatever is called, bytes, positions and types of error are those of io.BytesIO."""
    data, chunk_size, tail, calls = file
    with Memory(data, chunk_size, tail).open(
        cache_bytes=cache_bytes, least_bytes=least, sequential_bytes=sequential
    ) as reader:
        compare(reader, io.BytesIO(data), calls)


def test_any_sequence_of_calls_on_the_server_gives_what_bytesio_gives(client):
    """The same holds through Redis, for chunks of 1 byte, about the file's size, and cut tails."""
    data = dicom(pixels=RANDOM[:2200], PatientName="A")
    size = len(data)
    tails = set()
    readers = []
    for chunk_size in (1, 2, 100, size // 2, size - 1, size, size + 1, 262_080):
        store = DicomStore(client, chunk_size=chunk_size, progress=False)
        store.put(f"{chunk_size}.dcm", data)
        tails.add(len(store.manifest(f"{chunk_size}.dcm").tail))
        readers.append((store, f"{chunk_size}.dcm"))
    assert tails == {0, 1, 2}

    @settings(max_examples=examples(100), deadline=None)
    @given(which=st.sampled_from(readers), cache=st.sampled_from([100, 3000]), calls=steps(size))
    def hold(which, cache, calls):
        store, name = which
        with store.open(name, cache_bytes=cache) as reader:
            compare(reader, io.BytesIO(data), calls)

    hold()


def test_other_buffers_are_filled_or_refused_as_bytesio_does():
    """An array is filled by its bytes; what cannot be written to raises TypeError."""
    data = RANDOM[:100]
    for make in (
        lambda: np.empty((3, 3), "<u2"),
        lambda: np.empty(0),
        lambda: np.empty((0, 3)),
        lambda: memoryview(bytearray(10))[::2],
        lambda: b"abc",
        lambda: "abc",
    ):
        ours, theirs = make(), make()
        reader, peer = Memory(data, 7).open(), io.BytesIO(data)
        assert outcome(lambda r=reader, b=ours: r.readinto(b)) == outcome(
            lambda p=peer, b=theirs: p.readinto(b)
        )
        assert bytes(ours) == bytes(theirs) if not isinstance(ours, str) else ours == theirs


def test_it_cannot_be_written_to():
    """Writing raises io.UnsupportedOperation, and ValueError once the file is closed."""
    reader = Memory(b"abc", 2).open()
    assert not reader.writable()
    with pytest.raises(io.UnsupportedOperation, match="x is open for reading"):
        reader.write(b"a")
    with pytest.raises(io.UnsupportedOperation):
        reader.truncate()
    reader.close()
    with pytest.raises(ValueError, match="closed file x"):
        reader.write(b"a")
    with pytest.raises(ValueError, match="closed file"), reader:
        pass


def test_a_closed_file_has_no_more_lines():
    """Closing ends a loop over the lines too, wherever it is."""
    reader = Memory(b"a\nb\nc\n", 6).open()
    assert next(reader) == b"a\n"
    reader.close()
    with pytest.raises(ValueError, match="closed file x"):
        next(reader)


def test_a_name_that_is_not_stored_is_a_file_not_found(store):
    """open raises what Python's open raises, and names a choice between several."""
    with pytest.raises(NotStoredError, match=r"nothing\.dcm") as caught:
        store.open("nothing.dcm")
    assert isinstance(caught.value, FileNotFoundError)
    store.put("a/one.dcm", dicom())
    store.put("b/one.dcm", dicom())
    with pytest.raises(AmbiguousNameError, match=r"a/one\.dcm"):
        store.open("one.dcm")


# --- what is fetched -----------------------------------------------------------------------------


def test_one_read_takes_what_it_touches_in_one_round_trip():
    """Chunks in memory are not asked for again, the others between them together."""
    memory = Memory(RANDOM, 200_000)
    reader = memory.open()
    reader.seek(400_000)
    reader.read(1)
    reader.seek(199_999)
    reader.read(600_000)
    assert memory.asked == [[2], [0, 1, 3]]
    assert (reader.round_trips, reader.bytes_fetched) == (2, 800_000)


def test_small_chunks_are_fetched_several_at_a_time():
    """128 KiB cost a round trip no more than one small chunk does."""
    memory = Memory(RANDOM, 30 * 1024)
    reader = memory.open()
    reader.seek(100_000)
    assert reader.read(10) == RANDOM[100_000:100_010]
    assert memory.asked == [[3, 4, 5, 6]]


def test_pieces_that_are_known_beforehand_come_in_one_round_trip():
    """Spans are returned in their order, and only chunks that are not kept are asked for."""
    memory = Memory(RANDOM, 100_000)
    with memory.open() as reader:
        reader.read(10)
        spans = [(950_000, 10), (5, 20), (399_990, 20)]
        assert reader.read_spans(spans) == [RANDOM[at : at + size] for at, size in spans]
    assert memory.asked[-1] == [3, 4, 9]


def test_scattered_reads_take_nothing_more():
    """Only who reads in a row gets more than the chunks touched, however much was read before."""
    memory = Memory(RANDOM[:100_000], 1000)
    with memory.open(least_bytes=0, sequential_bytes=4000) as reader:
        for start in (50_000, 10_000, 90_000, 30_000):
            reader.seek(start)
            reader.read(3000)
    assert memory.asked == [[n, n + 1, n + 2] for n in (50, 10, 90, 30)]


def test_a_little_in_a_row_fetches_nothing_ahead():
    """Below 1 MiB in a row, as the tables of a slide are read, only what is touched is fetched."""
    memory = Memory(RANDOM * 2, 200_000)
    with memory.open() as reader:
        for _ in range(10):
            reader.read(100_000)
    assert memory.asked == [[0], [1], [2], [3], [4]]


def test_reading_in_a_row_fetches_ahead_ever_more():
    """A whole file takes far fewer round trips than chunks, and every chunk comes once."""
    memory = Memory(RANDOM * 40, 20_000)
    with memory.open() as reader:
        digest = hashlib.file_digest(reader, "sha256")
    assert digest.digest() == hashlib.sha256(RANDOM * 40).digest()
    assert sorted(chain.from_iterable(memory.asked)) == list(range(memory.manifest.count))
    assert len(memory.asked) < 20
    assert max(map(len, memory.asked)) == 8 * 2**20 // 20_000
    assert reader.bytes_fetched == 40 * len(RANDOM)


def test_no_more_is_kept_than_asked_for():
    """What was read longest ago goes first, and the bytes kept stay below the limit."""
    memory = Memory(RANDOM, 200_000)
    reader = memory.open(cache_bytes=600_000)
    for number in (0, 1, 2, 0, 3, 0, 1):
        reader.seek(number * 200_000)
        reader.read(10)
    assert memory.asked == [[0], [1], [2], [3], [1]]
    copy = io.BytesIO()
    reader.seek(0)
    shutil.copyfileobj(reader, copy)
    assert copy.getvalue() == RANDOM


def test_memory_is_bounded_by_what_is_kept():
    """Reading a file in pieces, by lines or into a buffer holds no more of it than asked for."""
    memory = Memory(LINES * 8, 100_000)

    def fetch(numbers):
        return [bytes(bytearray(chunk)) for chunk in memory.fetch(numbers)]

    buffer = bytearray(8 << 20)
    for work in (
        lambda reader: [None for _ in iter(lambda: reader.read(50_000), b"")],
        lambda reader: sum(1 for _ in reader),
        lambda reader: reader.readinto(buffer),
    ):
        with ChunkReader(memory.manifest, fetch, name="x", cache_bytes=500_000) as reader:
            tracemalloc.start()
            try:
                work(reader)
                held, _ = tracemalloc.get_traced_memory()
            finally:
                tracemalloc.stop()
            assert held < 1_200_000  # what is fetched ahead is not kept yet


def test_a_large_file_that_is_read_at_once_is_in_memory_once():
    """Beside the bytes that are returned there is one batch of 16 MiB, and what is kept."""
    size = 64 << 20
    manifest = Manifest("file:x", "0" * 12, size, 1 << 20, ())
    reader = ChunkReader(manifest, lambda numbers: [bytes(1 << 20) for _ in numbers], name="x",
                         cache_bytes=1 << 20)  # fmt: skip
    tracemalloc.start()
    try:
        assert len(reader.read()) == size
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        reader.close()
    assert peak < 1.5 * size


def commands(client):
    stats = client.info("commandstats")
    return {name: stats.get(f"cmdstat_{name}", {}).get("calls", 0) for name in ("json.get", "mget")}


def sent(client):
    return client.info("stats")["total_net_output_bytes"]


def test_it_counts_what_the_server_counts(client):
    """Round trips and bytes are the server's own, for scattered and sequential reads."""
    store = DicomStore(client, chunk_size=65_472, progress=False)
    data = dicom(pixels=RANDOM * 5)
    store.put("a/image.dcm", data)
    for name, by_search in (("a/image.dcm", 0), ("file:a/image.dcm", 0), ("image.dcm", 1)):
        client.config_resetstat()
        with store.open(name) as reader:
            reader.seek(3_000_000)
            reader.read(100_000)
            reader.seek(0)
            assert reader.read(1_100_000) + reader.read() == data
        server, output = commands(client), sent(client)
        assert server["mget"] == reader.round_trips - 1 - 2 * by_search
        assert server["json.get"] == reader.round_trips - by_search
        assert 0 <= output - reader.bytes_fetched < 20_000


def test_a_little_of_many_chunks_needs_no_list_of_them(client):
    """Of 50,000 chunks, opening takes four scalars, and one read what it touches."""
    store = DicomStore(client, chunk_size=20, progress=False)
    data = dicom(pixels=RANDOM[:1_000_000])
    store.put("many.dcm", data)
    assert store.manifest("many.dcm").count > 50_000
    client.config_resetstat()
    before = sent(client)
    reader = store.open("many.dcm")
    opened = sent(client)
    assert opened - before < 12_000  # INFO's own answer is most of it
    reader.seek(500_000)
    assert reader.read(100) == data[500_000:500_100]
    assert sent(client) - opened < 60_000


# --- threads -------------------------------------------------------------------------------------


def test_threads_share_a_reader():
    """Each read is whole and each byte is read once, whoever reads it."""
    records = np.arange(60_000, dtype="<u8").tobytes()
    memory = Memory(records, 20_000)
    with memory.open(cache_bytes=100_000) as reader, ThreadPoolExecutor(8) as pool:
        own = [pool.submit(lambda: list(iter(lambda: reader.read(24), b""))) for _ in range(8)]
        found = [record for one in own for record in one.result()]
    numbers = np.sort(np.frombuffer(b"".join(found), "<u8").reshape(-1, 3), axis=0)
    assert (np.diff(numbers, axis=1) == 1).all()
    assert (numbers.ravel() == np.arange(60_000)).all()


def test_threads_share_the_lines():
    """Each line comes whole and once, whether it is read as a line or by its length."""
    data = b"".join(b"%06d\n" % number for number in range(60_000))
    with Memory(data, 20_000).open(cache_bytes=100_000) as reader, ThreadPoolExecutor(8) as pool:
        ways = [lambda: list(reader), lambda: list(iter(lambda: reader.read(7), b""))] * 4
        found = [line for one in [pool.submit(way) for way in ways] for line in one.result()]
    assert sorted(found) == data.splitlines(keepends=True)


# --- other processes -----------------------------------------------------------------------------


class Stored:
    """A function without state of its own that returns chunks, as a pickled reader needs."""

    def __call__(self, numbers):
        return Memory(LINES, 20_000).fetch(numbers)


def test_a_pickled_reader_opens_again_where_it_was():
    """Position, name and size come along; a reader that is closed cannot be pickled."""
    manifest = Memory(LINES, 20_000).manifest
    reader = ChunkReader(manifest, Stored(), name="x")
    reader.seek(500_000)
    next(reader)
    position = reader.tell()
    with pickle.loads(pickle.dumps(reader)) as again:
        assert (again.name, again.size, again.tell()) == ("x", len(LINES), position)
        assert again.read() == LINES[position:]
    assert reader.tell() == position
    reader.close()
    with pytest.raises(ValueError, match="closed file x"):
        pickle.dumps(reader)


def line_of(reader):
    """In another process: the next line and the position."""
    with reader:
        return os.getpid(), reader.readline(), reader.tell()


def test_an_open_reader_of_a_store_goes_to_another_process(store):
    """Workers in processes of their own read on from where the reader was opened."""
    data = dicom(pixels=LINES)
    store.put("x.dcm", data)
    with (
        store.open("x.dcm") as reader,
        ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool,
    ):
        reader.seek(300_000)
        pid, line, position = pool.submit(line_of, reader).result()
    assert pid != os.getpid()
    assert line == data[300_000:position] and data.index(b"\n", 300_000) == position - 1


def fetching():
    return [thread for thread in threading.enumerate() if thread.name == "ChunkReader"]


@pytest.mark.parametrize("end", ["closed", "collected", "collected in a cycle"])
def test_nothing_is_left_running(end):
    """A reader that is closed or garbage-collected while it fetches ahead leaves no thread."""
    memory, go_on = Memory(RANDOM * 8, 50_000), threading.Event()

    def fetch(numbers):
        if threading.current_thread() in fetching():
            go_on.wait()
        return memory.fetch(numbers)

    reader = ChunkReader(memory.manifest, fetch, name="x")
    reader.read(1 << 20)
    reader.read(1 << 18)
    assert len(fetching()) == 1
    threading.Timer(0.02, go_on.set).start()
    if end == "closed":
        reader.close()
    elif end == "collected in a cycle":
        reader.itself = reader
    del reader
    gc.collect()
    assert not fetching()


# --- damage --------------------------------------------------------------------------------------


def broken_store(client, harm, *, chunk_size=20_000):
    store = DicomStore(client, chunk_size=chunk_size, progress=False)
    data = dicom(pixels=RANDOM[:400_000])
    store.put("x.dcm", data)
    key = store.manifest("x.dcm").chunk_key(7)
    harm(client, key)
    return store, data, key


@pytest.mark.parametrize(
    ("harm", "error"),
    [
        (lambda client, key: client.delete(key), MissingChunkError),
        (lambda client, key: client.set(key, client.get(key)[:-1]), DamagedError),
        (lambda client, key: client.append(key, b"x"), DamagedError),
        (lambda client, key: client.setbit(key, 77, not client.getbit(key, 77)), DamagedError),
        (lambda client, key: client.delete(key) and client.rpush(key, b"x"), MissingChunkError),
    ],
    ids=["gone", "short", "long", "a bit flipped", "not a string"],
)
def test_a_broken_chunk_fails_the_read_that_needs_it(client, harm, error):
    """The error names the chunk; reading elsewhere, before and after it, goes on."""
    store, data, key = broken_store(client, harm)
    with store.open("x.dcm") as reader:
        assert reader.read(140_000) == data[:140_000]
        for _ in range(2):
            with pytest.raises(error, match=key):
                reader.read(1)
            assert reader.tell() == 140_000
            with pytest.raises(error, match=key):
                reader.readinto(bytearray(10))
            with pytest.raises(error, match=key):
                reader.peek()
        reader.seek(160_000)
        assert reader.read() == data[160_000:]
        reader.seek(130_000)
        with pytest.raises(error, match=key):
            reader.read(20_000)
        assert reader.read(10_000) == data[130_000:140_000]


def test_what_is_fetched_ahead_fails_no_read_before_it():
    """A broken chunk ahead of a sequential reader raises when it is reached, and not earlier."""
    memory = Memory(RANDOM * 6, 20_000)
    memory.broken = {200}
    with memory.open() as reader:
        pieces = [reader.read(20_000) for _ in range(200)]
        with pytest.raises(MissingChunkError, match=r":200$"):
            reader.read(1)
        # It was not tried again for every read in between.
        assert sum(200 in numbers for numbers in memory.asked) < 10
        memory.broken.clear()
        assert b"".join(pieces) + reader.read() == RANDOM * 6


def test_a_large_readinto_that_fails_leaves_the_position():
    """Also where the broken chunk comes after the first step of 16 MiB."""
    memory = Memory(RANDOM * 20, 1 << 20)
    memory.broken = {18}
    with memory.open() as reader:
        buffer = bytearray(reader.size)
        with pytest.raises(MissingChunkError):
            reader.readinto(buffer)
        assert reader.tell() == 0
        memory.broken.clear()
        assert reader.readinto(buffer) == reader.size
        assert buffer == RANDOM * 20


def test_a_file_replaced_or_deleted_since_it_was_opened_says_so(store, client):
    """The reader never mixes versions: what it still needs raises, and says what to do."""
    old, new = dicom(pixels=RANDOM), dicom(pixels=RANDOM[::-1])
    store.put("x.dcm", old)
    reader = store.open("x.dcm")
    assert reader.read(1000) == old[:1000]
    store.put("x.dcm", new)
    reader.seek(600_000)
    with pytest.raises(MissingChunkError, match=r"file:x\.dcm was replaced or deleted.*again"):
        reader.read(1)
    again = store.open("x.dcm")
    assert again.read(1000) == new[:1000]
    store.delete("x.dcm")
    with pytest.raises(MissingChunkError, match=r"file:x\.dcm was replaced or deleted"):
        again.read()
    client.set("file:x.dcm", b"a string")
    with pytest.raises(DamagedError, match=r"file:x\.dcm"):
        again.read()
