"""What killed loaders leave is swept, nothing else; verify names each damaged chunk."""

import os
import threading
import time

import pytest
from samples import before_commit, dicom

from dicomstore import DicomStore, connect
from dicomstore.errors import NotStoredError, ServerError

VERSION = "0123456789ab"


@pytest.fixture
def small(client):
    return DicomStore(client, chunk_size=1000, progress=False)


@pytest.fixture
def short_lease(monkeypatch):
    monkeypatch.setattr("dicomstore.blobs.versions.LEASE_MS", 300)


def test_chunks_that_no_document_names_are_swept(small, client):
    """Chunks of versions that were never committed go, with their bytes counted; files stay."""
    image = dicom(pixels=bytes(5000))
    for path in ("a", "odd {%}: \n/ü\udcff", "x:0123456789ab:0"):
        small.put(path, image)
        key = next(client.scan_iter("file:*"))
    before = set(client.scan_iter())
    for number in range(3):
        client.set(f"chunk:file:gone.dcm:{VERSION}:{number}", bytes(100 + number))
    client.set(f"chunk:{os.fsdecode(key)}:{VERSION}:11", b"x")
    report = small.sweep()
    assert set(client.scan_iter()) == before
    assert report["size"].sum() == 303 + 1 and report["chunks"].sum() == 4
    assert set(report["version"]) == {VERSION} and "gone.dcm" in set(report["path"])
    assert small.verify()["status"].eq("ok").all() and len(small.sweep()) == 0


FOREIGN = [
    "chunk:", "chunk:other", "chunk:file:", f"chunk:file:a:{VERSION}", f"chunk:file::{VERSION}:0",
    f"chunk:file:a:{VERSION}:", f"chunk:file:a:{VERSION}:x", f"chunk:file:a:{VERSION}:-1",
    f"chunk:file:a:{VERSION}:01", f"chunk:file:a:{VERSION}:٣", f"chunk:file:a:{VERSION.upper()}:0",
    f"chunk:file:a:{VERSION}0:0", f"chunk:file:a:{VERSION}:0 ", f"chunk:file:a:{VERSION}:0\n",
    f"chunk:file:a{{b}}:{VERSION}:0", f"chunk:file:a%2:{VERSION}:0", f"chunk:file:%61:{VERSION}:0",
    f"Chunk:file:a:{VERSION}:0", f"xchunk:file:a:{VERSION}:0", f"chunk:{{file:a}}:{VERSION}:0",
    b"chunk:file:\xff:0123456789ab:0", "chunk:file:a:0123456789ab:0:0",
]  # fmt: skip


def test_keys_of_another_form_stay(small, client):
    """Only strings whose keys are exactly those that the store itself would make are removed."""
    for key in FOREIGN:
        client.set(key, b"theirs")
    client.rpush(f"chunk:file:list:{VERSION}:0", "theirs")
    client.execute_command("JSON.SET", f"chunk:file:json:{VERSION}:0", "$", "{}")
    before = client.dbsize()
    assert len(small.sweep()) == 0
    assert client.dbsize() == before


def test_a_load_in_progress_is_left_alone(small, client, short_lease):
    """While a loader renews its lease, a sweep leaves its chunks, and the load succeeds."""
    image, reports = dicom(pixels=bytes(5000)), []
    with before_commit(lambda manifest: reports.append(small.sweep())):
        small.put("a", image)
    assert [len(report) for report in reports] == [0]
    assert small.read("a") == image


def test_a_lease_that_is_not_renewed_does_not_last(small, client, short_lease):
    """Chunks under the lease of a loader that is gone are removed by the sweep that saw it."""
    client.set(f"chunk:file:a:{VERSION}:0", b"12345")
    client.set(f"chunk:{{file:a}}:{VERSION}", b"", px=250)
    assert small.sweep()["size"].sum() == 5
    assert client.dbsize() == 0


def test_a_load_that_is_swept_starts_again(small, client):
    """A loader that stalls for longer than its lease and is swept stores the file all the same."""
    image, swept = dicom(pixels=bytes(5000)), []

    def stall_once(manifest):
        if not swept:
            client.delete(manifest.lease)
            swept.append(small.sweep()["chunks"].sum())

    with before_commit(stall_once):
        small.put("a", image)
    assert swept[0] > 5 and small.read("a") == image
    assert len(small.sweep()) == 0


def test_a_damaged_document_keeps_its_chunks(small, client):
    """A document whose version, or whose list of chunks, was edited still holds on to its bytes."""
    image = dicom(pixels=bytes(5000))
    small.put("a", image)
    version = small.manifest("a").version
    for path, value in (("$.version", f'"{VERSION}"'), ("$.chunks", "[]")):
        old = client.execute_command("JSON.GET", "file:a", path)
        client.execute_command("JSON.SET", "file:a", path, value)
        assert len(small.sweep()) == 0
        client.execute_command("JSON.SET", "file:a", path, old[1:-1])
    assert small.manifest("a").version == version and small.read("a") == image


def test_a_foreign_key_in_the_documents_place(small, client):
    """Where something else has taken a document's key, its chunks are swept and the key stays."""
    small.put("a", dicom())
    client.delete("file:a")
    client.hset("file:a", "x", "y")
    assert small.sweep()["chunks"].sum() == 2  # its one chunk, and its data set as JSON
    assert client.hgetall("file:a") == {b"x": b"y"} and client.dbsize() == 1


def test_a_sweep_that_cannot_read_documents_removes_nothing(small, client, server):
    """If documents cannot be read, no chunk counts as unnamed."""
    small.put("a", dicom())
    client.execute_command("ACL", "SETUSER", "blind", "on", ">password", "~*", "+@all", "-json.get")
    try:
        blind = connect(f"redis://blind:password@127.0.0.1:{server.port}")
        with blind, pytest.raises(ServerError, match=r"json\.get"):
            DicomStore(blind, progress=False).sweep()
    finally:
        client.acl_deluser("blind")
    assert small.verify()["status"].tolist() == ["ok"]


def test_pages_of_a_sweep(small, client, monkeypatch):
    """A sweep takes the keys page by page, and a version may lie in several pages."""
    monkeypatch.setattr("dicomstore.blobs.sweeping.PAGE", 7)
    for number in range(40):
        client.set(f"chunk:file:{number % 3}:{VERSION}:{number}", bytes(10))
    small.put("kept", dicom(pixels=bytes(30_000)))
    report = small.sweep()
    assert report["chunks"].sum() == 40 and report["size"].sum() == 400 and len(report) == 3
    assert small.verify()["status"].tolist() == ["ok"]


def test_two_sweeps_count_every_byte_once(server, small, client):
    """Sweeps that run at the same time report together what was there."""
    for number in range(2000):
        client.set(f"chunk:file:{number % 7}:{VERSION}:{number}", bytes(10))
    sizes, start = [], threading.Barrier(2)

    def sweep():
        with connect(server.url) as own:
            start.wait()
            sizes.append(DicomStore(own, progress=False).sweep()["size"].sum())

    threads = [threading.Thread(target=sweep) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(sizes) == 20_000 and client.dbsize() == 0


def test_delete_while_a_loader_replaces(server, small, client):
    """Deleting and loading one name at the same time leaves a whole file or none, no chunk over."""
    failures, until = [], time.monotonic() + 1
    versions = [dicom(Rows=n, pixels=bytes(5000)) for n in (1, 2)]

    def load():
        with connect(server.url) as own:
            store = DicomStore(own, chunk_size=1000, progress=False)
            try:
                while time.monotonic() < until:
                    for image in versions:
                        store.put("a", image)
            except Exception as error:
                failures.append(error)

    thread = threading.Thread(target=load)
    thread.start()
    deleted = 0
    while thread.is_alive():
        try:
            small.delete("a")
            deleted += 1
        except NotStoredError:
            pass
    thread.join()
    assert failures == [] and deleted > 5
    assert small.verify()["status"].eq("ok").all() and len(small.sweep()) == 0


def test_verify_names_every_damaged_chunk(small, client, tmp_path):
    """Gone and altered chunks are all named, in the row of their file alone."""
    for path in ("a", "b"):
        small.put(path, dicom(pixels=bytes(9000)))
    keys = small.manifest("a").chunk_keys()
    client.setrange(keys[1], 5, b"x")
    client.append(keys[3], b"x")
    client.set(keys[5], client.get(keys[4])[:-1] + b"\1")
    report = small.verify().set_index("path")
    assert list(report["status"]) == ["damaged", "ok"]
    for number, key in enumerate(keys):
        assert (f"the chunk {key} is damaged" in report["reason"]["a"]) == (number in (1, 3, 5))
    client.unlink(keys[1])
    reason = small.verify().set_index("path")["reason"]["a"]
    assert f"the chunk {keys[1]} is gone" in reason and f"{keys[3]} is damaged" in reason
