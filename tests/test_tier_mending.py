"""A tier with a source mends what lies beside the chunks, and leaves alone what is permanent."""

import json
import random
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import psutil
import pytest
from blake3 import blake3
from conftest import PYDICOM_FILES
from samples import PREAMBLE, dicom, element

from demo.ct import write_sample_ct
from dicomstore import DicomStore
from dicomstore.errors import DamagedError, MissingChunkError, NotStoredError, VolumeError
from dicomstore.imaging import describing

IMAGE = dicom(pixels=bytes(range(256)) * 20, Rows=1)
DAMAGE = ["gone", "damaged"]


@pytest.fixture
def folder(tmp_path):
    """A folder with one file of two encapsulated frames."""
    (tmp_path / "in").mkdir()
    shutil.copy(PYDICOM_FILES / "SC_rgb_rle_16bit_2frame.dcm", tmp_path / "in" / "a")
    return tmp_path / "in"


@pytest.fixture
def tier(client, folder):
    with DicomStore(client, chunk_size=1000, progress=False, source=folder, ttl=100) as tier:
        tier.load(folder)
        yield tier


def spoil(client, key, damage):
    """Do to a key what `damage` says; return what it held."""
    text = client.get(key)
    client.delete(key)
    if damage == "damaged":
        client.set(key, text[:-1] + b"x")
    return text


def volume(store, name):
    """These frames form no volume, which can be said only once they are found."""
    with pytest.raises(VolumeError) as caught:
        store.volume([name])
    return str(caught.value)


WAYS = {
    "frame": lambda store: store.frame("a", 1).tobytes(),
    "frame_bytes": lambda store: store.frame_bytes("a", 1),
    "volume": lambda store: volume(store, "a"),
}


@pytest.mark.parametrize("chunks", ["hot", "cold"])
@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("way", WAYS)
def test_a_lost_frame_table_is_made_again(way, damage, chunks, client, tier, folder):
    """Whatever needs the table has it made again from the file; it is there afterwards."""
    expected, manifest = WAYS[way](tier), tier.manifest("a")
    key = manifest.attachment_key("frames")
    table = spoil(client, key, damage)
    if chunks == "cold":
        client.delete(*manifest.chunk_keys())
    assert WAYS[way](DicomStore(client, progress=False, source=folder)) == expected
    assert client.get(key) == table and client.ttl(key) == -1
    assert tier.manifest("a") == manifest


@pytest.mark.parametrize("damage", DAMAGE)
def test_lost_dicom_json_is_made_again(damage, client, tier):
    """The data set as DICOM JSON comes back byte for byte, and only where there is a source."""
    key = tier.manifest("a").attachment_key("json")
    text = spoil(client, key, damage)
    with pytest.raises((MissingChunkError, DamagedError), match=f"{key}.*repair=True"):
        DicomStore(client, progress=False)._viewing.dicom_json("file:a")
    assert tier._viewing.dicom_json("file:a") == text == client.get(key)


def test_json_that_was_made_a_little_differently(client, tier):
    """What a different release compressed differently is taken on, with its CRC-32."""
    key = tier.manifest("a").attachment_key("json")
    text = client.get(key)
    client.delete(key)
    client.execute_command("JSON.SET", "file:a", "$.attachments.json", "7")
    assert tier._viewing.dicom_json("file:a") == text
    assert DicomStore(client, progress=False)._viewing.dicom_json("file:a") == text
    assert tier.verify()["status"].tolist() == ["ok"]


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["json", "frames"])
def test_verify_looks_beside_the_chunks(name, damage, client, tier):
    """What lies beside the chunks is named if it is damaged, or gone without a source."""
    key = tier.manifest("a").attachment_key(name)
    spoil(client, key, damage)
    row = DicomStore(client, progress=False).verify().iloc[0]
    assert row["status"] == "damaged" and f"{key} is {damage}" in row["reason"]
    row = tier.verify().iloc[0]
    assert row["status"] == {"gone": "cold", "damaged": "damaged"}[damage] and row["hot"] == 1
    tier._viewing.dicom_json("file:a")
    tier.frame("a", 1)
    assert tier.verify()["status"].tolist() == ["ok"]


def test_no_worker_starts_inside_a_read(client, tier, folder, monkeypatch):
    """A file whose document is gone is described here; its thumbnail comes with the next load."""

    def refuse(*_):
        raise AssertionError("a worker was asked for")

    shutil.copy(PYDICOM_FILES / "CT_small.dcm", folder / "ct")
    tier.load(folder)
    thumbnail = client.execute_command("JSON.GET", "file:ct", "thumbnail")
    client.delete("file:ct")
    describing.end_idle_workers()
    with monkeypatch.context() as patch:
        patch.setattr(describing, "_Worker", refuse)
        assert tier.read("ct") == (folder / "ct").read_bytes()
        (folder / "a").write_bytes((folder / "a").read_bytes()[:-1])
        client.delete(*tier.manifest("a").chunk_keys())
        assert tier.read("a") == (folder / "a").read_bytes()
    assert client.execute_command("JSON.GET", "file:ct", "$.thumbnail") == b"[]"
    tier.load(folder)
    assert client.execute_command("JSON.GET", "file:ct", "thumbnail") == thumbnail


def described(client, name):
    return json.loads(client.execute_command("JSON.GET", f"file:{name}", "header", "patientName"))


def test_no_process_starts_for_odd_text(client, tier, folder):
    """A header in code extensions, or with bytes that its character set has not, is read here."""
    charset = element(0x00080005, "CS", b"ISO 2022 IR 6\\ISO 2022 IR 87")
    for name, text in {"good": "山田^太郎".encode("iso2022_jp"), "bad": b"Roe\x1b$Z\xff"}.items():
        patient = element(0x00100010, "PN", text + b" " * (len(text) % 2))
        (folder / name).write_bytes(PREAMBLE + charset + patient)
    tier.load(folder)
    describing.end_idle_workers()
    names = ["good", "bad"]
    documents = {name: described(client, name) for name in names}
    client.delete("file:good", "file:bad")
    client.delete(json_key := tier.manifest("a").attachment_key("json"))
    processes = psutil.Process().children()
    for name in names:
        assert tier.read(name) == (folder / name).read_bytes()
        assert described(client, name) == documents[name]
        client.delete(tier.manifest(name).attachment_key("json"))
        assert tier.dicom_json(name)
    assert tier.dicom_json("a") == client.get(json_key)
    assert psutil.Process().children() == processes


@pytest.mark.parametrize("lost", [[0], [2], [0, 1, 5], range(6)], ids=str)
@pytest.mark.parametrize("way", ["repair", "read"])
def test_what_is_permanent_stays_permanent(way, lost, client, tmp_path):
    """Chunks that a tier with ttl mends in a file stored without expire as little as the others."""
    (tmp_path / "a").write_bytes(IMAGE)
    DicomStore(client, chunk_size=1000, progress=False).load(tmp_path)
    tier = DicomStore(client, chunk_size=1000, progress=False, source=tmp_path, ttl=100)
    keys = tier.manifest("a").chunk_keys()
    for number in lost:
        client.set(keys[number], b"x" * 1000)
    if len(lost) < len(keys):
        client.delete(keys[lost[-1]])
    if way == "repair":
        assert tier.load(tmp_path, repair=True)["status"].tolist() == ["repaired"]
    assert tier.read("a") == IMAGE
    assert {client.ttl(key) for key in keys} == {-1}


def test_what_expires_goes_on_expiring(client, tmp_path):
    """Chunks that are mended in a file with ttl get that ttl, if all were gone as well."""
    (tmp_path / "a").write_bytes(IMAGE)
    tier = DicomStore(client, chunk_size=1000, progress=False, source=tmp_path, ttl=100)
    tier.load(tmp_path)
    keys = tier.manifest("a").chunk_keys()
    for lost in (keys[:1], keys):
        client.delete(*lost)
        assert tier.read("a") == IMAGE
        assert all(90 < client.ttl(key) <= 100 for key in keys)


# --- documents that were evicted -----------------------------------------------------------------

MANY = {
    "volume": lambda store, keys: store.volume(keys).array,
    "evicted since they were found": lambda store, keys: (
        store._viewing.volumes(keys, split=False)[0].array
    ),
    "read_many": lambda store, keys: np.stack(
        [np.frombuffer(content, np.uint8) for content in store.read_many(keys).values()]
    ),
}


@pytest.mark.parametrize("way", MANY)
def test_a_series_whose_documents_were_evicted(way, client, tmp_path):
    """A series is read as a whole whether its documents are there or only in the source."""
    write_sample_ct(tmp_path, slices=3, side=16)
    tier = DicomStore(client, progress=False, source=tmp_path)
    keys = tier.load(tmp_path)["key"].tolist()
    expected = MANY[way](tier, keys)
    client.delete(*keys[:2])
    with pytest.raises(NotStoredError, match=keys[0].removeprefix("file:")):
        MANY[way](DicomStore(client, progress=False), keys)
    assert np.array_equal(MANY[way](tier, keys), expected)
    assert tier.verify()["status"].tolist() == ["ok"] * 3


# --- a source that changes all the time ----------------------------------------------------------

READERS, ROUNDS = 4, 40


@pytest.mark.parametrize("way", ["read", "open"])
def test_readers_of_a_source_that_changes(way, client, tmp_path):
    """Bytes are those of one version, and of the one that the document names, or it is said."""
    images = [dicom(pixels=bytes([number]) * 5000, Rows=1) for number in range(8)]
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a").write_bytes(images[0])
    tier = DicomStore(client, chunk_size=1000, progress=False, source=folder)
    tier.load(folder)
    is_over = threading.Event()

    def document():
        return json.loads(client.execute_command("JSON.GET", "file:a", "version", "blake3"))

    def change():
        number = 0
        while not is_over.wait(0.01):  # else no reader of parts is ever done on a slow machine
            number += 1
            (tmp_path / "new").write_bytes(images[number % len(images)])
            (tmp_path / "new").replace(folder / "a")

    def read(seed):
        chosen, answered = random.Random(seed), 0
        for _ in range(ROUNDS):
            keys, before = tier.manifest("a").chunk_keys(), document()
            client.delete(*chosen.sample(keys, chosen.randint(1, len(keys))))
            try:
                if way == "read":
                    content = tier.read("a")
                else:
                    with tier.open("a", cache_bytes=1000) as file:
                        content = b"".join(iter(lambda: file.read(700), b""))
            except (MissingChunkError, DamagedError):
                continue
            assert content in images
            if document() == before:
                assert blake3(content).hexdigest() == before["blake3"]
            answered += 1
        return answered

    with ThreadPoolExecutor(READERS + 1) as pool:
        changing = pool.submit(change)
        try:
            answered = sum(pool.map(read, range(READERS)))
        finally:
            is_over.set()
        changing.result()
    assert answered
    assert tier.read("a") in images
    assert tier.verify()["status"].tolist() == ["ok"]
