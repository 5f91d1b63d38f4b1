"""Whole pictures, compared with those that DCMTK draws of the same files."""

import io

import numpy as np
import pytest
from conftest import PYDICOM_DATA
from pictures import drawn, image, needs_oracle, shown, table, window
from pydicom.pixels import apply_modality_lut
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from dicomstore.imaging import header, rendering, values

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


U16, I16 = np.uint16, np.int16


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
        members = header.searchable(io.BytesIO(content))
        if members is None or "Rows" not in members["header"]:
            continue
        frames = int(members.get("numberOfFrames", 1))
        model = by_name[SAME_IMAGE.get(path.name, path.name)]
        with values.quietly():
            dataset = rendering.read_dataset(model.read_bytes())
            dataset.NumberOfFrames = frames  # badVR.dcm has 1A
        for frame in sorted({0, frames // 2, frames - 1}):
            try:
                with values.quietly():
                    picture = rendering.render(rendering.read_dataset(content), frame)
            except values.UNREADABLE as error:
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
