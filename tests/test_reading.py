"""Reading: never stale, never wrong, many at once, counted exactly, and in other processes."""

import itertools
import multiprocessing
import os
import pickle
import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pydicom
import pytest
from conftest import PYDICOM_FILES
from samples import dicom

from dicomstore import DicomStore, connect
from dicomstore.errors import (
    AmbiguousNameError,
    DamagedError,
    MissingChunkError,
    NotStoredError,
    RefusedError,
)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "in").mkdir()
    return tmp_path / "in"


def fill(folder, count, size=0):
    """Write files "000", "001", ... that differ; return their bytes by name."""
    images = {f"{n:03}": dicom(Rows=n, pixels=os.urandom(size)) for n in range(count)}
    for name, image in images.items():
        (folder / name).write_bytes(image)
    return images


def test_what_the_server_refuses_is_no_damage(client, store):
    """An open reader tells the server's refusal as that, and does not call the file damaged."""
    store.put("a", dicom())
    with store.open("a") as file:
        client.execute_command("ACL SETUSER", "default", "-json.get")
        try:
            with pytest.raises(RefusedError, match=r"json\.get"):
                file.read()
        finally:
            client.execute_command("ACL SETUSER", "default", "+json.get")


# --- never stale ---------------------------------------------------------------------------------


def opened(store, name):
    """Read a file as a reader does; one that was replaced meanwhile has to be opened again."""
    while True:
        try:
            with store.open(name) as file:
                return file.read()
        except MissingChunkError as error:
            assert "Open it again" in str(error)


WAYS = {
    "read": lambda store: store.read("a"),
    "by key": lambda store: store.read("file:a"),
    "into": lambda store: bytes(store.read("a", into=bytearray(200_000))),
    "many": lambda store: store.read_many(["b", "a", "b"])["file:a"],
    "open": lambda store: opened(store, "a"),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["thread", "process"])
def test_a_read_is_never_stale(way, kind, server, client):
    """While a file is replaced, a read gives a whole version, none older than when it began."""
    store, again = (DicomStore(client, chunk_size=1000, progress=False) for _ in range(2))
    store.put("b", dicom())
    context = multiprocessing.get_context("spawn")
    begun, done = context.Value("i", 0), context.Value("i", 0)
    arguments = (server.url, begun, done, 60)
    make = threading.Thread if kind == "thread" else context.Process
    writer = make(target=keep_replacing, args=arguments)
    DicomStore(client, chunk_size=1000, progress=False).put("a", version(0))
    writer.start()
    seen = set()
    try:
        while writer.is_alive():
            # One store that remembers the file from every read, and one that looks it up anew.
            for reader in (store, again if random.random() < 0.5 else fresh(client)):
                oldest = done.value
                found = WAYS[way](reader)
                newest = begun.value
                number = int.from_bytes(found[-4:], "big")
                assert found == version(number) and oldest <= number <= newest
                seen.add(number)
    finally:
        writer.join()
    assert done.value == 60 and len(seen) > 3


def fresh(client):
    return DicomStore(client, chunk_size=1000, progress=False)


def version(number):
    """Return a file of many chunks, a different one for each number."""
    return dicom(Rows=number, pixels=number.to_bytes(4, "big") * 3000)


def keep_replacing(url, begun, done, count):
    with connect(url) as own:
        writer = DicomStore(own, chunk_size=1000, progress=False, thumbnails=False)
        for number in range(1, count + 1):
            begun.value = number
            writer.put("a", version(number))
            done.value = number


def test_what_is_remembered_is_not_believed(store, client):
    """A remembered file that was replaced, deleted or damaged is read as it is now."""
    other = DicomStore(client, progress=False)
    store.put("a", dicom(Rows=1))
    assert store.read("a") == store.read("a") == dicom(Rows=1)
    other.put("a", dicom(Rows=2))
    assert store.read("a") == dicom(Rows=2)
    client.set(store.manifest("a").chunk_key(0), b"damage")
    with pytest.raises(DamagedError):
        store.read("a")
    other.delete("a")
    with pytest.raises(NotStoredError):
        store.read("a")
    other.put("x/a", dicom(Rows=3))
    assert store.read("a") == dicom(Rows=3)  # by its imageName
    other.put("a", dicom(Rows=4))
    assert store.read("a") == dicom(Rows=4)  # a path wins
    other.delete("a")
    other.put("y/a", dicom(Rows=5))
    with pytest.raises(AmbiguousNameError):
        store.read("a")


def test_frames_are_of_what_the_name_means_now(store):
    """A frame is of the file that read gives, also when its imageName becomes a path."""
    one, two = (PYDICOM_FILES / name for name in ("MR_small.dcm", "CT_small.dcm"))
    store.put("x/a", one.read_bytes())
    assert (store.frame("a", 0) == pydicom.dcmread(one).pixel_array).all()
    store.put("a", two.read_bytes())
    for name in ("a", "file:a"):
        assert (store.frame(name, 0) == pydicom.dcmread(two).pixel_array).all()
    store.delete("a")
    assert (store.frame("a", 0) == pydicom.dcmread(one).pixel_array).all()
    store.put("a", one.read_bytes(), replace=True)
    store.put("a", two.read_bytes(), replace=True)
    assert (store.frame("a", 0) == pydicom.dcmread(two).pixel_array).all()


# --- many at once --------------------------------------------------------------------------------


def test_read_many_by_every_kind_of_name(store):
    """Keys, paths and imageNames, some of them twice: each file once, in order."""
    one, two = dicom(Rows=1), dicom(Rows=2)
    store.put("x/a", one)
    store.put("b", two)
    found = store.read_many(["b", "a", "x/a", "file:b"])
    assert list(found) == ["file:b", "file:x/a"] and list(found.values()) == [two, one]
    assert store.read_many(store.find(order_by="-rows")) == {"file:b": two, "file:x/a": one}
    assert store.read_many([]) == {} and store.read_many("b") == {"file:b": two}
    with pytest.raises(NotStoredError, match="'c'"):
        store.read_many(["b", "c"])


def test_many_files_that_are_gone_come_from_the_source(client, folder):
    """Over a thousand cold files are read in one go, each fetched from the source once."""
    images = fill(folder, 1100)
    store = DicomStore(client, progress=False, source=folder, thumbnails=False)
    store.load(folder, pixels=False)
    client.delete("file:007")
    found = store.read_many(list(images))
    assert found == {f"file:{name}": image for name, image in images.items()}
    assert (store.hits, store.misses) == (0, 1100)


def test_what_is_gone_among_many_is_named(client, folder):
    """Without a source, the first file that lacks a chunk ends the run with that chunk's name."""
    images = fill(folder, 30, 3000)
    store = DicomStore(client, chunk_size=1000, progress=False)
    store.load(folder)
    lost = store.manifest("020").chunk_key(1)
    client.delete(lost)
    given = []
    with pytest.raises(MissingChunkError, match=lost):
        for key, content in store.read_each(list(images)):
            given.append(key)
            assert content == images[key.removeprefix("file:")]
    assert given == [f"file:{n:03}" for n in range(20)]


@pytest.mark.parametrize("sizes", [[3000] * 5, [18 * 2**20, 3000, 18 * 2**20, 3000]], ids=str)
def test_what_is_lost_among_many_is_mended(sizes, client, folder):
    """Damaged and lost chunks in the middle of a run come from the source, whatever the size."""
    images = {f"{n}": dicom(Rows=n, pixels=os.urandom(size)) for n, size in enumerate(sizes)}
    for name, image in images.items():
        (folder / name).write_bytes(image)
    store = DicomStore(client, chunk_size=100_000, progress=False, source=folder)
    store.load(folder)
    client.set(store.manifest("1").chunk_key(0), b"damage")
    client.delete(store.manifest("2").chunk_key(0))
    assert list(store.read_many(list(images)).values()) == list(images.values())
    assert (store.hits, store.misses) == (len(sizes) - 2, 2)
    assert list(store.read_many(list(images)).values()) == list(images.values())
    assert (store.hits, store.misses) == (2 * len(sizes) - 2, 2)


def test_files_that_are_replaced_among_many(client, folder):
    """A file that is replaced between its document and its chunks is given in its new version."""
    images = fill(folder, 40, 200_000)
    store = DicomStore(client, chunk_size=65_000, progress=False)
    store.load(folder)
    other, new = fresh(client), dicom(Rows=99, pixels=bytes(9000))
    run = store.read_each(list(images))
    found = dict(itertools.islice(run, 1))
    for name in ("000", "010", "039"):
        other.put(name, new)
    other.delete("020")
    with pytest.raises(NotStoredError, match="020"):
        found |= run
    for key, content in found.items():
        assert content in (images[key.removeprefix("file:")], new)


# --- counted -------------------------------------------------------------------------------------


def test_every_read_is_counted_once(client, folder):
    """Hits and misses of many threads add up, whichever way whole files are read."""
    images = fill(folder, 20, 3000)
    store = DicomStore(client, chunk_size=1000, progress=False, source=folder)
    store.load(folder)
    lost = random.sample(sorted(images), 5)
    client.delete(*(store.manifest(name).chunk_key(1) for name in lost))
    for name in lost:  # each is missed once, and then there
        assert store.read(name) == images[name]
    assert (store.hits, store.misses) == (0, 5)

    def read(number):
        names = random.sample(sorted(images), len(images))
        for name in names[:10]:
            assert store.read(name) == images[name]
        for name in names[10:15]:
            assert bytes(store.read(name, into=bytearray(len(images[name])))) == images[name]
        assert len(store.read_many(names[15:])) == 5

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(read, range(16)))
    assert (store.hits, store.misses) == (16 * 20, 5)


def test_a_file_that_came_whole_from_the_source_is_a_miss(client, folder):
    """Reading or opening brings back a file whose document is gone; reading counts as a miss."""
    images = fill(folder, 2)
    store = DicomStore(client, progress=False, source=folder)
    assert store.read("000") == images["000"] and (store.hits, store.misses) == (0, 1)
    with store.open("001") as file:
        assert file.read() == images["001"]
    client.delete("file:001")
    assert store.read_many(["000", "001"])["file:001"] == images["001"]
    assert (store.hits, store.misses) == (1, 2)


def test_only_reading_brings_files_back(client, folder):
    """Deleting, verifying and comparing a file whose document is gone say that it is not stored."""
    fill(folder, 1)
    store = DicomStore(client, progress=False, source=folder)
    for action in (store.delete, store.blake3, store.similar, lambda name: store.verify([name])):
        with pytest.raises(NotStoredError):
            action("000")
    assert client.dbsize() <= 1 and (store.hits, store.misses) == (0, 0)


# --- in a different process ----------------------------------------------------------------------


def read_there(pickled, answer):
    store, file = pickle.loads(pickled)
    with store, file:
        file.seek(-4, os.SEEK_CUR)
        answer.put((store.read("a"), file.tell(), file.read(), store.client.ping()))


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_a_store_and_a_reader_can_be_pickled(method, client, folder):
    """In a different process they work as here, with connections of their own."""
    image = version(1)
    (folder / "a").write_bytes(image)
    store = DicomStore(client, chunk_size=1000, progress=False, source=folder, renew=True, ttl=99)
    store.load(folder)
    store.read("a")
    with store.open("a") as file:
        file.seek(5000)
        client.delete(store.manifest("a").chunk_key(7))
        context = multiprocessing.get_context(method)
        answer = context.SimpleQueue()
        process = context.Process(
            target=read_there, args=(pickle.dumps((store, file)), answer), daemon=True
        )
        process.start()
        assert answer.get() == (image, 4996, image[4996:], True)
        process.join()
        assert process.exitcode == 0
        assert file.tell() == 5000 and file.read(9) == image[5000:5009]
    assert store.read("a") == image


def test_a_store_that_is_closed(server):
    """`with` ends what the store has started; the client stays the caller's, and open."""
    with connect(server.url) as client:
        client.flushall()
        with DicomStore(client, progress=False) as store:
            store.put("a", dicom())
        store.close()
        assert client.ping() and DicomStore(client, progress=False).read("a") == dicom()
