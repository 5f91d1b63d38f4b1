"""What Redis has lost or damaged is mended by loading again, in the version that is stored."""

import json
import os

import numpy as np
import pytest
from conftest import PYDICOM_FILES
from samples import dicom

from dicomstore import DicomStore
from dicomstore.blobs.chunks import Chunks
from dicomstore.errors import DamagedError, MissingChunkError

IMAGE = dicom(pixels=bytes(range(256)) * 20, Rows=1)
LARGE = dicom(pixels=os.urandom(18 * 2**20))

DAMAGE = {
    "a flipped bit": lambda chunk: bytes([chunk[0] ^ 1]) + chunk[1:],
    "cut": lambda chunk: chunk[:-1],
    "longer": lambda chunk: chunk + b"x",
    "empty": lambda chunk: b"",
}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a").write_bytes(IMAGE)
    return tmp_path / "in"


@pytest.fixture
def small(client, folder):
    """A store with one file of six chunks."""
    store = DicomStore(client, chunk_size=1000, progress=False)
    assert store.load(folder)["status"].tolist() == ["loaded"]
    return store


def everything(client):
    """Return every key with its value and whether it expires."""
    return {key: (client.dump(key), client.ttl(key)) for key in client.scan_iter()}


def sets(client):
    return client.info("commandstats").get("cmdstat_set", {}).get("calls", 0)


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("numbers", [[0], [2, 4], range(6)], ids=str)
def test_damaged_chunks_are_sent_again(damage, numbers, small, client, folder):
    """A plain load leaves damage alone; repair=True sends the damaged chunks and no other key."""
    before, keys = everything(client), small.manifest("a").chunk_keys(numbers)
    for key in keys:
        client.set(key, DAMAGE[damage](client.get(key)))
    damaged = everything(client)
    assert small.load(folder)["status"].tolist() == ["unchanged"]
    assert everything(client) == damaged
    with pytest.raises(DamagedError, match=keys[0]):
        small.read("a")
    client.config_resetstat()
    row = small.load(folder, repair=True).iloc[0]
    assert (row["status"], row["reason"], row["chunks"]) == ("repaired", "", 6)
    assert sets(client) == len(keys)
    assert small.read("a") == IMAGE and everything(client) == before
    assert small.load(folder, repair=True)["status"].tolist() == ["unchanged"]


@pytest.mark.parametrize("repair", [False, True])
def test_lost_chunks_are_sent_again(repair, small, client, folder):
    """Only lost chunks are sent again, also by a plain load, which mends what it then looks at."""
    before = everything(client)
    manifest = small.manifest("a")
    client.delete(*manifest.chunk_keys([1, 5]))
    with pytest.raises(MissingChunkError, match=r"^2 chunks are missing.*:a:"):
        small.read("a")
    client.config_resetstat()
    assert small.load(folder, repair=repair)["status"].tolist() == ["repaired"]
    assert sets(client) == 2 and everything(client) == before
    assert small.read("a") == IMAGE and small.manifest("a") == manifest


def test_a_chunk_of_a_different_type(small, client, folder):
    """A list in a chunk's place counts as there for a plain load; repair=True puts the chunk back.

    Its key is one that only the store makes, so it is not somebody else's.
    """
    before, key = everything(client), small.manifest("a").chunk_key(3)
    client.delete(key)
    client.rpush(key, "x")
    assert small.load(folder, repair=True)["status"].tolist() == ["repaired"]
    assert small.read("a") == IMAGE and everything(client) == before


def test_large_files_are_repaired_in_batches(client, tmp_path):
    """Of a file of several batches only what is damaged is sent again, however much that is."""
    (tmp_path / "a").write_bytes(LARGE)
    store = DicomStore(client, progress=False)
    store.load(tmp_path)
    manifest = store.manifest("a")
    for numbers in ([0, 70], range(manifest.count)):
        for key in manifest.chunk_keys(numbers):
            client.setrange(key, 10, b"damage")
        client.config_resetstat()
        assert store.load(tmp_path, repair=True)["status"].tolist() == ["repaired"]
        assert sets(client) == len(numbers)
        assert store.read("a") == LARGE and store.manifest("a") == manifest
    assert len(store.sweep()) == 0


def test_a_file_that_is_replaced_while_it_is_repaired(small, client, folder, monkeypatch):
    """What is put back for a version that is gone is taken away again, and the file stored anew."""
    client.set(small.manifest("a").chunk_key(2), b"damage")
    other = dicom(Rows=9, pixels=bytes(4000))
    put_back, replaced = Chunks.put_back, []

    def too_late(self, manifest, chunks):
        if not replaced:
            replaced.append(DicomStore(client, chunk_size=1000, progress=False).put("a", other))
        put_back(self, manifest, chunks)

    monkeypatch.setattr(Chunks, "put_back", too_late)
    assert small.load(folder, repair=True)["status"].tolist() == ["replaced"]
    assert small.read("a") == IMAGE
    assert len(small.sweep()) == 0 and small.verify()["status"].tolist() == ["ok"]


def test_a_file_that_is_deleted_while_it_is_repaired(small, client, folder, monkeypatch):
    """It is stored again, and nothing is left of the version that was to be repaired."""
    client.set(small.manifest("a").chunk_key(2), b"damage")
    put_back, deleted = Chunks.put_back, []

    def too_late(self, manifest, chunks):
        if not deleted:
            deleted.append(small.delete("a"))
        put_back(self, manifest, chunks)

    monkeypatch.setattr(Chunks, "put_back", too_late)
    assert small.load(folder, repair=True)["status"].tolist() == ["loaded"]
    assert small.read("a") == IMAGE and len(small.sweep()) == 0


def test_other_bytes_are_not_mixed_in(small, client, folder):
    """Where the file differs from what is stored, repair=True replaces it whole."""
    other = dicom(pixels=bytes(range(255, -1, -1)) * 20, Rows=1)
    assert len(other) == len(IMAGE)
    client.set(small.manifest("a").chunk_key(2), b"damage")
    (folder / "a").write_bytes(other)
    assert small.load(folder, repair=True)["status"].tolist() == ["replaced"]
    assert small.read("a") == other and len(small.sweep()) == 0


@pytest.mark.parametrize("repair", [False, True])
def test_an_edited_digest(repair, small, client, folder):
    """A document whose BLAKE3 was edited is replaced: it says that other bytes are stored."""
    client.execute_command("JSON.SET", "file:a", "$.blake3", json.dumps("0" * 64))
    assert small.load(folder, repair=repair)["status"].tolist() == ["replaced"]
    assert small.verify()["status"].tolist() == ["ok"] and len(small.sweep()) == 0


@pytest.mark.parametrize("repair", [False, True])
def test_an_edited_checksum(repair, small, client, folder):
    """Sound chunks under an edited CRC are told as such, and never sent over."""
    client.execute_command("JSON.SET", "file:a", "$.crc[2]", "7")
    before = everything(client)
    row = small.load(folder, repair=repair).iloc[0]
    if repair:
        assert row["status"] == "replaced"
        assert small.read("a") == IMAGE and len(small.sweep()) == 0
    else:
        assert row["status"] == "unchanged" and everything(client) == before


def test_what_lies_beside_the_chunks(small, client, folder):
    """If the data set as JSON is gone, loading again brings it back."""
    before = len(everything(client))
    client.delete(*client.scan_iter("chunk:*:json"))
    assert small.load(folder)["status"].tolist() == ["replaced"]
    assert len(everything(client)) == before and small.read("a") == IMAGE
    assert small.load(folder)["status"].tolist() == ["unchanged"]


@pytest.fixture
def several(client, tmp_path):
    """A store with one file of two encapsulated frames, and that file."""
    file = tmp_path / "several"
    file.write_bytes((PYDICOM_FILES / "SC_rgb_rle_16bit_2frame.dcm").read_bytes())
    store = DicomStore(client, progress=False)
    store.load(file)
    return store, file


@pytest.mark.parametrize("name", ["json", "frames"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_beside_the_chunks(name, damage, several, client):
    """repair=True also mends a damaged data set as JSON, and the table of where frames lie."""
    store, file = several
    key = store.manifest("several").attachment_key(name)
    sound = client.get(key)
    client.set(key, DAMAGE[damage](sound))
    assert store.load(file)["status"].tolist() == ["unchanged"]
    assert store.load(file, repair=True)["status"].tolist() == ["replaced"]
    assert client.get(store.manifest("several").attachment_key(name)) == sound
    assert store.load(file, repair=True)["status"].tolist() == ["unchanged"]
    assert len(store.sweep()) == 0


@pytest.mark.parametrize("damage", [*DAMAGE, "gone"])
def test_a_frame_is_never_cut_where_a_damaged_table_says(damage, several, client):
    """Where the table is gone or damaged, its key is named, and how to mend it."""
    store, _ = several
    key = store.manifest("several").attachment_key("frames")
    table = client.get(key)
    client.delete(key)
    if damage in DAMAGE:
        client.set(key, DAMAGE[damage](table))
    expected = DamagedError if damage in DAMAGE else MissingChunkError
    for action in (lambda: store.frame("several", 1), lambda: store.volume(["several"])):
        with pytest.raises(expected, match=f"{key}.*repair=True"):
            action()


def test_a_frame_of_a_file_that_is_replaced_meanwhile(several, client, monkeypatch):
    """If the table is gone because the file was replaced, the frame comes from the new version."""
    store, file = several
    expected, attachment, replaced = store.frame("several", 1), Chunks.attachment, []
    other = DicomStore(client, chunk_size=1000, progress=False)

    def too_late(self, *arguments):
        if not replaced:
            replaced.append(other.load(file))
        return attachment(self, *arguments)

    monkeypatch.setattr(Chunks, "attachment", too_late)
    found = DicomStore(client, progress=False).frame("several", 1)
    assert np.array_equal(found, expected) and replaced[0]["status"].tolist() == ["replaced"]


@pytest.mark.parametrize("value", [5, "json", ["json"], {"x": 1, "json": 1}, None], ids=str)
def test_edited_attachments(value, small, client, folder):
    """A document that says something odd about its attachments is loaded over all the same."""
    client.execute_command("JSON.SET", "file:a", "$.attachments", json.dumps(value))
    assert small.load(folder)["status"].tolist() == ["unchanged"]
    client.delete(small.manifest("a").chunk_key(0))
    assert small.load(folder)["status"].tolist() == ["repaired"]
    assert small.read("a") == IMAGE


@pytest.mark.parametrize("number", [0, 3])
def test_a_repair_without_ttl_makes_a_file_permanent(number, client, folder):
    """Chunks that expire stay for good once the file is loaded without ttl, whichever was lost."""
    DicomStore(client, chunk_size=1000, progress=False, ttl=100).load(folder)
    store = DicomStore(client, chunk_size=1000, progress=False)
    keys = store.manifest("a").chunk_keys()
    client.delete(keys[number])
    assert store.load(folder)["status"].tolist() == ["repaired"]
    assert {client.ttl(key) for key in keys} == {-1}


def test_repair_of_many_files_is_told_file_by_file(client, tmp_path):
    """Each row says what its own file needed."""
    for name in "abcd":
        (tmp_path / name).write_bytes(dicom(Rows=ord(name)))
    store = DicomStore(client, progress=False)
    store.load(tmp_path)
    client.set(store.manifest("a").chunk_key(0), b"damage")
    client.delete(store.manifest("b").chunk_key(0))
    store.delete("c")
    assert store.load(tmp_path, repair=True)["status"].tolist() == [
        "repaired", "repaired", "loaded", "unchanged",
    ]  # fmt: skip
    assert store.verify()["status"].eq("ok").all() and len(store.sweep()) == 0
