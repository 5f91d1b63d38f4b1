"""What a DICOM file says of itself: values of the dictionary's types, however odd the file."""

import io
import json
import subprocess
import sys
import threading
import warnings
import zlib
from pathlib import Path

import pydicom
import pytest
from conftest import PYDICOM_DATA, PYDICOM_FILES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom import config, datadict
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)
from samples import PREAMBLE, dicom, element

from dicomstore.catalogue.schema import INDEX_FIELDS
from dicomstore.imaging import header
from dicomstore.imaging.header import HEADER_LIMIT, NUMBER_VRS, SEQUENCE_DEPTH, searchable

UNDEFINED = 0xFFFFFFFF
SOP_CLASS = element(0x00080016, "UI", b"1.2.840.10008.5.1.4.1.1.2\0")
ITEM, ITEM_END, SEQUENCE_END = (b"\xfe\xff" + end for end in (b"\0\xe0", b"\r\xe0", b"\xdd\xe0"))


def searchable_bytes(content):
    return searchable(io.BytesIO(content))


def assert_indexable(members):
    """Every value has the one JSON type that the index and the dictionary call for."""
    for name, value in members.items():
        kind = INDEX_FIELDS.get(name)
        if kind == "NUMERIC":
            assert isinstance(value, int | float) and not isinstance(value, bool)
        elif kind == "TAG":
            assert isinstance(value, str) and value
        else:
            assert name in ("header", "headerPartial")
    assert_plain(members["header"], 0)
    text = json.dumps(members, ensure_ascii=False, allow_nan=False)
    text.encode("utf-8")
    assert "\0" not in text and "\\u0000" not in text
    assert len(json.dumps(members["header"])) <= HEADER_LIMIT * 1.05


def assert_plain(header, depth):
    assert depth <= SEQUENCE_DEPTH
    for keyword, value in header.items():
        vr = datadict.dictionary_VR(datadict.tag_for_keyword(keyword))
        if vr == "SQ":
            for item in value:
                assert_plain(item, depth + 1)
            continue
        wanted = str if NUMBER_VRS.isdisjoint(vr.split(" or ")) else (int, float)
        for one in value if isinstance(value, list) else [value]:
            assert isinstance(one, wanted) and not isinstance(one, bool), (keyword, vr, one)
            assert one != ""


# --- which files are DICOM -----------------------------------------------------------------------


def test_what_counts_as_dicom():
    """Odd DICOM files are recognised, other files are not, in pydicom's own test data."""
    for name in (
        "CT_small.dcm", "rtstruct.dcm", "no_meta.dcm", "badVR.dcm", "ExplVR_BigEnd.dcm",
        "image_dfl.dcm", "dicomdirtests/DICOMDIR", "no_meta_group_length.dcm",
    ):  # fmt: skip
        with (PYDICOM_FILES / name).open("rb") as file:
            members = searchable(file)
        assert members is not None and len(members["header"]) > 5, name
    for name in ("README.txt", "crayons.icc", "zipMR.gz", "test1.json", "rtplan.dump"):
        with (PYDICOM_FILES / name).open("rb") as file:
            assert searchable(file) is None, name


@pytest.mark.parametrize(
    "content",
    [b"", b"D", b"DICM", bytes(128) + b"DIC", bytes(132), b"\x08\0\x16\0", b"\x08\0" * 4000,
     b"\x08\0\x16\0UI\x04\0text", b"\x02\0" + b"\xff" * 200, b"II*\0" + bytes(300)],
)  # fmt: skip
def test_what_is_never_guessed(content):
    """Bytes without DICM, whose first elements hold no SOP Class UID, are not DICOM."""
    assert searchable_bytes(content) is None


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=300))
def test_random_bytes_never_fail(noise):
    """Whatever follows the preamble, a description comes back and can be indexed."""
    assert_indexable(searchable_bytes(PREAMBLE + noise))
    assert_indexable(searchable_bytes(PREAMBLE + SOP_CLASS + noise))
    searchable_bytes(noise)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_broken_real_files_never_fail(data):
    """Real files with bytes overwritten, cut out or cut off are described without an error."""
    names = ["CT_small.dcm", "rtplan.dcm", "no_meta.dcm", "image_dfl.dcm", "reportsi.dcm",
             "ExplVR_BigEnd.dcm", "nested_priv_SQ.dcm", "MR_small_implicit.dcm"]  # fmt: skip
    content = bytearray((PYDICOM_FILES / data.draw(st.sampled_from(names))).read_bytes()[:3000])
    for _ in range(data.draw(st.integers(1, 6))):
        place = data.draw(st.integers(0, len(content) - 1))
        noise = data.draw(st.binary(max_size=6))
        content[place : place + data.draw(st.sampled_from([0, len(noise), 50]))] = noise
    members = searchable_bytes(bytes(content))
    if members is not None:
        assert_indexable(members)


@pytest.mark.parametrize("vr", ["XX", "??", "AT", "SQ", "OB", "FD", "UL", "IS", "DS", "PN"])
def test_a_transfer_syntax_that_cannot_be_read(vr):
    """Where file meta information is broken, the encoding is told from the data set itself."""
    for raw in (b"", b"1", b"1.2.840.10008.1.2.1\0", b"a\\b\\c\xff"):
        content = PREAMBLE + element(0x00020010, vr, raw) + SOP_CLASS
        members = searchable_bytes(content + element(0x00280010, "US", b"\x05\0"))
        assert_indexable(members)
        if vr != "??":  # what is no VR by its form makes the file one with implicit VRs
            assert members["rows"] == 5


def test_all_real_files_have_plain_headers():
    """Every real file's description has the dictionary's types, and only badVR.dcm is partial."""
    partial = []
    for path in PYDICOM_DATA.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                members = searchable(file)
            if members is not None:
                assert_indexable(members)
                if "headerPartial" in members:
                    partial.append(path.name)
    assert partial == ["badVR.dcm"]


def test_descriptions_agree_with_pydicom():
    """For a sound file the header holds what pydicom reads, element by element."""
    for name in ("CT_small.dcm", "MR_small_bigendian.dcm", "MR_small_implicit.dcm"):
        with (PYDICOM_FILES / name).open("rb") as file:
            header = searchable(file)["header"]
        dataset = pydicom.dcmread(PYDICOM_FILES / name, stop_before_pixels=True)
        compared = 0
        for one in dataset:
            empty = one.value in (None, "", b"", [])
            if one.keyword and one.VR not in ("SQ", "OB", "OW", "UN") and not empty:
                found, value = header[one.keyword], one.value
                if one.VM == 1:
                    found, value = [found], [value]
                kind = float if one.VR in NUMBER_VRS else str
                assert list(map(kind, found)) == list(map(kind, value)), one.keyword
                compared += 1
        assert compared > 40
        assert header["TransferSyntaxUID"] == dataset.file_meta.TransferSyntaxUID


# --- the indexed fields --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [("20190131", 20190131), ("2004.01.19", 20040119), ("20040229", 20040229), ("20040231", None),
     ("20050229", None), ("2004.0119", None), ("200401", None), ("2004-01-19", None), ("", None),
     ("00000000", None), ("20040119 ", 20040119), ("text", None), ("20040119\\20050119", None)],
)  # fmt: skip
def test_study_dates(text, expected):
    """A real date becomes the number yyyymmdd, in DICOM's and in ACR-NEMA's form; others do not."""
    members = searchable_bytes(dicom(StudyDate=text))
    assert members.get("studyDate") == expected
    assert_indexable(members)


def test_normalised_fields():
    """White space of protocol names is folded, manufacturers are upper case, absent is absent."""
    members = searchable_bytes(
        dicom(ProtocolName=" a  b\t c ", Manufacturer="Acme", Rows=5, PatientSex="", Modality="CT")
    )
    assert members["protocolName"] == "a b c" and members["manufacturer"] == "ACME"
    assert members["rows"] == 5 and members["modality"] == "CT"
    assert not {"patientSex", "studyDate", "columns"} & set(members)
    assert members["header"]["Manufacturer"] == "Acme"


@pytest.mark.parametrize(
    ("character_set", "raw", "text"),
    [
        ("ISO_IR 100", "Müller^Jörg".encode("latin-1"), "Müller^Jörg"),
        ("ISO_IR 127", "قباني^لنزار".encode("iso8859_6"), "قباني^لنزار"),
        ("ISO_IR 192", "山田^太郎".encode(), "山田^太郎"),
        (
            "ISO 2022 IR 13\\ISO 2022 IR 87",
            b"\xd4\xcf\xc0\xde^\xc0\xdb\xb3=\x1b$B;3ED\x1b(J^\x1b$BB@O:\x1b(J ",
            "ﾔﾏﾀﾞ^ﾀﾛｳ=山田^太郎",
        ),
        ("GB18030", "王^小东".encode("gb18030"), "王^小东"),
    ],
)  # fmt: skip
def test_character_sets(character_set, raw, text):
    """Names in Latin, Arabic, Japanese and Chinese character sets come out as they are read."""
    name = raw + b" " * (len(raw) % 2)
    character_set = character_set.encode() + b" " * (len(character_set) % 2)
    content = PREAMBLE + element(0x00080005, "CS", character_set) + SOP_CLASS
    members = searchable_bytes(content + element(0x00100010, "PN", name))
    assert members["header"]["PatientName"] == text
    assert_indexable(members)


# --- types by the dictionary ---------------------------------------------------------------------

ODD_NUMBERS = ["NaN", "inf", "-Infinity", "1e400", "1e308", "9" * 30, "1.5", "-0", " 7 ", "abc", ""]


@pytest.mark.parametrize("text", ODD_NUMBERS)
@pytest.mark.parametrize("keyword", ["SliceThickness", "InstanceNumber", "NumberOfFrames"])
def test_odd_numbers(keyword, text):
    """A decimal or integer string that is no finite JSON number is left out, never text."""
    tag = datadict.tag_for_keyword(keyword)
    raw = text.encode() + b" " * (len(text) % 2)
    content = PREAMBLE + SOP_CLASS + element(tag, datadict.dictionary_VR(tag), raw)
    members = searchable_bytes(content)
    value = members["header"].get(keyword)
    if text in ("1.5", "-0", " 7 ", "9" * 30) or (text, keyword) == ("1e308", "SliceThickness"):
        assert value == float(text)
    else:
        assert value is None
    assert_indexable(members)


@pytest.mark.parametrize("vr", ["LO", "SQ", "UN", "FD", "AT", "PN", "OB", "XX", "IS", "UT", "DS"])
@pytest.mark.parametrize(
    "keyword", ["Rows", "StudyDate", "ProtocolName", "PatientName", "SliceThickness",
                "FrameIncrementPointer", "ReferencedImageSequence", "PatientID", "ImageType"]
)  # fmt: skip
def test_wrong_vrs(keyword, vr):
    """An element whose VR contradicts the dictionary gets the latter's type or is left out."""
    for raw in (b"20", b"2\\3 ", bytes(8), ITEM + bytes(4), b"\xff\xfe", b"x\0y\0"):
        content = element(datadict.tag_for_keyword(keyword), vr, raw)
        whole = PREAMBLE + b"".join(sorted([SOP_CLASS, content], key=lambda one: one[:2]))
        members = searchable_bytes(whole + element(0x00280100, "US", b"\x08\0"))
        assert_indexable(members)
        if keyword == "ProtocolName":
            assert not isinstance(members["header"].get(keyword), dict)
            assert "Sequence" not in members.get("protocolName", "")


def test_a_sequence_where_text_belongs():
    """A sequence under the tag of a text attribute is left out, not printed into it."""
    inner = element(0x00100010, "PN", b"Inner^Name")
    item = ITEM + len(inner).to_bytes(4, "little") + inner
    members = searchable_bytes(PREAMBLE + SOP_CLASS + element(0x00181030, "SQ", item))
    assert "protocolName" not in members and "ProtocolName" not in members["header"]
    assert members["headerPartial"] is True


def test_nul_and_lone_surrogates():
    """Text keeps neither NUL, which ends a value in the index, nor what UTF-8 cannot hold."""
    character_set = element(0x00080005, "CS", b"ISO_IR 192")
    name = element(0x00181030, "LO", b"a\0b\xed\xa0\x80c\0")
    members = searchable_bytes(PREAMBLE + character_set + SOP_CLASS + name)
    assert members["protocolName"].startswith("ab") and members["protocolName"].endswith("c")
    assert_indexable(members)


TEXT_VRS = {"AE": 16, "CS": 16, "LO": 64, "SH": 16, "ST": 200, "UC": 200, "UT": 300}
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\\"), max_size=20)
ASCII = st.text(st.characters(codec="ascii", exclude_characters="\\"), max_size=16)
NUMBERS = {
    "US": st.integers(0, 2**16 - 1),
    "SS": st.integers(-(2**15), 2**15 - 1),
    "UL": st.integers(0, 2**32 - 1),
    "SL": st.integers(-(2**31), 2**31 - 1),
    "UV": st.integers(0, 2**64 - 1),
    "SV": st.integers(-(2**63), 2**63 - 1),
    "FD": st.floats(),
    "FL": st.floats(width=32),
    "IS": st.integers(-(2**31), 2**31 - 1),
    "DS": st.floats(-1e9, 1e9).map(lambda number: f"{number:.6g}"),
}
STANDARD = [
    (tag, vr, vm)
    for tag, (vr, vm, _, retired, keyword) in datadict.DicomDictionary.items()
    if keyword and not retired and 0x00080019 < tag < 0x52000000 and tag & 0xFFFF
    and (vr in NUMBERS or vr in TEXT_VRS)
]  # fmt: skip


@st.composite
def elements(draw):
    tag, vr, vm = draw(st.sampled_from(STANDARD))
    one = NUMBERS.get(vr, ASCII if vr in ("AE", "CS") else TEXT)
    return tag, vr, draw(one if vm == "1" else st.lists(one, min_size=1, max_size=4))


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(elements(), max_size=12),
    st.sampled_from([ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian]),
    st.integers(0, 3),
)
def test_header_types_follow_the_dictionary(chosen, syntax, depth):
    """Random data sets, in all encodings and nested, give values of the dictionary's types."""
    dataset = Dataset()
    dataset.SpecificCharacterSet = "ISO_IR 192"
    with config.disable_value_validation():
        for tag, vr, value in chosen:
            dataset.add_new(tag, vr, value)
        for _ in range(depth):
            outer = Dataset()
            outer.SpecificCharacterSet = "ISO_IR 192"
            outer.RequestAttributesSequence = Sequence([dataset])
            dataset = outer
    attributes = {one.keyword: one.value for one in dataset}
    members = searchable_bytes(dicom(syntax=syntax, **attributes))
    assert_indexable(members)
    header = members["header"]
    for _ in range(depth):
        (header,) = header["RequestAttributesSequence"]
    for tag, vr, value in {one[0]: one for one in chosen}.values():
        if vr in ("US", "SS", "UL", "SL", "SV", "IS") and not isinstance(value, list):
            assert header[datadict.keyword_for_tag(tag)] == value


# --- size and depth ------------------------------------------------------------------------------


def nested(depth, implicit, defined):
    """Return a data set whose sequences are nested `depth` deep."""
    content = b""
    for _ in range(depth):
        length = len(content) if defined else UNDEFINED
        content = ITEM + length.to_bytes(4, "little") + content
        content += b"" if defined else ITEM_END + bytes(4)
        length = len(content) if defined else UNDEFINED
        vr = b"" if implicit else b"SQ\0\0"
        head = b"\x40\0\x75\x02" + vr + length.to_bytes(4, "little")
        content = head + content + (b"" if defined else SEQUENCE_END + bytes(4))
    return content


@pytest.mark.parametrize("defined", [True, False])
@pytest.mark.parametrize("implicit", [True, False])
def test_sequences_nested_a_thousand_deep(implicit, defined):
    """The header keeps eight levels and what else it can, and says that it is not whole."""
    syntax = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian
    flat = dicom(syntax=syntax, Modality="CT", Rows=5)
    members = searchable_bytes(flat + nested(1000, implicit, defined))
    assert members["headerPartial"] is True
    assert members["modality"] == "CT" and members["rows"] == 5
    assert_indexable(members)
    shallow = searchable_bytes(flat + nested(SEQUENCE_DEPTH, implicit, defined))
    assert "headerPartial" not in shallow
    assert len(str(shallow["header"]).split("RequestAttributesSequence")) == SEQUENCE_DEPTH + 1


def test_large_headers_stop_at_their_limit():
    """A header over 64 KB is cut to that and says so; the indexed fields are there all the same."""
    texts = {"SelectorSTValue": "x" * 60_000, "AdditionalPatientHistory": "y" * 30_000}
    members = searchable_bytes(dicom(Modality="CT", SeriesDescription="last", **texts))
    assert members["headerPartial"] is True and members["seriesDescription"] == "last"
    assert_indexable(members)


@pytest.mark.parametrize("sequences", [1, 3])
def test_sequences_of_very_many_items(sequences):
    """Empty items count as well: the header stays within its limit and says what is missing."""
    items = (ITEM + bytes(4)) * 8_000
    tags = [0x00081140, 0x00321064, 0x00400275][:sequences]
    members = searchable_bytes(
        PREAMBLE + SOP_CLASS + b"".join(element(tag, "SQ", items) for tag in tags)
    )
    assert len(members["header"]["ReferencedImageSequence"]) == 8_000
    assert len(json.dumps(members["header"])) <= HEADER_LIMIT
    assert members.get("headerPartial", False) is (sequences == 3)


def test_long_values_are_not_read():
    """A value over 64 KiB is skipped over, and the elements behind it are there."""
    content = PREAMBLE + SOP_CLASS + element(0x00204000, "UT", b"x" * 70_000)
    members = searchable_bytes(content + element(0x00280010, "US", b"\x05\0"))
    assert members["rows"] == 5 and members["headerPartial"] is True
    assert "ImageComments" not in members["header"]


def test_nothing_behind_the_pixels_is_read():
    """The bulk data is never touched: reading stops in front of it."""

    class Watched(io.BytesIO):
        furthest = 0

        def read(self, size=-1):
            content = super().read(size)
            self.furthest = max(self.furthest, self.tell())
            return content

    head = PREAMBLE + SOP_CLASS + element(0x00280010, "US", b"\x05\0")
    file = Watched(head + element(0x7FE00010, "OB", bytes(1_000_000)))
    assert searchable(file)["rows"] == 5
    assert file.furthest <= max(len(head) + 12, header.HEAD_BYTES)


def deflated(content, filling):
    """Return a file in deflated syntax of `content` and then 2 GB of `filling`, a power of 2."""
    meta = element(0x00020010, "UI", DeflatedExplicitVRLittleEndian.encode())

    def packed(piece):
        packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
        return packer.compress(piece) + packer.flush(zlib.Z_FULL_FLUSH)

    # Packed once and written two thousand times.
    return PREAMBLE + meta + packed(content) + packed(filling * (2**20 // len(filling))) * 2048


BOMBS = {
    "pixels": (element(0x7FE00010, "OW", b"", length=2**31), b"\0"),
    "a private value": (element(0x00091010, "UN", b"", length=2**31), b"\0"),
    "a private value without end": (element(0x00091010, "UN", b"", length=UNDEFINED), b"\0"),
    "elements": (b"", element(0x00280030, "US", b"")),
    "items": (element(0x00400275, "SQ", b"", length=UNDEFINED), ITEM + bytes(4)),
    "values": (b"", element(0x00280030, "UT", bytes(2**15 - 12))),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_deflated_file_that_inflates_to_two_gigabytes(bomb, tmp_path):
    """Its header is read within 100 MB of memory: no more than 16 MiB are inflated."""
    start, filling = BOMBS[bomb]
    path = tmp_path / "bomb.dcm"
    path.write_bytes(deflated(SOP_CLASS + element(0x00280010, "US", b"\x05\0") + start, filling))
    assert path.stat().st_size < 2**24
    script = (
        "import resource, sys; sys.path.insert(0, sys.argv[1])\n"
        "from dicomstore.imaging import header\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak(); rows = header.searchable(open(sys.argv[2], 'rb'))['rows']\n"
        "print(rows, (peak() - before) // 1024)"
    )
    project = Path(header.__file__).parents[2]
    arguments = [sys.executable, "-c", script, project, path]
    run = subprocess.run(arguments, capture_output=True, text=True, check=True, timeout=60)
    rows, added = map(int, run.stdout.split())
    assert rows == 5 and added < 100


@pytest.mark.parametrize("kind", ["elements", "items", "values", "a private value without end"])
def test_headers_without_end(kind):
    """A huge header is read in part only, and what stands in front of the excess is there."""
    start, filling = BOMBS[kind]
    content = PREAMBLE + SOP_CLASS + element(0x00280010, "US", b"\x05\0") + start
    members = searchable_bytes(content + filling * (2**25 // len(filling)))
    assert members["rows"] == 5 and members["headerPartial"] is True
    assert_indexable(members)


def test_threads_keep_their_warnings():
    """Headers that are read in many threads change neither warnings nor pydicom's settings."""
    content = (PYDICOM_FILES / "CT_small.dcm").read_bytes()

    def settings():
        return list(warnings.filters), config.settings.reading_validation_mode, config.logger.level

    before, expected, found, seen = settings(), searchable_bytes(content), [], []

    def work():
        for _ in range(20):
            found.append(header.members(header.read(io.BytesIO(content))))
            seen.append(settings())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 80 and all(one == expected for one in found)
    assert all(one == before for one in seen)


def test_values_are_never_quoted():
    """What pydicom would warn of, quoting a patient's name, is read without a warning."""
    name = b"Secret^Name\x1b$Z" + b"\xff" * 3 + b"x" * 80
    content = PREAMBLE + element(0x00080005, "CS", b"ISO 2022 IR 100 ") + SOP_CLASS
    elements = header.read(io.BytesIO(content + element(0x00100010, "PN", name)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "Secret" in header.members(elements)["patientName"]


def test_the_new_fields():
    """Names, numbers and identifiers that DICOMweb asks for are indexed, with their types."""
    members = searchable_bytes(
        dicom(
            PatientName="Roe^Jane", AccessionNumber="A1", StudyID="7", StudyTime="101112.5",
            SeriesNumber="4", InstanceNumber="12",
        )
    )  # fmt: skip
    assert members["patientName"] == "Roe^Jane" and members["accessionNumber"] == "A1"
    assert members["studyID"] == "7" and members["studyTime"] == "101112.5"
    assert members["seriesNumber"] == 4 and members["instanceNumber"] == 12
    assert members["sopClassUID"] == "1.2.840.10008.5.1.4.1.1.2"
