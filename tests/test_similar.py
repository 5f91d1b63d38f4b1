"""Images that look alike: the thumbnail of every kind of image, and the search for the nearest."""

import io
import json
import subprocess
import sys

import numpy as np
import pydicom
import pytest
from conftest import PYDICOM_DATA, PYDICOM_FILES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom import config
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian
from samples import dicom

from dicomstore import DicomStore
from dicomstore.errors import NoThumbnailError, NotStoredError
from dicomstore.imaging import header, rendering, thumbnail, values

#: The only files of pydicom's with pixels that have no thumbnail: their pixels are cut off.
UNDECODABLE = {"JPEG2000-embedded-sequence-delimiter.dcm", "MR_truncated.dcm"}


@pytest.fixture
def store(client):
    """A store that makes thumbnails."""
    return DicomStore(client, progress=False, thumbnails=True)


def stored_thumbnail(client, key):
    """Return a stored thumbnail, None if the file has none."""
    return next(iter(json.loads(client.execute_command("JSON.GET", key, "$.thumbnail"))), None)


def grey(image, *, frames=1, photometric="MONOCHROME2", **attributes):
    """Return a DICOM file of these pixels, 8 bits each, as bytes."""
    image = np.asarray(image, dtype=np.uint8)
    dataset = Dataset()
    dataset.SOPClassUID, dataset.SOPInstanceUID = CTImageStorage, "1.2.3.4"
    dataset.Rows, dataset.Columns = image.shape[-2:]
    dataset.NumberOfFrames, dataset.SamplesPerPixel = frames, 1
    dataset.PhotometricInterpretation = photometric
    dataset.BitsAllocated = dataset.BitsStored = 8
    dataset.HighBit, dataset.PixelRepresentation = 7, 0
    dataset.WindowCenter, dataset.WindowWidth = 128, 256
    with config.disable_value_validation():
        for keyword, value in attributes.items():
            setattr(dataset, keyword, value)
    dataset.PixelData = image.tobytes() + b"\0" * (image.size % 2)
    dataset["PixelData"].VR = "OB"
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def thumbnail_of(content):
    return thumbnail.of_file(io.BytesIO(content), header.searchable(io.BytesIO(content)))


def ramp(rows=64, columns=64):
    return np.add.outer(np.arange(rows) * 2, np.arange(columns)) % 256


# --- the thumbnail -------------------------------------------------------------------------------


def test_every_image_of_the_corpus_has_one():
    """All kinds of pixels, compressed or not, have a thumbnail near that of the whole picture."""
    described = {}
    for path in sorted(PYDICOM_DATA.rglob("*")):
        if not path.is_file():
            continue
        content = path.read_bytes()
        members = header.searchable(io.BytesIO(content))
        if members is None:
            continue
        found = thumbnail.of_file(io.BytesIO(content), members)
        try:
            dataset = rendering.read_dataset(content)
            frame = int(members.get("numberOfFrames", 1)) // 2
            with values.quietly():
                expected = thumbnail.of_array(rendering.render(dataset, frame))
        except values.UNREADABLE:
            assert found is None
            assert path.name in UNDECODABLE or not {"Rows", "PixelData"} <= set(dataset.dir())
            continue
        assert found is not None, path
        described[path.name] = members.get("transferSyntaxUID")
        assert len(found) == thumbnail.DIMENSIONS and set(map(type, found)) == {int}
        assert min(found) >= 0 and max(found) <= 255
        difference = np.subtract(found, expected)
        assert np.sqrt(np.mean(difference**2)) < 3, path
    assert len(described) >= 100 and len(set(described.values())) >= 12


def test_it_shows_what_is_seen():
    """It has mean grey levels row by row, the inverse for MONOCHROME1, luminance for colour."""
    image = np.zeros((16, 16), dtype=np.uint8)
    image[:2, :2], image[:2, 14:], image[14:, :2] = 255, 100, 200
    found = thumbnail_of(grey(image))
    assert (found[0], found[7], found[56]) == (255, 100, 200) and sum(found) == 555
    inverse = thumbnail_of(grey(image, photometric="MONOCHROME1"))
    assert np.abs(np.add(found, inverse) - 255).max() <= 1
    colours = np.zeros((8, 8, 3), dtype=np.uint8)
    colours[0, :3] = np.eye(3) * 255
    assert thumbnail.of_array(colours)[:4] == [76, 150, 29, 0]


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (3, 5), (8, 8), (17, 8), (100, 7), (1500, 1300)])
def test_any_shape(shape):
    """Pictures of any size give as many numbers; a plain one gives its grey level."""
    assert thumbnail_of(grey(np.full(shape, 77))) == [77] * thumbnail.DIMENSIONS
    assert thumbnail.of_array(np.full(shape, 77, np.uint8)) == [77] * thumbnail.DIMENSIONS


@pytest.mark.parametrize(
    "window",
    [
        {"WindowCenter": None, "WindowWidth": None},
        {"WindowCenter": 40, "WindowWidth": None},
        {"WindowCenter": 40, "WindowWidth": 0},
    ],
)
def test_without_a_window_images_differ(store, window):
    """Images whose window is empty, or of no width, are compared by what they show."""
    pictures = {"ramp": ramp(), "nearly": ramp() + ramp() % 3, "back": 255 - ramp(), "flat": 77}
    for name, picture in pictures.items():
        store.put(name, grey(np.broadcast_to(picture, (64, 64)) % 256, **window))
    found = store.similar("ramp", k=3)
    assert found["path"][0] == "nearly" and found["distance"][0] < 20
    assert found["distance"][1:].min() > 60


def test_the_middle_frame_counts():
    """The thumbnail of a multi-frame image shows its middle frame."""
    frames = np.stack([np.full((8, 8), level) for level in (10, 20, 30, 40, 50)])
    assert thumbnail_of(grey(frames, frames=5)) == [30] * thumbnail.DIMENSIONS


def test_only_one_frame_is_read():
    """A file of many frames is read up to the bulk data, and then only as much as a frame has."""
    frames = np.zeros((400, 64, 64), dtype=np.uint8)
    content = grey(frames, frames=400)

    class Counting(io.BytesIO):
        total = 0

        def read(self, size=-1):
            piece = super().read(size)
            self.total += len(piece)
            return piece

    file = Counting(content)
    members = header.searchable(io.BytesIO(content))
    assert thumbnail.of_file(file, members) == [0] * thumbnail.DIMENSIONS
    assert file.total < len(content) / 20


@pytest.mark.parametrize(
    "attributes",
    [
        {"Rows": 60_000, "Columns": 60_000},
        {"Rows": 0},
        {"Columns": 65},
        {"NumberOfFrames": 10**9},
        {"BitsAllocated": 64},
        {"BitsAllocated": 7},
        {"SamplesPerPixel": 3},
        {"PhotometricInterpretation": "HSV"},
        {"PhotometricInterpretation": "PALETTE COLOR"},
        {"PixelRepresentation": 7},
    ],
)
def test_what_does_not_fit_together_has_none(client, store, attributes):
    """A header that contradicts its pixels costs the thumbnail, never the file."""
    content = grey(ramp(), **attributes)
    store.put("a", content)
    assert store.read("a") == content
    found = stored_thumbnail(client, "file:a")
    assert found is None or len(found) == thumbnail.DIMENSIONS
    assert len(store.find()) == 1


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_damaged_files_have_none_or_a_whole_one(data):
    """Files with bytes changed or cut off raise nothing: a thumbnail comes out, or None."""
    name = data.draw(st.sampled_from(["CT_small.dcm", "MR_small_RLE.dcm", "image_dfl.dcm"]))
    content = bytearray((PYDICOM_FILES / name).read_bytes())
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(132, len(content) - 1))] = data.draw(st.integers(0, 255))
    del content[data.draw(st.integers(140, len(content))) :]
    members = header.searchable(io.BytesIO(content))
    if members is not None:
        found = thumbnail.of_file(io.BytesIO(content), members)
        assert found is None or len(found) == thumbnail.DIMENSIONS


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((4, 4, 4)), np.zeros(4), np.zeros((0, 4)), np.zeros((2, 2), complex),
        np.full((2, 2), np.nan), np.array([["a"]]), [[1, "x"]],
    ],
)  # fmt: skip
def test_arrays_that_are_no_picture(store, image):
    """Arrays of a different shape or type, or with NaN, are refused in a sentence."""
    with pytest.raises(ValueError, match="array"):
        store.similar(image)


def test_it_needs_neither_pandas_nor_redis(request):
    """Worker processes can make thumbnails without importing pandas or redis."""
    code = "import sys, dicomstore.imaging.thumbnail\n"
    code += "print(sorted({'pandas', 'redis'} & set(sys.modules)))"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=request.config.rootpath
    )
    assert run.stdout.strip() == "[]", run.stderr


# --- the search ----------------------------------------------------------------------------------


def test_the_nearest_come_first(store):
    """Distances are grey levels, nearest first; the image itself is none of its results."""
    for level in (10, 12, 20, 50):
        store.put(f"{level}", grey(np.full((9, 9), level), Modality="CT" if level < 50 else "MR"))
    found = store.similar("12", k=2)
    assert list(found["path"]) == ["10", "20"] and found["distance"].tolist() == [2.0, 8.0]
    assert list(found.columns[:4]) == ["path", "key", "distance", "imageName"]
    assert list(store.similar("file:12", k=9)["path"]) == ["10", "20", "50"]
    assert list(store.similar("12", modality="MR")["path"]) == ["50"]
    assert list(store.similar("12", query="@modality:{MR}")["path"]) == ["50"]
    assert store.similar("12", modality="US").empty
    pictured = store.similar(np.full((30, 20), 19, np.uint8), 2, columns=["rows"])
    assert list(pictured["path"]) == ["20", "12"] and pictured["rows"].tolist() == [9, 9]
    for k in (0, -1, 2.5):
        with pytest.raises(ValueError, match="k is"):
            store.similar("12", k)
    with pytest.raises(NotStoredError):
        store.similar("none")


def test_equal_images_are_all_found(store):
    """Copies of an image are results at distance zero, the image itself is not, k are found."""
    for name in "abcdef":
        store.put(name, grey(ramp()))
    for name in "abcdef":
        found = store.similar(name, k=5)
        assert sorted(found["path"]) == sorted(set("abcdef") - {name})
        assert found["distance"].eq(0).all()


def test_it_is_the_exact_nearest(client, store):
    """The order is that of a comparison with every image, also beside conditions."""
    store.load(PYDICOM_FILES)
    everything = store.find()
    vectors = {
        key: np.array(found)
        for key in everything["key"]
        if (found := stored_thumbnail(client, key)) is not None
    }
    assert len(vectors) > 80
    everything = everything.set_index("key")
    for key in list(vectors)[::10]:
        for conditions in ({}, {"modality": "CT"}, {"rows": (100, None)}):
            matching = store.find(columns=(), **conditions)["key"]
            distances = sorted(
                np.sqrt(np.mean((vectors[key] - vectors[other]) ** 2))
                for other in matching
                if other in vectors and other != key
            )
            found = store.similar(key, k=7, **conditions)
            assert found["distance"].tolist() == pytest.approx(distances[:7])


def test_what_has_no_pixels_says_so(store, client):
    """Without pixels, or with thumbnails turned off, similar says why; search goes on."""
    store.put("none", dicom(Modality="CT"))
    DicomStore(client, progress=False, thumbnails=False).put("off", grey(ramp()))
    store.put("image", grey(ramp()))
    for name in ("none", "off"):
        with pytest.raises(NoThumbnailError, match=f"file:{name} .*no pixels"):
            store.similar(name)
    assert store.similar("image").empty
    assert len(store.find()) == 3


def test_a_picture_as_array(store):
    """A picture as it is shown finds the very file first, at a distance of next to nothing."""
    store.load(PYDICOM_FILES / "MR_small.dcm")
    store.load(PYDICOM_FILES / "dicomdirtests")
    picture = rendering.render(pydicom.dcmread(PYDICOM_FILES / "MR_small.dcm"))
    for array in (picture, np.stack([picture] * 3, axis=-1)):
        nearest = store.similar(array, 1)
        assert list(nearest["path"]) == ["MR_small.dcm"] and nearest["distance"][0] < 1
