"""Tools of the field read stored files as they are, and take only what they touch."""

import hashlib
import io
import shutil
import zipfile

import numpy as np
import pydicom
import pytest
import tifffile
import tiffslide
import zarr
from blake3 import blake3
from conftest import PYDICOM_FILES
from PIL import Image
from pydicom.encaps import encapsulate, encapsulate_extended, generate_frames
from pydicom.pixels import iter_pixels, pixel_array

from demo.cine import write_sample_cine
from demo.slide import write_sample_slide
from dicomstore import DicomStore
from dicomstore.blobs.manifest import DEFAULT_CHUNK_SIZE, Manifest, plan_tail
from dicomstore.blobs.reader import ChunkReader
from dicomstore.errors import NotDicomError

SLIDE_BYTES = 20_000_000
FRAMES, FRAME_BYTES = 400, 512 * 1024


@pytest.fixture(scope="session")
def slide(tmp_path_factory):
    return write_sample_slide(tmp_path_factory.mktemp("slide") / "made_up.svs", size=SLIDE_BYTES)


# --- the targets ---------------------------------------------------------------------------------


def test_a_large_instance_is_read_in_part(store, client, tmp_path):
    """Header: 2 chunks, 3 round trips; a frame: its bytes + 2 chunks, 5 round trips."""
    path = write_sample_cine(tmp_path / "frames.dcm", frames=FRAMES)
    store.load(path)
    client.config_resetstat()
    header = store.header("frames.dcm")
    stats = client.info("commandstats")
    assert (header.NumberOfFrames, header.PatientName) == (FRAMES, "MADE UP")
    assert "PixelData" not in header
    assert stats["cmdstat_json.get"]["calls"] <= 3
    assert stats["cmdstat_mget"]["calls"] <= 2
    assert client.info("stats")["total_net_output_bytes"] < 2 * DEFAULT_CHUNK_SIZE + 20_000
    for frame in (0, 217, 399):
        with store.open("frames.dcm") as file:
            assert np.array_equal(pixel_array(file, index=frame), pixel_array(path, index=frame))
        assert file.bytes_fetched <= FRAME_BYTES + 2 * DEFAULT_CHUNK_SIZE
        assert file.round_trips <= 5


def page_tile(file, index=300):
    """One tile of level 0, as tifffile's pages give it."""
    with tifffile.TiffFile(file) as tiff:
        page = tiff.pages[0]
        tiff.filehandle.seek(page.dataoffsets[index])
        data = tiff.filehandle.read(page.databytecounts[index])
        return page.decode(data, index, jpegtables=page.jpegtables)[0].squeeze()


def zarr_tile(file):
    """One tile of level 0, as tifffile's zarr store gives it."""
    with tifffile.TiffFile(file) as tiff:
        return zarr.open(tiff.aszarr(level=0), mode="r")[1024:1280, 2560:2816]


def tiffslide_tile(file):
    """One tile of level 0 through tiffslide."""
    with tiffslide.TiffSlide(file) as opened:
        return np.asarray(opened.read_region((2560, 1024), 0, (256, 256)))


@pytest.mark.parametrize("chunk_size", [DEFAULT_CHUNK_SIZE, 30 * 1024])
@pytest.mark.parametrize("tile", [page_tile, zarr_tile, tiffslide_tile])
def test_one_tile_of_a_slide(client, slide, tile, chunk_size):
    """From open to pixels 8 round trips at most, and 8 chunks, of however large a slide."""
    store = DicomStore(client, chunk_size=chunk_size, progress=False)
    store.load(slide)
    with slide.open("rb") as local:
        expected = tile(local)
    with store.open(slide.name) as file:
        assert np.array_equal(tile(file), expected)
    assert file.round_trips <= 8
    assert file.bytes_fetched <= 8 * DEFAULT_CHUNK_SIZE


# --- pydicom -------------------------------------------------------------------------------------

#: Of the folder pydicom-data: encodings and the largest files of many frames.
LARGE = (
    "emri_small.dcm",
    "emri_small_big_endian.dcm",
    "emri_small_RLE.dcm",  # with an offset table
    "emri_small_jpeg_2k_lossless.dcm",  # without one
    "emri_small_jpeg_ls_lossless.dcm",
    "color3d_jpeg_baseline.dcm",
    "OBXXXX1A_expb_2frame.dcm",
    "SC_rgb_expb_32bit_2frame.dcm",
    "eCT_Supplemental.dcm",
    "MR2_J2KI.dcm",  # one frame in two fragments
)
#: Of pydicom's own test files.
SMALL = (
    "MR_small_bigendian.dcm",
    "SC_rgb_rle_32bit_2frame.dcm",
    "rtdose_rle.dcm",
    "examples_ybr_color.dcm",
    "examples_jpeg2k.dcm",  # one frame in three fragments, no offset table
)


def fragmented(source, path, *, table):
    """Write the JPEG 2000 frames of `source` again, each in three fragments."""
    dataset = pydicom.dcmread(source)
    frames = list(generate_frames(dataset.PixelData, number_of_frames=dataset.NumberOfFrames))
    if table == "extended":
        extended = encapsulate_extended(frames)
        dataset.PixelData, dataset.ExtendedOffsetTable, dataset.ExtendedOffsetTableLengths = (
            extended
        )
    else:
        dataset.PixelData = encapsulate(frames, fragments_per_frame=3, has_bot=table == "basic")
    dataset.save_as(path)


def check_pixels(store, path):
    """Compare single frames, an iteration over three, and the element with those from disk."""
    whole = pydicom.dcmread(path)
    count = int(whole.get("NumberOfFrames", 1) or 1)
    numbers = sorted({0, count // 2, count - 1})
    expected = [pixel_array(path, index=number) for number in numbers]
    for number, frame in zip(numbers, expected, strict=True):
        with store.open(path.name, cache_bytes=1 << 20) as file:
            assert np.array_equal(pixel_array(file, index=number), frame)
    with store.open(path.name) as file:
        assert np.array_equal(list(iter_pixels(file, indices=numbers)), expected)
        file.seek(0)
        assert pydicom.dcmread(file).PixelData == whole.PixelData


@pytest.mark.parametrize("name", [*LARGE, *SMALL])
def test_pixels_are_those_from_disk(client, large_files, name):
    """Whatever the transfer syntax, frames read in part are those that the file on disk has."""
    path = next(
        folder / name for folder in (large_files, PYDICOM_FILES) if (folder / name).exists()
    )
    store = DicomStore(client, chunk_size=4000, progress=False)
    store.load(path)
    check_pixels(store, path)


@pytest.mark.parametrize("table", ["basic", "extended", "none"])
def test_fragmented_frames_are_those_from_disk(client, large_files, tmp_path, table):
    """Several frames of fragments are found by either offset table, and alike without any."""
    path = tmp_path / "fragmented.dcm"
    fragmented(large_files / "emri_small_jpeg_2k_lossless.dcm", path, table=table)
    store = DicomStore(client, chunk_size=1000, progress=False)
    store.load(path)
    check_pixels(store, path)


def test_deflated_pixels_are_those_from_disk(store):
    """In deflated syntax nothing can be read in part, so that the whole file is fetched."""
    path = PYDICOM_FILES / "image_dfl.dcm"
    store.load(path)
    with store.open(path.name) as file:
        assert np.array_equal(pydicom.dcmread(file).pixel_array, pydicom.dcmread(path).pixel_array)
        assert file.bytes_fetched == file.size
    assert store.header(path.name) == pydicom.dcmread(path, stop_before_pixels=True)


def test_one_compressed_frame_takes_a_part_of_the_file(client, large_files):
    """With an offset table, a late frame is read without those before it."""
    path = PYDICOM_FILES / "examples_ybr_color.dcm"  # 30 frames, 225 kB
    store = DicomStore(client, chunk_size=4000, progress=False)
    store.load(path)
    with store.open(path.name) as file:
        assert np.array_equal(pixel_array(file, index=27), pixel_array(path, index=27))
        assert file.bytes_fetched < file.size


def test_a_header_is_read_without_the_pixels(client, store, large_files):
    """dcmread stops before the pixels, and store.header gives the same data set."""
    for name in ("RG1_UNCR.dcm", "gdcm-US-ALOKA-16_big.dcm", "RG1_J2KR.dcm"):
        path = large_files / name
        store.load(path)
        expected = pydicom.dcmread(path, stop_before_pixels=True)
        assert store.header(name) == expected
        with store.open(name) as file:
            assert pydicom.dcmread(file, stop_before_pixels=True) == expected
            assert file.bytes_fetched <= 2 * DEFAULT_CHUNK_SIZE


def test_a_header_without_preamble_or_of_a_slide(store, slide):
    """A file without preamble has a header as well; a slide has none, and the error says so."""
    store.load(PYDICOM_FILES / "no_meta.dcm")
    assert store.header("no_meta.dcm").PatientID == "1CT1"
    store.load(slide)
    with pytest.raises(NotDicomError, match=r"made_up\.svs is not a DICOM file"):
        store.header(slide.name)


def test_deferred_elements_are_read_later(client, large_files):
    """defer_size leaves large elements in Redis until they are asked for."""
    path = large_files / "RG1_UNCR.dcm"
    store = DicomStore(client, progress=False)
    store.load(path)
    with store.open(path.name) as file:
        dataset = pydicom.dcmread(file, defer_size=10_000)
        assert file.bytes_fetched <= 2 * DEFAULT_CHUNK_SIZE
        assert dataset.PixelData == pydicom.dcmread(path).PixelData
        assert file.bytes_fetched >= len(dataset.PixelData)


# --- the others ----------------------------------------------------------------------------------


def test_pillow_reads_the_slides_pages(store, slide, monkeypatch):
    """Pillow opens the slide as the TIFF that it is, and its thumbnail is the one on disk."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    store.load(slide)
    with Image.open(slide) as local, store.open(slide.name) as file, Image.open(file) as image:
        image.seek(1)
        local.seek(1)
        assert np.array_equal(np.asarray(image), np.asarray(local))


def test_hashlib_and_shutil_read_the_whole(client, slide, tmp_path):
    """Digest and copy of the slide are those of the file, in few round trips."""
    store = DicomStore(client, progress=False)
    store.load(slide)
    with slide.open("rb") as local, store.open(slide.name) as file:
        expected = hashlib.file_digest(local, blake3).hexdigest()
        assert hashlib.file_digest(file, blake3).hexdigest() == expected
        assert store.blake3(slide.name) == expected
        assert file.round_trips < 20
    with (
        store.open(slide.name, cache_bytes=1 << 20) as file,
        (tmp_path / "copy").open("wb") as copy,
    ):
        shutil.copyfileobj(file, copy)
    assert (tmp_path / "copy").read_bytes() == slide.read_bytes()
    assert file.bytes_fetched == file.size


def test_zipfile_reads_one_member(large_files):
    """A ZIP cannot be stored, so zipfile reads one whose chunks lie in memory: one member of it."""
    names = ("emri_small.dcm", "RG3_UNCR.dcm", "RG1_UNCR.dcm")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names:
            archive.write(large_files / name, name)
    data, size = buffer.getvalue(), 65_472
    manifest = Manifest("file:x", "0" * 12, len(data), size, plan_tail(len(data), size))

    def fetch(numbers):
        return [data[manifest.offset(n) :][: manifest.length(n)] for n in numbers]

    with ChunkReader(manifest, fetch, name="x") as reader, zipfile.ZipFile(reader) as archive:
        assert archive.namelist() == list(names)
        with archive.open("emri_small.dcm") as member:
            assert np.array_equal(pixel_array(member), pixel_array(large_files / "emri_small.dcm"))
        assert reader.bytes_fetched < 1_000_000
        assert archive.testzip() is None
