"""Frames as they are shown: each step, by values computed by hand."""

import numpy as np
import pytest
from conftest import PYDICOM_FILES
from pictures import image, palette, shown, table, window
from pydicom.dataset import Dataset
from pydicom.uid import (
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    XRayAngiographicImageStorage,
)

from dicomstore.imaging import rendering


def levels(stored, **attributes):
    """Return the grey levels of a row of stored values."""
    return shown(image(np.atleast_2d(stored), **attributes)).ravel().tolist()


def groups(frames=(), shared=()):
    """Return functional groups (PS3.3 C.7.6.16) with these macros: shared, and frame by frame."""

    def group(macros):
        item = Dataset()
        for keyword, attributes in dict(macros).items():
            macro = Dataset()
            for name, value in attributes.items():
                setattr(macro, name, value)
            setattr(item, keyword, [macro])
        return item

    return {
        "SharedFunctionalGroupsSequence": [group(shared)],
        "PerFrameFunctionalGroupsSequence": [group(macros) for macros in frames],
    }


U16, I16, F32 = np.uint16, np.int16, np.float32
HUNDRED = list(range(100))


# --- values computed by hand ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attributes", "stored", "expected"),
    [
        # ((x - 2047.5) / 4095 + 0.5) * 255
        (window(2048, 4096), U16([0, 1000, 2048, 4095, 5000]), [0, 62, 128, 255, 255]),
        # ((x + 0.5) / 99 + 0.5) * 255
        (window(0, 100), I16([-51, -50, -25, 0, 49, 50]), [0, 0, 64, 129, 255, 255]),
        (window(100, 1), U16([99, 100]), [0, 255]),
        # ((x - c) / w + 0.5) * 255
        (window(2048, 4096, "LINEAR_EXACT"), U16([0, 1024, 2048, 4096]), [0, 64, 128, 255]),
        (window(0, 100, "LINEAR_EXACT"), I16([-50, -25, 0, 25, 50]), [0, 64, 128, 191, 255]),
        (window(1, 0.5, "LINEAR_EXACT"), U16([0, 1, 2]), [0, 128, 255]),
        # 255 / (1 + exp(-4 (x - c) / w))
        (window(0, 100, "SIGMOID"), I16([-25, 0, 25, 100]), [69, 128, 186, 250]),
        (window(0, 0.5, "SIGMOID"), I16([-30_000, 0, 30_000]), [0, 128, 255]),
        (window([2048, 5], [4096, 5]), U16([1000]), [62]),
        (window(2048, 4096, "linear "), U16([1000]), [62]),
    ],
)
def test_windows(attributes, stored, expected):
    """The three functions of PS3.3 C.11.2.1.2 and C.11.2.1.3; of several windows the first."""
    assert levels(stored, **attributes) == expected


@pytest.mark.parametrize(
    "attributes",
    [
        {},
        window(None, None),
        window(40, None),
        window(None, 400),
        {"WindowCenter": 40},
        {"WindowWidth": 400},
        window(40, 0),
        window(40, 0.5),
        window(40, -7),
        window(40, 0, "LINEAR_EXACT"),
        window(40, 0, "SIGMOID"),
        groups(shared={"FrameVOILUTSequence": window(None, None)}),
    ],
)
def test_without_a_usable_window(attributes):
    """Grey runs from the first percentile to the last but one, here of 0 to 100."""
    stored = U16(range(101))
    expected = np.rint(np.clip((np.arange(101) - 1) / 98, 0, 1) * 255)
    assert levels(stored, **attributes) == expected.tolist()
    bright = levels(stored, photometric="MONOCHROME1", **attributes)
    assert np.abs(np.add(bright, expected) - 255).max() <= 1


def test_the_next_window_counts_if_the_first_is_unusable():
    """A window that is empty or too narrow is as good as none."""
    assert levels(U16([1000]), **window([40, 2048], [0, 4096])) == [62]


@pytest.mark.parametrize(
    ("attributes", "stored", "expected"),
    [
        # 2 x - 100
        ({"RescaleSlope": 2, "RescaleIntercept": -100}, U16([25, 50, 74]), [0, 129, 252]),
        ({"RescaleSlope": -1, "RescaleIntercept": 0}, I16([50, 25, -49]), [0, 64, 255]),
        ({"RescaleSlope": None, "RescaleIntercept": -100}, I16([-50, 0, 49]), [0, 129, 255]),
        ({"RescaleSlope": 2, "RescaleIntercept": None}, I16([-50, 0, 49]), [0, 129, 255]),
        ({"RescaleSlope": 0, "RescaleIntercept": 7}, I16([-50, 0, 49]), [0, 129, 255]),
        ({"RescaleSlope": 2}, I16([-50, 0, 49]), [0, 129, 255]),
        # Entries 0 to 198 for the values 10 to 109; below and above them the first and the last.
        (
            {"ModalityLUTSequence": table([2 * n for n in HUNDRED], first=10)},
            U16([0, 10, 22, 34, 500]),
            [129, 129, 191, 252, 255],
        ),
        (
            {"ModalityLUTSequence": table(HUNDRED, first=-5, bits=8, data=bytes(HUNDRED))},
            I16([-5, 20, 44]),
            [129, 193, 255],
        ),
    ],
)
def test_modality_values(attributes, stored, expected):
    """Rescale and modality LUT come before the window; what is incomplete is left out."""
    assert levels(stored, **attributes, **window(0, 100)) == expected


@pytest.mark.parametrize("relationship", ["LOG", "DISP"])
def test_angiography_for_display(relationship):
    """The rescale of such an image leads back to intensities and is not for display."""
    attributes = {"RescaleSlope": 9, "RescaleIntercept": 9, **window(0, 100)}
    attributes["SOPClassUID"] = XRayAngiographicImageStorage
    assert levels(I16([0]), PixelIntensityRelationship=relationship, **attributes) == [129]
    assert levels(I16([0]), PixelIntensityRelationship="LIN", **attributes) == [152]


SQUARES = [n * n for n in HUNDRED]
WORDS = np.array(SQUARES, "<u2").tobytes()


@pytest.mark.parametrize(
    ("lut", "expected"),
    [
        # 25² / (2¹⁴ - 1) * 255 = 9.7; 99² / (2¹⁴ - 1) * 255 = 152.5
        (table(SQUARES, first=-5, bits=14), [0, 10, 153, 153]),
        (table(SQUARES, first=-5, bits=14, data=WORDS), [0, 10, 153, 153]),
        (table(HUNDRED, first=-5, bits=8), [0, 25, 99, 99]),
        (table(HUNDRED, first=-5, bits=8, data=bytes(HUNDRED)), [0, 25, 99, 99]),
    ],
)
def test_voi_luts(lut, expected):
    """The first VOI LUT counts where there is no window, and its bits say what is white."""
    stored = I16([-9, 20, 94, 500])
    assert levels(stored, VOILUTSequence=lut) == expected
    assert levels(stored, VOILUTSequence=lut, **window(None, None)) == expected
    assert levels(I16([0]), VOILUTSequence=lut, **window(0, 100)) == [129]


def test_big_endian_tables():
    """Tables that are stored as bytes are read in the file's order."""
    lut = table(SQUARES, first=-5, bits=14, data=np.array(SQUARES, ">u2").tobytes())
    syntax = ExplicitVRBigEndian
    assert levels(I16([-9, 20, 94]), VOILUTSequence=lut, syntax=syntax) == [0, 10, 153]
    assert levels(I16([-50, 0, 49]), syntax=syntax, **window(0, 100)) == [0, 129, 255]


def test_functional_groups():
    """Window and rescale of a frame's own groups come first, then the shared, then the header's."""
    macro, values = "FrameVOILUTSequence", "PixelValueTransformationSequence"
    rescale = {"RescaleSlope": 2, "RescaleIntercept": -100}
    enhanced = groups(
        frames=[{macro: window(0, 100), values: rescale}, {macro: window(0, 50)}, {}],
        shared={macro: window(0, 200)},
    )
    stored = np.tile(I16([[0, 10, 50, 100]]), (4, 1, 1))
    content = image(stored, NumberOfFrames=4, **enhanced, **window(0, 300))
    pictures = [shown(content, frame).ravel().tolist() for frame in range(4)]
    assert pictures[0] == [0, 0, 129, 255]  # -100, -80, 0 and 100 in a window of 100
    assert pictures[1] == [130, 182, 255, 255]
    assert pictures[2] == pictures[3] == [128, 141, 192, 255]  # the shared; the last has no groups


def test_monochrome1_and_presentation():
    """MONOCHROME1 is inverted; where a presentation LUT shape says otherwise, the shape counts."""
    stored, plain, inverse = I16([-50, 0, 49]), [0, 129, 255], [255, 126, 0]
    for photometric, shape, expected in (
        ("MONOCHROME1", None, inverse),
        ("MONOCHROME1", "INVERSE", inverse),
        ("MONOCHROME1", "IDENTITY", plain),
        ("MONOCHROME2", "IDENTITY", plain),
        ("MONOCHROME2", "INVERSE", inverse),
    ):
        attributes = {"PresentationLUTShape": shape} if shape else {}
        assert levels(stored, photometric=photometric, **attributes, **window(0, 100)) == expected


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize(
    ("padding", "attributes"),
    [
        ([-2000] * 60, {"PixelPaddingValue": -2000}),
        ([-2000, -1990] * 30, {"PixelPaddingValue": -2000, "PixelPaddingRangeLimit": -1990}),
        ([-2000, -1990] * 30, {"PixelPaddingValue": -1990, "PixelPaddingRangeLimit": -2000}),
    ],
)
def test_pixel_padding(photometric, padding, attributes):
    """Without a window, padding has no say in the percentiles and is black."""
    values = I16(range(101))
    stored = np.concatenate([values, I16(padding)])
    for syntax in (ExplicitVRLittleEndian, ImplicitVRLittleEndian):
        found = levels(stored, photometric=photometric, syntax=syntax, **attributes)
        assert found[:101] == levels(values, photometric=photometric)
        assert set(found[101:]) == {0}
    assert set(levels(I16(padding), photometric=photometric, **attributes)) == {0}


def test_pixel_padding_in_a_window():
    """With a window, padding is where the window puts it, as any other value."""
    assert levels(I16([0, 10]), PixelPaddingValue=0, **window(0, 100)) == [129, 155]


def test_floating_point():
    """Floating-point pixels are shown like others; what is not finite is padding."""
    stored = F32(np.append(np.arange(101) / 1000, [np.nan, np.inf, 7]))
    found = levels(stored, FloatPixelPaddingValue=7)
    assert found == [*levels(U16(range(101))), 0, 0, 0]
    assert levels(F32([0, 0.25, 1]), **window(0.5, 1, "LINEAR_EXACT")) == [0, 64, 255]
    assert levels(np.float64([0, 0.25, 1]), **window(0.5, 1, "LINEAR_EXACT")) == [0, 64, 255]


@pytest.mark.parametrize(
    ("stored", "attributes", "expected"),
    [
        (U16([0xA000, 0xA3E8, 0xF800]), {"BitsStored": 12}, [0, 62, 128]),
        (U16([0x0000, 0x3E8F, 0x8000]), {"BitsStored": 12, "HighBit": 15}, [0, 62, 128]),
        (I16([0x0FCE, 0x1000, 0x7031]), {"BitsStored": 12, **window(0, 100)}, [0, 129, 255]),
        (np.uint8([0, 1, 63]), {"BitsStored": 6, **window(32, 64)}, [0, 4, 255]),
        (np.int8([-128, 0, 127]), window(0, 256), [0, 128, 255]),
        (np.uint32([0, 1000, 2048]), {}, [0, 62, 128]),
        (np.int32([-50, 0, 49]), window(0, 100), [0, 129, 255]),
    ],
)
def test_stored_bits(stored, attributes, expected):
    """Only the stored bits count: overlays beside them are not drawn, signs are theirs."""
    assert levels(stored, **window(2048, 4096) | attributes) == expected


def test_one_bit():
    """Eight pixels a byte, the first in its lowest bit, also where a frame begins within one."""
    stored = np.zeros((2, 2, 6), np.uint8)
    stored[0, 0, 1] = stored[1, 1, 5] = 1
    packed = np.packbits(stored.ravel(), bitorder="little").tobytes()
    sizes = {"BitsAllocated": 1, "BitsStored": 1, "HighBit": 0}
    content = image(stored, pixels=packed, NumberOfFrames=2, **sizes)
    for frame in range(2):
        assert (shown(content, frame) == stored[frame] * 255).all()


# --- colour --------------------------------------------------------------------------------------


def words(order):
    return lambda entries: entries.astype(f"{order}u2").tobytes()


def packed(order):
    """Two entries in a word: in big-endian order, the second comes first."""

    def encode(entries):
        content = entries.astype(np.uint8).tobytes() + b"\0" * (entries.size % 2)
        return content if order == "<" else np.frombuffer(content, "u2").byteswap().tobytes()

    return encode


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize(
    ("syntax", "order"),
    [(ExplicitVRLittleEndian, "<"), (ImplicitVRLittleEndian, "<"), (ExplicitVRBigEndian, ">")],
)
@pytest.mark.parametrize("encoding", [words, packed])
def test_palettes(syntax, order, bits, encoding):
    """Entries of 8 and 16 bits, in words or packed, in both orders; beyond the ends, the ends."""
    if encoding is packed and bits == 16:
        pytest.skip("only entries of 8 bits are packed")
    scale = 257 if bits == 16 else 1
    red, green, blue = np.array([[10, 20, 30], [200, 150, 100], [0, 255, 7]]) * scale
    colours = palette(red, green, blue, first=5, bits=bits, encode=encoding(order))
    stored = np.uint8([[0, 5, 6], [7, 8, 255]])
    picture = shown(image(stored, photometric="PALETTE COLOR", syntax=syntax, **colours))
    first, second, third = [10, 200, 0], [20, 150, 255], [30, 100, 7]
    assert picture.tolist() == [[first, first, second], [third, third, third]]


def test_a_palette_of_65536_entries():
    """Their number is written as 0."""
    entries = np.arange(2**16)
    colours = palette(entries, entries[::-1], entries, encode=words("<"))
    picture = shown(image(U16([[0, 256, 65535]]), photometric="PALETTE COLOR", **colours))
    assert picture.tolist() == [[[0, 255, 0], [1, 254, 1], [255, 0, 255]]]


def test_a_segmented_palette():
    """A discrete segment of two entries, then a linear one of three (PS3.3 C.7.9.2)."""
    segments = np.array([0, 2, 0, 1000, 1, 3, 4000], "<u2")
    names = ("Red", "Green", "Blue")
    colours = {f"{name}PaletteColorLookupTableDescriptor": [5, 0, 16] for name in names}
    colours |= {f"Segmented{name}PaletteColorLookupTableData": segments.tobytes() for name in names}
    picture = shown(image(np.uint8([[0, 1, 2, 3, 4]]), photometric="PALETTE COLOR", **colours))
    assert picture[0, :, 0].tolist() == [0, 3, 7, 11, 15]  # 0, 1000, 2000, 3000 and 4000, over 256


YBR = [[[0, 128, 128], [255, 128, 128], [76, 85, 255], [150, 44, 21]]]
RGB = [[[0, 0, 0], [255, 255, 255], [254, 0, 0], [0, 255, 1]]]


@pytest.mark.parametrize(
    ("photometric", "stored", "expected"),
    [
        ("RGB", np.uint8(RGB), RGB),
        ("RGB", U16(RGB) * 257, RGB),
        ("YBR_FULL", np.uint8(YBR), RGB),
        ("YBR_FULL", U16(YBR) * 256, RGB),
        ("YBR_RCT", np.uint8(RGB), RGB),
    ],
)
@pytest.mark.parametrize("planar", [0, 1])
def test_colours(photometric, stored, expected, planar):
    """RGB, and YBR by the equations of PS3.3 C.7.6.3.1.2, by pixel and by plane."""
    pixels = np.moveaxis(stored, -1, 0) if planar else stored
    content = image(
        stored, photometric=photometric, pixels=pixels.tobytes(), PlanarConfiguration=planar
    )
    assert np.abs(shown(content).astype(int) - expected).max() <= 1


def test_colours_of_half_the_width():
    """YBR_FULL_422 has two luminances to a pair of colours; YBR_PARTIAL_422 has less range."""
    full = np.uint8([[76, 76, 85, 255]]).tobytes()
    stored = np.zeros((1, 2, 3), np.uint8)
    picture = shown(image(stored, photometric="YBR_FULL_422", pixels=full))
    assert np.abs(picture.astype(int) - [254, 0, 0]).max() <= 1
    partial = np.uint8([[16, 235, 128, 128]]).tobytes()
    picture = shown(image(stored, photometric="YBR_PARTIAL_422", pixels=partial))
    assert picture.tolist() == [[[0] * 3, [255] * 3]]


def test_unknown_colours_are_refused():
    """What would be shown in wrong colours is not shown."""
    content = image(np.uint8(RGB), photometric="HSV")
    with pytest.raises(ValueError, match="HSV"):
        rendering.render(rendering.read_dataset(content))


def test_frames_that_are_no_number():
    """A number of frames that is broken hinders nobody who wants the first."""
    content = (PYDICOM_FILES / "badVR.dcm").read_bytes()
    assert np.ptp(shown(content)) == 255
