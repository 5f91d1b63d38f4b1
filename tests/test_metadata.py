"""A data set as DICOM JSON: what pydicom makes of the same file, element for element."""

import io
import json
import zlib

import pydicom
import pytest
from conftest import PYDICOM_DATA, PYDICOM_FILES
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import DeflatedExplicitVRLittleEndian, ImplicitVRLittleEndian, RLELossless
from samples import PREAMBLE, dicom, element

from dicomstore.imaging import header, metadata, values

SOP_CLASS = element(0x00080016, "UI", b"1.2.840.10008.5.1.4.1.1.2\0")
FRAGMENT, END = b"\xfe\xff\0\xe0", b"\xfe\xff\xdd\xe0\0\0\0\0"


def json_of(content):
    """Return the attachment of a file's bytes as text, or None."""
    with values.quietly():
        packed = metadata.compressed_json(header.read(io.BytesIO(content)))
    return None if packed is None else zlib.decompress(packed).decode()


def by_pydicom(dataset, path="bulkdata/"):
    """Return pydicom's DICOM JSON, element by element, with the same rule for bulk data."""
    made = {}
    for tag in list(dataset.keys()):
        key = f"{tag:08X}"
        if not tag.element:
            continue
        one = dataset[tag]
        if one.VR == "SQ":
            items = [by_pydicom(item, f"{path}{key}/{n}/") for n, item in enumerate(one.value)]
            made[key] = {"vr": "SQ", "Value": items}
        elif tag in metadata.PIXELS:
            made[key] = {"vr": one.VR, "BulkDataURI": path + key}
        else:
            inline = tag in metadata.PALETTES
            made[key] = one.to_json_dict(None if inline else lambda _, k=key: path + k, 1366)
    return made


# pydicom takes the stray byte in front of no_meta.dcm for a part of its first tag, gives up on the
# pixels of the one that is too short, and fails at a bad value of badVR.dcm.
READ_DIFFERENTLY = ("no_meta.dcm", "emri_small_jpeg_2k_lossless_too_short.dcm", "badVR.dcm")


def test_every_real_file_has_the_json_of_pydicom(large_files):
    """All sound files: private elements, sequences, odd text, and bulk data by path."""
    compared = 0
    for folder in (PYDICOM_DATA, large_files):
        for path in sorted(folder.rglob("*")):
            if not path.is_file() or path.name in READ_DIFFERENTLY:
                continue
            content = path.read_bytes()
            if header.dataset_start(io.BytesIO(content)) is None:
                continue
            with values.quietly():
                expected = by_pydicom(pydicom.dcmread(path, force=True))
            found = json.loads(json_of(content))
            assert found == json.loads(json.dumps(expected)), path.name
            compared += 1
    assert compared > 200


def test_a_bad_element_is_lost_and_the_others_are_not():
    """What cannot be read as its VR is left out by itself."""
    content = (PYDICOM_FILES / "badVR.dcm").read_bytes()
    found = json.loads(json_of(content))
    with values.quietly():
        dataset = pydicom.dcmread(io.BytesIO(content))
        expected = {f"{tag:08X}" for tag in list(dataset.keys())} - {"00280008"}
    assert found.keys() == expected and found["00280010"]["Value"]


def test_what_is_given_by_uri():
    """Pixels always are, palettes never, other binary values over the limit, with nested paths."""
    inner, item = Dataset(), Dataset()
    inner.PixelData = bytes(4)
    inner["PixelData"].VR = "OB"
    item.IconImageSequence = Sequence([Dataset(), inner])
    content = dicom(
        pixels=bytes(10),
        EncapsulatedDocument=bytes(values.INLINE_LIMIT + 2),
        RedPaletteColorLookupTableData=bytes(4096),
        RequestAttributesSequence=Sequence([item]),
    )
    found = json.loads(json_of(content))
    assert found["7FE00010"] == {"vr": "OB", "BulkDataURI": "bulkdata/7FE00010"}
    assert found["00420011"]["BulkDataURI"] == "bulkdata/00420011"
    assert len(found["00281201"]["InlineBinary"]) > 4096
    (outer,) = found["00400275"]["Value"]
    assert outer["00880200"]["Value"][0] == {}
    assert outer["00880200"]["Value"][1]["7FE00010"]["BulkDataURI"] == (
        "bulkdata/00400275/0/00880200/1/7FE00010"
    )
    assert "00020010" not in found


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, DeflatedExplicitVRLittleEndian])
def test_long_values_and_what_stands_behind_pixels(syntax):
    """A long text, a long sequence and an element behind the pixels are there in full."""
    code = Dataset()
    code.CodeMeaning = "x" * 60
    content = dicom(
        syntax=syntax,
        pixels=bytes(100_000),
        TextValue="y" * 70_000,
        SourceImageSequence=Sequence([code] * 2000),
        DataSetTrailingPadding=bytes(6),
    )
    found = json.loads(json_of(content))
    assert len(found["00082112"]["Value"]) == 2000
    assert found["00082112"]["Value"][1999]["00080104"]["Value"] == ["x" * 60]
    assert found["FFFCFFFC"]["InlineBinary"] == "AAAAAAAA"
    assert found["0040A160"]["Value"] == ["y" * 70_000]
    assert found["7FE00010"]["vr"] == ("OW" if syntax == ImplicitVRLittleEndian else "OB")


def test_encapsulated_pixels_are_skipped():
    """Elements behind encapsulated pixel data are found without reading its fragments."""

    class Watched(io.BytesIO):
        taken = 0

        def read(self, size=-1):
            content = super().read(size)
            self.taken += len(content)
            return content

    meta = element(0x00020010, "UI", RLELossless.encode() + b"\0")
    fragments = (FRAGMENT + (100_000).to_bytes(4, "little") + bytes(100_000)) * 5
    pixels = element(0x7FE00010, "OB", fragments + END, length=0xFFFFFFFF)
    padding = element(0xFFFCFFFC, "OB", b"12")
    file = Watched(PREAMBLE + meta + SOP_CLASS + pixels + padding)
    packed = metadata.compressed_json(header.read(file))
    found = json.loads(zlib.decompress(packed))
    assert found["FFFCFFFC"]["InlineBinary"] == "MTI=" and found["7FE00010"]["vr"] == "OB"
    assert file.taken < 20_000


def test_numbers_that_json_does_not_have():
    """NaN and infinity become null, and the text is JSON in the strict sense."""
    text = json_of(dicom(RecommendedDisplayFrameRateInFloat=float("nan"), SliceThickness="inf"))
    assert "NaN" not in text and "Infinity" not in text
    found = json.loads(text)
    assert found["00089459"] == {"vr": "FL", "Value": [None]}
    assert found["00180050"] == {"vr": "DS", "Value": [None]}


def nested(depth):
    dataset = Dataset()
    for _ in range(depth):
        outer = Dataset()
        outer.RequestAttributesSequence = Sequence([dataset])
        dataset = outer
    return dicom(RequestAttributesSequence=Sequence([dataset]))


def test_what_is_too_large_has_no_json(monkeypatch):
    """Beyond the limits there is none rather than a part, and the header is there all the same."""
    many = Dataset()
    many.CodeMeaning = "x" * 64
    for content in (
        dicom(SourceImageSequence=Sequence([many] * 45_000)),
        nested(metadata.SEQUENCE_DEPTH + 1),
        PREAMBLE + SOP_CLASS + element(0x00204000, "UT", bytes(70_000), length=2**31),
        (PYDICOM_FILES / "CT_small.dcm").read_bytes()[:132]
        + SOP_CLASS
        + element(0x00400275, "SQ", (FRAGMENT + bytes(4)) * 500_000),
    ):
        with values.quietly():
            elements = header.read(io.BytesIO(content))
            assert header.searchable(elements)["sopClassUID"]
            assert metadata.compressed_json(elements) is None
    assert json_of(nested(metadata.SEQUENCE_DEPTH - 1)) is not None
