"""The same fault has the same class and the same words, whichever way the bytes were read."""

import os

import pydicom
import pytest
from conftest import PYDICOM_FILES
from samples import dicom

from dicomstore import DicomStore
from dicomstore.errors import DamagedError, MissingChunkError

SMALL = (PYDICOM_FILES / "MR_small.dcm").read_bytes()


def opened(store):
    with store.open("a") as file:
        return file.read()


WAYS = {
    "read": lambda store: store.read("a"),
    "read into": lambda store: store.read("a", into=bytearray(20 * 2**20)),
    "read many": lambda store: store.read_many(["b", "a", "b"]),
    "read again": lambda store: (store.find(), store.read("a")),
    "open": opened,
    "frame": lambda store: store.frame("a", 0),
    "frame bytes": lambda store: store.frame_bytes("a", 0),
    "volume": lambda store: store.volume(["a"]),
}


def fault_of(store, way):
    """Return class, words and keys of the error that a way of reading raises."""
    with pytest.raises((MissingChunkError, DamagedError)) as caught:
        WAYS[way](store)
    error = caught.value
    kind = MissingChunkError if isinstance(error, MissingChunkError) else DamagedError
    return kind, str(error), error.keys


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size", ["small", "large"])
def test_one_fault_one_text(way, size, client):
    """A lost, a damaged, a shortened and a longer chunk are told alike, with the way out."""
    if size == "small":
        store, image = DicomStore(client, chunk_size=3000, progress=False), SMALL
    else:  # one that goes over connections of its own
        dataset = pydicom.dcmread(PYDICOM_FILES / "MR_small.dcm")
        dataset.Rows, dataset.Columns = 4096, 2048
        dataset.PixelData = os.urandom(2 * 4096 * 2048)
        image = dataset
        store = DicomStore(client, progress=False, thumbnails=False)
    store.put("a", image)
    store.put("b", dicom())
    key = store.manifest("a").chunk_key(2)
    value = client.get(key)
    damaged = (
        DamagedError,
        f"The chunk {key} is damaged: its length or its CRC-32 is wrong. "
        "Load the file again with repair=True.",
        (key,),
    )
    for wrong in (value[:-1] + bytes([value[-1] ^ 1]), value[:-1], value + b"x", b""):
        client.set(key, wrong)
        assert fault_of(store, way) == damaged
    client.delete(key)
    text = f"The chunk {key} is missing. Load the file again with repair=True."
    assert fault_of(store, way) == (MissingChunkError, text, (key,))
    reason = store.verify(["a"])["reason"][0]
    assert reason == f"the chunk {key} is gone. Load the file again with repair=True."


@pytest.mark.parametrize("way", ["read", "read into", "read many", "open"])
@pytest.mark.parametrize("large", [False, True])
def test_all_that_is_missing_is_counted(way, large, client):
    """Of several lost chunks the first is named, and how many there are; `open` meets one."""
    store = DicomStore(client, chunk_size=262_080 if large else 1000, progress=False)
    store.put("a", dicom(pixels=bytes(18 * 2**20 if large else 9000)))
    store.put("b", dicom())
    keys = store.manifest("a").chunk_keys([1, 2, 5])
    client.delete(*keys)
    kind, text, named = fault_of(store, way)
    assert kind is MissingChunkError and text.endswith("repair=True.")
    assert set(named) <= set(keys) and named[0] in text
    if not (large and way == "open"):
        assert text.startswith("3 chunks are missing, the first is") and named == tuple(keys)
