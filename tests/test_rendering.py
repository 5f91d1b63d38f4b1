"""Frames as they are shown: each step by values computed by hand, and whole pictures by DCMTK's."""

import io

import numpy as np
import pytest
from conftest import PYDICOM_DATA, PYDICOM_FILES
from pictures import drawn, image, needs_oracle, palette, table
from pydicom.dataset import Dataset
from pydicom.pixels import apply_modality_lut
from pydicom.uid import (
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    XRayAngiographicImageStorage,
)

from dicomstore.imaging import header, rendering

#: A picture may differ so much from DCMTK's, in grey levels on average.
TOLERANCE = 2.0
#: DCMTK does not know JPEG 2000, and 32 bits a colour. Here it draws the same image, uncompressed.
SAME_IMAGE = {
    "693_J2KI.dcm": "693_UNCI.dcm",
    "693_J2KR.dcm": "693_UNCR.dcm",
    "JPEG2000.dcm": "JPEG2000_UNC.dcm",
    "MR2_J2KI.dcm": "MR2_UNCI.dcm",
    "MR2_J2KR.dcm": "MR2_UNCR.dcm",
    "MR_small_jp2klossless.dcm": "MR_small.dcm",
    "RG1_J2KI.dcm": "RG1_UNCI.dcm",
    "RG1_J2KR.dcm": "RG1_UNCR.dcm",
    "RG3_J2KI.dcm": "RG3_UNCI.dcm",
    "RG3_J2KR.dcm": "RG3_UNCR.dcm",
    "SC_rgb_32bit.dcm": "SC_rgb.dcm",
    "SC_rgb_32bit_2frame.dcm": "SC_rgb_2frame.dcm",
    "SC_rgb_expb_32bit.dcm": "SC_rgb.dcm",
    "SC_rgb_expb_32bit_2frame.dcm": "SC_rgb_2frame.dcm",
    "SC_rgb_jpeg.dcm": "SC_rgb_jpeg_dcmd.dcm",  # in implicit VR, against PS3.5 A.4
    "SC_rgb_gdcm_KY.dcm": "SC_rgb_gdcm2k_uncompressed.dcm",
    "US1_J2KI.dcm": "US1_UNCI.dcm",
    "US1_J2KR.dcm": "US1_UNCR.dcm",
    "emri_small_jpeg_2k_lossless.dcm": "emri_small.dcm",
    # It swaps the bytes in each half of 32 bits (the other decoders do not agree among themselves),
    # which makes noise of what is in little-endian order the same dose.
    "rtdose_expb.dcm": "rtdose.dcm",
    "rtdose_expb_1frame.dcm": "rtdose_1frame.dcm",
}
#: Not drawn by DCMTK, and without a twin that is.
NOT_COMPARED = {
    "GDCMJ2K_TextGBR.dcm",  # JPEG 2000
    "J2K_pixelrep_mismatch.dcm",  # JPEG 2000
    "examples_jpeg2k.dcm",  # JPEG 2000
    "explicit_VR-UN.dcm",  # JPEG 2000
    "gdcm-US-ALOKA-16.dcm",  # a segmented palette
    "gdcm-US-ALOKA-16_big.dcm",  # a segmented palette
    "no_meta.dcm",  # for DCMTK, it ends too early
}


def shown(content, frame=0):
    """Return a frame as it is shown, and see that reading it from a file shows the same."""
    dataset = rendering.read_dataset(content)
    with header.quietly():
        picture = rendering.render(dataset, frame)
        syntax = dataset.file_meta.TransferSyntaxUID
        of_file = rendering.render_file(io.BytesIO(content), frame, syntax, longest=10**6)
    assert np.array_equal(picture, of_file)
    return picture


def levels(stored, **attributes):
    """Return the grey levels of a row of stored values."""
    return shown(image(np.atleast_2d(stored), **attributes)).ravel().tolist()


def window(centre, width, function=None):
    """Return the attributes of a window."""
    attributes = {"WindowCenter": centre, "WindowWidth": width}
    return attributes | ({"VOILUTFunction": function} if function else {})


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


# --- the oracle ----------------------------------------------------------------------------------


def told(dataset, frame):
    """Return how DCMTK is told what it does not look for: where the frame's grey begins and ends.

    It knows the windows and tables of the header, not those of functional groups.
    """
    if dataset.SamplesPerPixel != 1 or dataset.PhotometricInterpretation == "PALETTE COLOR":
        return []
    enhanced = {}
    for keyword, index in (
        ("SharedFunctionalGroupsSequence", 0),
        ("PerFrameFunctionalGroupsSequence", frame),
    ):
        for macro in ("FrameVOILUTSequence", "PixelValueTransformationSequence"):
            if dataset.get(keyword) and macro in (group := dataset[keyword][index]):
                enhanced |= {element.keyword: element.value for element in group[macro][0]}
    if "WindowCenter" in enhanced:
        slope = float(enhanced.get("RescaleSlope", 1))
        centre = float(enhanced["WindowCenter"]) - float(enhanced.get("RescaleIntercept", 0))
        width = float(enhanced["WindowWidth"])
        return ["-M", "+Ww", str(centre / slope), str(width / slope)]
    if "WindowCenter" in dataset:
        return ["+Wi", "1"]
    if dataset.get("VOILUTSequence"):
        return ["+Wl", "1"]
    values = dataset.pixel_array
    values = values[frame] if values.ndim == 3 else values
    counted = values != dataset.get("PixelPaddingValue", np.inf)
    low, high = np.percentile(apply_modality_lut(values, dataset)[counted], (1, 99))
    return ["+Ww", str((low + high) / 2 + 0.5), str(high - low + 1)]


@needs_oracle
@pytest.mark.filterwarnings("ignore")
def test_every_file_is_drawn_as_dcmtk_draws_it(large_files, tmp_path):
    """First, middle and last frames of the corpora; and whatever DCMTK draws is drawn."""
    files = [*PYDICOM_DATA.rglob("*"), *large_files.rglob("*")]
    by_name = {path.name: path for path in files if path.is_file()}
    wrong, compared, undrawn = {}, 0, set()
    for path in sorted(by_name.values()):
        content = path.read_bytes()
        members = header.describe(io.BytesIO(content))
        if members is None or "Rows" not in members["header"]:
            continue
        frames = int(members.get("numberOfFrames", 1))
        model = by_name[SAME_IMAGE.get(path.name, path.name)]
        with header.quietly():
            dataset = rendering.read_dataset(model.read_bytes())
            dataset.NumberOfFrames = frames  # badVR.dcm has 1A
        for frame in sorted({0, frames // 2, frames - 1}):
            try:
                with header.quietly():
                    picture = rendering.render(rendering.read_dataset(content), frame)
            except header.UNREADABLE as error:
                if drawn(model, frame, tmp_path) is not None:
                    wrong[path.name, frame] = error
                continue
            expected = drawn(model, frame, tmp_path, *told(dataset, frame))
            if expected is None:
                undrawn.add(path.name)
            elif expected.shape != picture.shape:
                wrong[path.name, frame] = (expected.shape, picture.shape)
            else:
                compared += 1
                difference = np.abs(expected.astype(int) - picture).mean()
                if difference > TOLERANCE:
                    wrong[path.name, frame] = difference
    assert not wrong
    assert undrawn <= NOT_COMPARED
    assert compared > 150


STEPS = np.add.outer(np.arange(64) * 64, np.arange(64))  # 0 to 4095
CURVE = [n * n // 4096 for n in range(4096)]


@needs_oracle
@pytest.mark.parametrize(
    ("stored", "attributes"),
    [
        (U16(STEPS), window(1000, 1500)),
        (U16(STEPS), window(1000, 1500, "SIGMOID")),
        (U16(STEPS), window([1000, 7], [1500, 7])),
        (U16(STEPS), window(1000, 1)),
        (I16(STEPS - 2000), window(0, 1500)),
        (I16(STEPS - 2048) & 0x0FFF | 0x5000, {"BitsStored": 12} | window(0, 1500)),
        (U16(STEPS) << 4, {"BitsStored": 12, "HighBit": 15} | window(1000, 1500)),
        (U16(STEPS), {"RescaleSlope": 0.5, "RescaleIntercept": -9} | window(1000, 1500)),
        (U16(STEPS), {"RescaleSlope": None, "RescaleIntercept": -9} | window(1000, 1500)),
        (U16(STEPS), {"ModalityLUTSequence": table(CURVE, bits=12)} | window(1000, 1500)),
        (U16(STEPS), {"VOILUTSequence": table(CURVE, bits=12)}),
        (U16(STEPS), {"VOILUTSequence": table(CURVE[:3000], first=500, bits=16)}),
        (U16(STEPS), {"photometric": "MONOCHROME1"} | window(1000, 1500)),
        (U16(STEPS), {"PresentationLUTShape": "INVERSE"} | window(1000, 1500)),
        (np.uint32(STEPS) * 1000, window(1e6, 1.5e6)),
        (np.uint8(STEPS % 256), window(100, 150)),
    ],
)
@pytest.mark.parametrize(
    "syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian]
)
def test_each_step_is_dcmtks(tmp_path, stored, attributes, syntax):
    """What was computed by hand above is what DCMTK computes, over the whole range."""
    if syntax == ExplicitVRBigEndian and stored.itemsize == 4:
        pytest.skip("DCMTK takes 32 bits in big-endian order for two words")
    content = image(stored, syntax=syntax, **attributes)
    (tmp_path / "image.dcm").write_bytes(content)
    option = "+Wi" if "WindowCenter" in attributes else "+Wl"
    expected = drawn(tmp_path / "image.dcm", 0, tmp_path, option, "1")
    assert np.abs(shown(content).astype(int) - expected).max() <= 1
