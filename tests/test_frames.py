"""Where frames lie in a file, and how one is decoded."""

import io
import json
import struct
import zlib

import numpy as np
import pytest
from conftest import PYDICOM_FILES
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.encaps import get_frame
from pydicom.pixels import pixel_array
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEGBaseline8Bit,
)
from samples import dicom, element

from dicomstore.errors import FrameError
from dicomstore.imaging import header, rendering, values
from dicomstore.imaging.frames import Frames
from dicomstore.imaging.locating import Span, locate

GREY = {
    "Rows": 3,
    "Columns": 5,
    "SamplesPerPixel": 1,
    "BitsStored": 8,
    "HighBit": 7,
    "PixelRepresentation": 0,
    "PhotometricInterpretation": "MONOCHROME2",
}


def frames_of(file, name="a.dcm"):
    members = header.searchable(io.BytesIO(file))
    member, table = locate(io.BytesIO(file), members)
    return Frames(name, member, members["header"], members.get("transferSyntaxUID"), table)


def stored(file, k, frames=None):
    frames = frames or frames_of(file)
    span = frames.span(k)
    return frames.stored(k, file[span.offset : span.offset + span.length])


def item(value):
    return b"\xfe\xff\x00\xe0" + struct.pack("<L", len(value)) + value


END = b"\xfe\xff\xdd\xe0\0\0\0\0"


def encapsulated(body, *, frames=None, syntax=JPEGBaseline8Bit, tables=b""):
    """Return a file whose pixel data of undefined length is `body`."""
    count = {} if frames is None else {"NumberOfFrames": frames}
    start = dicom(syntax=syntax, BitsAllocated=8, **GREY, **count)
    return start + tables + element(0x7FE00010, "OB", body, length=0xFFFFFFFF)


def basic(*offsets):
    return item(np.array(offsets, "<u4").tobytes())


def extended(offsets, lengths):
    numbers = [np.array(each, "<u8").tobytes() for each in (offsets, lengths)]
    return b"".join(
        struct.pack("<HH2sHL", 0x7FE0, tag, b"OV", 0, len(raw)) + raw
        for tag, raw in enumerate(numbers, start=1)
    )


# --- real files ----------------------------------------------------------------------------------

REAL = [
    "CT_small.dcm",
    "MR_small_RLE.dcm",
    "MR_small_bigendian.dcm",
    "MR_small_implicit.dcm",
    "MR_small_jp2klossless.dcm",
    "MR_small_jpeg_ls_lossless.dcm",
    "SC_rgb_jpeg_gdcm.dcm",
    "SC_ybr_full_422_uncompressed.dcm",
    "SC_rgb_small_odd_big_endian.dcm",
    "SC_rgb_rle_2frame.dcm",
    "SC_rgb_small_odd.dcm",
    "SC_rgb_32bit_2frame.dcm",
    "color-pl.dcm",
    "color3d_jpeg_baseline.dcm",
    "emri_small_RLE.dcm",
    "emri_small_jpeg_2k_lossless.dcm",
    "emri_small_jpeg_ls_lossless.dcm",
    "emri_small_big_endian.dcm",
    "examples_rgb_color.dcm",
    "examples_ybr_color.dcm",
    "examples_palette.dcm",
    "rtdose_rle.dcm",
    "rtdose_expb.dcm",
    "ExplVR_BigEnd.dcm",
    "bad_sequence.dcm",
    "eCT_Supplemental.dcm",
    "liver.dcm",
    "liver_expb.dcm",
]


def test_it_is_the_same_where_the_search_begins(large_files):
    """Behind what was read of the header, frames are found as from the beginning of the file."""
    files = [
        dicom(pixels=bytes(0x4F57), Rows=1, Columns=0x4F57, syntax=ImplicitVRLittleEndian)
    ]  # the pixel data's length looks like a VR
    files += [path.read_bytes() for path in PYDICOM_FILES.rglob("*") if path.is_file()]
    files += [path.read_bytes() for path in large_files.rglob("*.dcm")]
    found = 0
    for content in files:
        with header.quietly():
            elements = header.read(io.BytesIO(content))
            if elements and elements.syntax != DeflatedExplicitVRLittleEndian:
                members = header.members(elements)
                shorter = locate(elements.file, members, elements)
                assert shorter == locate(elements.file, members)
                found += shorter[0] is not None
    assert found > 150


@pytest.mark.parametrize("name", REAL)
def test_real_files(name, large_files):
    """A frame fetched by its span and decoded is the one that pydicom decodes from the file."""
    path = next(path for place in (PYDICOM_FILES, large_files) for path in place.rglob(name))
    file = path.read_bytes()
    frames = frames_of(file)
    with values.quietly():
        dataset = rendering.read_dataset(file)
        for k in {0, frames.count // 2, frames.count - 1}:
            decoded = frames.decode(k, stored(file, k, frames))
            expected = pixel_array(dataset, index=k)
            assert decoded.dtype == expected.dtype
            np.testing.assert_array_equal(decoded, expected)


def test_instance_without_pixels():
    """A data set without pixel data has no member, and says so when a frame is asked for."""
    frames = frames_of(dicom(PatientID="1"))
    assert frames.member is None and frames.count == 0
    with pytest.raises(FrameError, match=r"a\.dcm has no pixel data"):
        frames.span(0)


def test_deflated_data_set():
    """Frames of a deflated data set are not looked for, and `span` says why."""
    file = dicom(pixels=bytes(15), syntax=DeflatedExplicitVRLittleEndian, **GREY)
    with pytest.raises(FrameError, match="its data set is deflated"):
        frames_of(file).span(0)


# --- native pixel data ---------------------------------------------------------------------------


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
def test_native_frames(syntax):
    """Native frames follow each other from where the first one begins."""
    pixels = bytes(range(45)) + b"\0"
    file = dicom(pixels=pixels, syntax=syntax, NumberOfFrames=3, **GREY)
    frames = frames_of(file)
    assert frames.member == {"count": 3, "start": file.index(pixels), "bits": 120}
    assert frames.table is None and not Frames.needs_table(frames.member)
    assert [stored(file, k, frames) for k in range(3)] == [
        pixels[first : first + 15] for first in (0, 15, 30)
    ]


def test_frames_of_single_bits_are_moved_to_the_first_bit():
    """A 1-bit frame that begins within a byte is stored from its first bit on, and decoded so."""
    bits = np.random.default_rng(1).integers(0, 2, (7, 3, 5), np.uint8)
    packed = np.packbits(bits, bitorder="little").tobytes()
    file = bytearray(dicom(pixels=packed, NumberOfFrames=7, **GREY | {"BitsStored": 1}))
    allocated = file.index(struct.pack("<HH2sH", 0x28, 0x100, b"US", 2)) + 8
    file[allocated] = 1
    frames = frames_of(bytes(file))
    assert frames.span(1) == Span(frames.span(0).offset + 1, 3)
    for k in range(7):
        raw = stored(bytes(file), k, frames)
        assert raw == np.packbits(bits[k], bitorder="little").tobytes()
        np.testing.assert_array_equal(frames.decode(k, raw), bits[k])


@pytest.mark.parametrize(
    ("tag", "vr", "dtype"), [(0x7FE00008, "OF", "<f4"), (0x7FE00009, "OD", "<f8")]
)
def test_frames_of_floats(tag, vr, dtype):
    """Frames of Float and Double Float Pixel Data are found and decoded."""
    values = np.linspace(-1, 1, 30, dtype=dtype)
    bits = {"BitsAllocated": 8 * values.itemsize, "NumberOfFrames": 2}
    head = struct.pack("<HH2sHL", tag >> 16, tag & 0xFFFF, vr.encode(), 0, values.nbytes)
    file = dicom(**GREY | bits) + head + values.tobytes()
    frames = frames_of(file)
    decoded = [frames.decode(k, stored(file, k, frames)) for k in range(2)]
    np.testing.assert_array_equal(decoded, values.reshape(2, 3, 5))


@pytest.mark.parametrize(
    ("changed", "pixels", "fault"),
    [
        ({"NumberOfFrames": 4}, bytes(46), "holds 3 frames, its NumberOfFrames is 4"),
        ({"NumberOfFrames": 10**12}, bytes(46), "holds 3 frames"),
        ({"NumberOfFrames": -1}, bytes(46), "NumberOfFrames is not a count"),
        ({"Rows": 0}, bytes(46), "no usable Rows"),
        ({"Rows": [3, 3]}, bytes(46), "no usable Rows"),
        ({"Columns": 65535, "Rows": 65535}, bytes(46), "holds 0 frames"),
        ({"SamplesPerPixel": 0}, bytes(46), "holds 0 frames"),
    ],
)
def test_native_pixel_data_that_cannot_hold_its_frames(changed, pixels, fault):
    """A header that does not fit its native pixel data is named as the reason, in few bytes."""
    frames = frames_of(dicom(pixels=pixels, **GREY | changed))
    assert len(json.dumps(frames.member)) <= 200
    with pytest.raises(FrameError, match=fault):
        frames.span(0)


def test_truncated_native_pixel_data():
    """Pixel data whose length points beyond the end of its file holds only what is there."""
    file = dicom(pixels=bytes(46), NumberOfFrames=3, **GREY)
    assert "holds 2 frames" in frames_of(file[:-10]).member["fault"]


# --- encapsulated pixel data ---------------------------------------------------------------------


def test_a_frame_too_large_to_decode():
    """A few compressed bytes cannot have any amount of memory taken for them."""
    start = dicom(
        syntax=JPEGBaseline8Bit, BitsAllocated=8, **GREY | {"Rows": 65535, "Columns": 65535}
    )
    body = basic() + item(b"\xff\xd8ab\xff\xd9") + END
    file = start + element(0x7FE00010, "OB", body, length=0xFFFFFFFF)
    with pytest.raises(FrameError, match=r"a\.dcm would take 4,095 MiB .* frame_bytes"):
        frames_of(file).decode(0, stored(file, 0))


#: Two frames, the first one in two fragments.
PARTS = (b"\xff\xd8ab", b"cdefgh\xff\xd9", b"\xff\xd8ij\xff\xd9\0\0")
FRAGMENTS = b"".join(map(item, PARTS)) + END
SECOND = sum(len(part) + 8 for part in PARTS[:2])


@pytest.mark.parametrize("table", [basic(), basic(0, SECOND)])
def test_frames_of_several_fragments(table):
    """With a Basic Offset Table or by the ends of images, frames are pydicom's frames."""
    body = table + FRAGMENTS
    file = encapsulated(body, frames=2)
    frames = frames_of(file)
    assert Frames.needs_table(frames.member) and set(frames.member) == {"count", "span"}
    for k in range(2):
        assert stored(file, k, frames) == get_frame(body, k, number_of_frames=2)


def test_extended_offset_table():
    """An Extended Offset Table is used, whether its lengths count padding or not."""
    parts = PARTS[1:]
    body = basic() + b"".join(map(item, parts)) + END
    for lengths in ([8, 8], [7, 7]):
        file = encapsulated(body, frames=2, tables=extended([0, 16], lengths))
        assert [stored(file, k) for k in range(2)] == list(parts)


@pytest.mark.parametrize("table", [basic(), basic(0), basic(0, 12, SECOND), basic(999)])
def test_all_fragments_are_those_of_a_single_frame(table):
    """Where NumberOfFrames is 1 or missing, every fragment is the frame's, and needs no table."""
    for count in (None, 1):
        file = encapsulated(table + FRAGMENTS, frames=count)
        frames = frames_of(file)
        assert frames.table is None and not Frames.needs_table(frames.member)
        assert stored(file, 0, frames) == b"".join(PARTS)


def test_a_fragment_for_each_frame():
    """As many fragments as frames need neither a table nor images that end."""
    file = encapsulated(basic() + FRAGMENTS, frames=3)
    assert tuple(stored(file, k) for k in range(3)) == PARTS


def test_empty_fragments_belong_to_a_frame():
    """Empty fragments before the end of an image change nothing."""
    body = basic() + item(b"") + item(PARTS[0]) + item(b"") * 3 + item(PARTS[1]) + item(PARTS[2])
    file = encapsulated(body + END, frames=2)
    assert stored(file, 0) == PARTS[0] + PARTS[1]


@pytest.mark.parametrize(
    ("body", "count", "tables", "fault"),
    [
        (basic(0, SECOND + 2) + FRAGMENTS, 2, b"", "points where no fragment begins"),
        (basic(0, 2**32 - 2) + FRAGMENTS, 2, b"", "points where no fragment begins"),
        (basic(0, len(FRAGMENTS) - 8) + FRAGMENTS, 2, b"", "points where no fragment begins"),
        (basic(SECOND, 0) + FRAGMENTS, 2, b"", "is not in order"),
        (basic(0, 0) + FRAGMENTS, 2, b"", "is not in order"),
        (basic(12, SECOND) + FRAGMENTS, 2, b"", "is not in order"),
        (basic(0, SECOND) + FRAGMENTS, 3, b"", "is not for 3 frames"),
        (basic(0, SECOND) + FRAGMENTS, 10**9, b"", "is not for 1000000000 frames"),
        (basic(0, 12, SECOND) + FRAGMENTS, 2, b"", "is not for 2 frames"),
        (basic() + FRAGMENTS[:-8] + item(b"ab") + END, 2, b"", "do not show where 2 frames end"),
        (basic() + FRAGMENTS, 4, b"", "do not show where 4 frames end"),
        (basic() + item(b"ab") * 5 + END, 2, b"", "do not show where 2 frames end"),
        (basic() + END, 2, b"", "has no fragment"),
        (basic() + item(b"ab") + item(b"") + END, 2, b"", "frame 1 is empty"),
        (basic() + item(b"") * 9 + END, 1, b"", "frame 0 is empty"),
        (item(b"abc") + FRAGMENTS, 2, b"", "Basic Offset Table is broken"),
        (b"junk" + FRAGMENTS, 2, b"", "Basic Offset Table is broken"),
        (basic() + item(b"ab") + b"junk" * 9, 2, b"", "fragments are not in a row"),
        (basic() + item(b"ab") + item(b"ab")[:7], 2, b"", "fragments are not in a row"),
        (basic() + FRAGMENTS[:-12], 3, b"", "ends beyond its file"),
        (basic() + b"\xfe\xff\x00\xe0\xff\xff\xff\xff" + END, 1, b"", "ends beyond its file"),
        (basic() + FRAGMENTS, 2, extended([0, 2**64 - 1], [8, 8]), "points where no fragment"),
        (basic() + FRAGMENTS, 2, extended([0, SECOND], [12, 8]), "wrong lengths"),
        (basic() + FRAGMENTS, 2, extended([0], [12]), "is not for 2 frames"),
        (basic() + FRAGMENTS, 2, extended([0, SECOND], []), "is not for 2 frames"),
    ],
)
def test_wrong_tables(body, count, tables, fault):
    """What is wrong with an offset table or fragments is kept in few bytes, and said."""
    frames = frames_of(encapsulated(body, frames=count, tables=tables))
    assert frames.table is None and len(json.dumps(frames.member)) <= 200
    with pytest.raises(FrameError, match=fault):
        frames.span(0)


def test_syntax_and_pixel_data_that_contradict_each_other():
    """Encapsulated pixel data in a native syntax is refused, and the other way round."""
    wrapped = encapsulated(basic() + FRAGMENTS, syntax=ExplicitVRLittleEndian)
    bare = dicom(syntax=JPEGBaseline8Bit, BitsAllocated=8, **GREY)
    bare += element(0x7FE00010, "OB", bytes(16))
    for file in (wrapped, bare):
        assert "its transfer syntax is" in frames_of(file).member["fault"]


def test_fragments_without_end(monkeypatch):
    """More fragments than are counted are a reason like others; a million is no matter."""
    body = basic() + item(b"") * 1_000_000
    assert "frame 0 is empty" in frames_of(encapsulated(body + END)).member["fault"]
    monkeypatch.setattr("dicomstore.imaging.locating.FRAGMENTS_LIMIT", 1000)
    assert "over 1,000 fragments" in frames_of(encapsulated(body + END)).member["fault"]


def test_document_and_table_of_a_large_slide_are_small():
    """100,000 frames cost the document under 200 bytes; all of them are found again."""
    sizes = 2 * np.random.default_rng(2).integers(4, 40, 100_000)
    starts = np.cumsum(sizes + 8) - (sizes + 8)
    body = [b"\xfe\xff\x00\xe0" + struct.pack("<L", size) + bytes(size) for size in sizes.tolist()]
    file = encapsulated(basic(*starts) + b"".join(body) + END, frames=100_000)
    frames = frames_of(file)
    assert len(json.dumps(frames.member)) <= 200 and len(frames.table) < 200_000
    first = frames.span(0).offset
    for k in (0, 1, 50_000, 99_999):
        assert frames.span(k) == Span(first + starts[k], sizes[k] + 8)


def test_pixels_are_stepped_over_not_read():
    """Looking for frames reads little more than the heads of fragments."""

    class Counting(io.BytesIO):
        read_bytes = 0

        def read(self, size=-1):
            got = super().read(size)
            self.read_bytes += len(got)
            return got

    part = bytes(200_000)
    file = Counting(encapsulated(basic() + item(part) * 100 + END, frames=100))
    member, _ = locate(file, header.searchable(file))
    assert member["count"] == 100 and file.read_bytes < 40_000


# --- what precedes the pixel data ----------------------------------------------------------------


def undefined(tag, vr, value):
    return element(tag, vr, value + END, length=0xFFFFFFFF)


def open_item(value):
    return b"\xfe\xff\x00\xe0\xff\xff\xff\xff" + value + b"\xfe\xff\x0d\xe0\0\0\0\0"


ICON = element(0x7FE00010, "OB", b"icon")


@pytest.mark.parametrize(
    "before",
    [
        undefined(0x52009230, "SQ", open_item(undefined(0x00209113, "SQ", open_item(ICON)))),
        undefined(0x52009230, "SQ", item(ICON)),
        undefined(0x52009230, "SQ", open_item(undefined(0x7FE00010, "OB", item(b"") * 2))),
        # An unknown VR of undefined length has implicit VRs within.
        undefined(0x60010010, "UN", open_item(b"\xe0\x7f\x10\x00\4\0\0\0icon")),
        element(0x54000100, "SQ", item(ICON)),
    ],
)
def test_pixel_data_within_sequences_is_not_the_instances(before):
    """Sequences of defined and undefined length are stepped over, with pixel data in them."""
    pixels = bytes(range(15)) + b"\0"
    start = dicom(BitsAllocated=8, **GREY)
    file = start + before + element(0x7FE00010, "OB", pixels)
    assert stored(file, 0) == pixels[:15]


def test_data_set_that_breaks_off():
    """A sequence that never ends is a reason, not an error."""
    start = dicom(BitsAllocated=8, **GREY)
    file = start + element(0x52009230, "SQ", open_item(ICON)[:-8], length=0xFFFFFFFF)
    assert frames_of(file).member == {"fault": "its data set breaks off"}


def test_sequences_without_end(monkeypatch):
    """The data set is not walked for ever."""
    monkeypatch.setattr("dicomstore.imaging.locating.ELEMENTS_LIMIT", 1000)
    file = dicom(**GREY) + element(0x52009230, "SQ", item(b"") * 2000, length=0xFFFFFFFF)
    assert frames_of(file).member == {"fault": "its data set has too many elements"}


WHOLE = [
    encapsulated(basic(0, SECOND) + FRAGMENTS, frames=2),
    encapsulated(basic() + FRAGMENTS, frames=2, tables=extended([0, SECOND], [8, 8])),
    dicom(pixels=bytes(46), NumberOfFrames=3, **GREY),
    dicom(pixels=bytes(46), syntax=ExplicitVRBigEndian, NumberOfFrames=3, **GREY),
]


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(WHOLE),
    st.lists(st.tuples(st.integers(1, 400), st.integers(0, 255)), max_size=6),
    st.integers(0, 60),
)
def test_broken_bytes_never_raise(file, changes, cut):
    """Whatever is changed or cut off, frames are found within the file, or a reason is."""
    broken = bytearray(file[: len(file) - cut])
    for back, value in changes:
        broken[-back] = value
    members = header.searchable(io.BytesIO(broken))
    if members is None:
        return
    with values.quietly():  # as in a worker
        member, table = locate(io.BytesIO(broken), members)
    frames = Frames("a.dcm", member, members["header"], None, table)
    for k in range(min(frames.count, 5)):
        span = frames.span(k)
        assert 0 < span.offset < span.offset + span.length <= len(broken)
        assert frames.stored(k, broken[span.offset : span.offset + span.length])


# --- errors when a frame is read -----------------------------------------------------------------


def test_frame_that_is_not_there():
    """A number outside of the frames is refused in one sentence that names the file."""
    frames = frames_of(dicom(pixels=bytes(46), NumberOfFrames=3, **GREY), "cd1/a.dcm")
    for k in (3, -1):
        with pytest.raises(FrameError, match=rf"cd1/a\.dcm has no frame {k}: it has 3"):
            frames.span(k)


def test_bytes_that_are_no_frame():
    """Bytes of another length, or that are not fragments, are refused."""
    file = encapsulated(basic() + FRAGMENTS, frames=3)
    frames = frames_of(file)
    with pytest.raises(FrameError, match="has 12 bytes, not 3"):
        frames.stored(0, b"abc")
    with pytest.raises(FrameError, match="is not made of fragments"):
        frames.stored(0, bytes(12))


@pytest.mark.parametrize("table", [None, b"", b"junk", "bomb", "other"])
def test_table_that_does_not_fit_its_document(table):
    """A table that is gone, damaged, of another file or too large is refused."""
    made = {
        "bomb": zlib.compress(bytes(10**7)),
        "other": zlib.compress(bytes([16, 16, 17]) + bytes(21)),
    }
    frames = frames_of(encapsulated(basic() + FRAGMENTS, frames=3))
    wrong = Frames("a.dcm", frames.member, {}, None, made.get(table, table))
    with pytest.raises(FrameError, match="table does not fit its document"):
        wrong.span(1)


def test_frame_that_cannot_be_decoded():
    """Damaged, and unknown, compressed frames give one sentence that names frame and file."""
    file = encapsulated(basic() + FRAGMENTS, frames=2)
    members = header.searchable(io.BytesIO(file))
    for syntax in (JPEGBaseline8Bit, "1.2.3.4"):
        member, table = locate(io.BytesIO(file), members)
        frames = Frames("a.dcm", member, members["header"], syntax, table)
        with pytest.raises(FrameError, match=r"Frame 1 of a\.dcm cannot be decoded: .+\.$"):
            frames.decode(1, PARTS[2])
