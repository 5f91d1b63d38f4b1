"""What a DICOM file says of itself, as a JSON document; knows DICOM, not Redis.

The bytes in Redis are lossless; the document made here is for searching. RediSearch drops a
document from the index in silence when one value has the wrong type, so every value gets the type
that the DICOM dictionary calls for, or is left out.
"""

from __future__ import annotations

import functools
import io
import math
import re
import zlib
from collections.abc import Callable, Iterable
from datetime import date
from typing import Any, BinaryIO, NamedTuple, cast

from pydicom import datadict
from pydicom.dataelem import DataElement, RawDataElement
from pydicom.dataset import Dataset
from pydicom.filereader import read_dataset
from pydicom.hooks import raw_element_vr
from pydicom.tag import BaseTag, Tag
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

from dicomstore.imaging import values
from dicomstore.imaging.values import BULK_VRS as BULK_VRS
from dicomstore.imaging.values import NUMBER_VRS as NUMBER_VRS
from dicomstore.imaging.values import UNREADABLE as UNREADABLE
from dicomstore.imaging.values import quietly as quietly

#: JSON text of the `header` member, in characters; the rest of a larger header is left out.
HEADER_LIMIT = 64 * 1024
SEQUENCE_DEPTH = 8
#: Values longer than this (bytes) are skipped, not read: none of them is searched for.
LONGEST_VALUE = 64 * 1024
#: No more of a header is read, or inflated in deflated syntax (PS3.5 A.5), than this (bytes): 1 MB
#: can inflate to 2 GB.
READ_LIMIT = 16 * 1024 * 1024
#: Nor in more steps than this, one or two a data element: objects take far more memory than bytes.
READS_LIMIT = 50_000
HEAD_BYTES = 4096
#: From Per-Frame Functional Groups Sequence on, a data set holds values per frame, then bulk data.
FIRST_BULK_TAG = 0x52009230
#: The first value of these is unsigned, whatever their VR says (PS3.3 C.7.6.3.1.5).
LUT_DESCRIPTORS = frozenset([0x00281101, 0x00281102, 0x00281103, 0x00283002])

Charsets = tuple[str, ...]
Element = RawDataElement | DataElement


# --- the indexed fields --------------------------------------------------------------------------


def _text(value: Any) -> str:
    return "\\".join(map(str, value)) if isinstance(value, list) else str(value)


def _folded(value: Any) -> str:
    return " ".join(_text(value).split())


def _date(value: Any) -> int | None:
    """Return yyyymmdd for a DA value (PS3.5 6.2), also in ACR-NEMA's old form yyyy.mm.dd."""
    match = re.fullmatch(r"(\d{4})(\.?)(\d\d)\2(\d\d)", _text(value))
    if match is None:
        return None
    year, _, month, day = match.groups()
    try:
        date(int(year), int(month), int(day))
    except ValueError:
        return None
    return int(year + month + day)


def _number(value: Any) -> int | float | None:
    return value if isinstance(value, int | float) else None


class Field(NamedTuple):
    """One indexed field: its DICOM keyword, its type in RediSearch, and how its value is made."""

    keyword: str
    type: str
    convert: Callable[[Any], Any]


FIELDS = {
    "protocolName": Field("ProtocolName", "TAG", _folded),
    "patientSex": Field("PatientSex", "TAG", _text),
    "studyDate": Field("StudyDate", "NUMERIC", _date),
    "studyTime": Field("StudyTime", "TAG", _text),
    "manufacturer": Field("Manufacturer", "TAG", lambda value: _text(value).upper()),
    "modality": Field("Modality", "TAG", _text),
    "patientID": Field("PatientID", "TAG", _text),
    "patientName": Field("PatientName", "TAG", _text),
    "accessionNumber": Field("AccessionNumber", "TAG", _text),
    "studyID": Field("StudyID", "TAG", _text),
    "studyInstanceUID": Field("StudyInstanceUID", "TAG", _text),
    "seriesInstanceUID": Field("SeriesInstanceUID", "TAG", _text),
    "seriesNumber": Field("SeriesNumber", "NUMERIC", _number),
    "sopInstanceUID": Field("SOPInstanceUID", "TAG", _text),
    "sopClassUID": Field("SOPClassUID", "TAG", _text),
    "instanceNumber": Field("InstanceNumber", "NUMERIC", _number),
    "studyDescription": Field("StudyDescription", "TAG", _text),
    "seriesDescription": Field("SeriesDescription", "TAG", _text),
    "bodyPartExamined": Field("BodyPartExamined", "TAG", _text),
    "rows": Field("Rows", "NUMERIC", _number),
    "columns": Field("Columns", "NUMERIC", _number),
    "numberOfFrames": Field("NumberOfFrames", "NUMERIC", _number),
    "transferSyntaxUID": Field("TransferSyntaxUID", "TAG", _text),
}


class Elements(NamedTuple):
    """The data elements of a file in front of its bulk data, and how the others can be read.

    Attributes
    ----------
    dataset : pydicom.Dataset
        The values are raw; None is one that is longer than ``LONGEST_VALUE``.
    meta : pydicom.Dataset
        File meta information.
    whole : bool
        Whether all of them were readable.
    file : binary file
        The file, or its inflated data set.
    position : int
        Where in `file` the elements that have not been read begin.
    syntax : str
        The transfer syntax, guessed if the file does not name it (PS3.5 Annex A).
    """

    dataset: Dataset
    meta: Dataset
    whole: bool
    file: BinaryIO
    position: int
    syntax: str


def searchable(file: BinaryIO) -> dict[str, Any] | None:
    """Return the searchable part of a DICOM file's document, or None if the file is not DICOM.

    This is :func:`quietly`, so for processes without other threads.

    Parameters
    ----------
    file : binary file, seekable
        Its position is not kept.

    Returns
    -------
    dict or None
        As :func:`members` makes it.
    """
    with quietly():
        elements = read(file)
        return None if elements is None else members(elements)


def members(elements: Elements) -> dict[str, Any]:
    """Return the members of a document that are searched.

    Returns
    -------
    dict
        The normalised fields of ``FIELDS`` that the file has; ``header``, its standard attributes
        by keyword; and ``headerPartial`` if some of them are missing there.
    """
    header = _Header(elements.whole)
    found: dict[str, Any] = {}
    own = [(each, dict(each.items())) for each in (elements.dataset, elements.meta)]
    for name, field in FIELDS.items():
        tag = _tag(field.keyword)
        for dataset, raw in own:
            value = header.value(dataset, raw[tag]) if tag in raw else None
            converted = None if value is None else field.convert(value)
            if converted not in (None, ""):
                found[name] = converted
    attributes = header.attributes(elements.dataset)
    found["header"] = attributes | header.attributes(elements.meta)
    if header.partial:
        found["headerPartial"] = True
    return found


# --- recognising and reading ---------------------------------------------------------------------


def dataset_start(file: BinaryIO) -> int | None:
    """Return the offset of the first data element, or None if the file is not DICOM.

    A file without preamble (PS3.10 7.1) counts as DICOM only if its first elements, at most one
    stray byte before them, hold a SOP Class UID.
    """
    file.seek(0)
    head = file.read(HEAD_BYTES)
    if head[128:132] == b"DICM":
        return 132
    for start in (0, 1):
        if head[start : start + 2] not in (b"\x02\x00", b"\x08\x00", b"\x00\x08"):
            continue
        elements = _read_from(io.BytesIO(head), start, last_tag=0x00080018)
        for dataset, tag in ((elements.dataset, 0x00080016), (elements.meta, 0x00020002)):
            if re.fullmatch(r"[0-9]+(\.[0-9]+){3,}", _uid(dataset, tag) or ""):
                return start
    return None


def read(file: BinaryIO) -> Elements | None:
    """Return the data elements in front of the bulk data, or None if the file is not DICOM.

    Parameters
    ----------
    file : binary file, seekable
        Its position is not kept.
    """
    start = dataset_start(file)
    return None if start is None else _read_from(file, start)


def _read_from(file: BinaryIO, start: int, *, last_tag: int = FIRST_BULK_TAG - 1) -> Elements:
    file.seek(start)
    meta, meta_whole = _read_elements(file, False, True, lambda tag: int(tag) >> 16 != 2)
    syntax = _uid(meta, 0x00020010)
    if syntax == DeflatedExplicitVRLittleEndian:
        try:
            inflated = zlib.decompressobj(-zlib.MAX_WBITS).decompress(
                file.read(READ_LIMIT), READ_LIMIT
            )
        except zlib.error:
            return Elements(Dataset(), meta, False, file, file.tell(), syntax)
        file = io.BytesIO(inflated)
    implicit_vr, little_endian = _encoding(file, syntax)
    dataset, whole = _read_elements(
        file, implicit_vr, little_endian, lambda tag: int(tag) > last_tag
    )
    named = syntax or _guessed_syntax(implicit_vr, little_endian)
    return Elements(dataset, meta, meta_whole and whole, file, file.tell(), named)


def _uid(dataset: Dataset, tag: int) -> str | None:
    """Return a UID, whatever VR the file gives it."""
    value = next((element.value for key, element in dataset.items() if key == tag), None)
    return value.decode().strip("\0 ") if isinstance(value, bytes) and value.isascii() else None


def _encoding(file: BinaryIO, syntax: Any) -> tuple[bool, bool]:
    """Return whether VRs are implicit and the byte order is little-endian (PS3.5 Annex A)."""
    if isinstance(syntax, str):
        return syntax == ImplicitVRLittleEndian, syntax != ExplicitVRBigEndian
    position = file.tell()
    opening = file.read(6)
    file.seek(position)
    # A first group of 0x0008 in big-endian order reads as 0x0800.
    return not re.fullmatch(rb"[A-Z]{2}", opening[4:6]), opening[:1] != b"\x00"


def _read_elements(
    file: BinaryIO, implicit_vr: bool, little_endian: bool, beyond: Callable[[BaseTag], bool]
) -> tuple[Dataset, bool]:
    """Return the elements from here to the first one `beyond`, and whether all were readable.

    Where pydicom gives up on an element, those before it are kept.
    """
    start = file.tell()
    position, broken = start, math.inf

    def stop(tag: BaseTag, _vr: str | None, _length: int) -> bool:
        nonlocal position
        position = file.tell()
        return position >= broken or beyond(tag)

    def read() -> Dataset:
        file.seek(start)
        bounded = cast(BinaryIO, Bounded(file, READ_LIMIT))
        return read_dataset(
            bounded, implicit_vr, little_endian, stop_when=stop, defer_size=LONGEST_VALUE
        )

    try:
        return read(), True
    except UNREADABLE:
        broken = position
    try:
        return read(), False
    except UNREADABLE:
        return Dataset(), False


def dataset_syntax(file: BinaryIO) -> str:
    """Return the transfer syntax, guessed if the file does not name it (PS3.5 Annex A).

    The file's position is left at the data set, behind preamble and file meta information.
    """
    file.seek(dataset_start(file) or 0)
    meta, _ = _read_elements(file, False, True, lambda tag: int(tag) >> 16 != 2)
    if named := _uid(meta, 0x00020010):
        return named
    return _guessed_syntax(*_encoding(file, None))


def _guessed_syntax(implicit_vr: bool, little_endian: bool) -> str:
    if implicit_vr:
        return ImplicitVRLittleEndian
    return ExplicitVRLittleEndian if little_endian else ExplicitVRBigEndian


class Bounded:
    """A file of which so many bytes, in ``READS_LIMIT`` steps, can be read."""

    def __init__(self, file: BinaryIO, limit: int) -> None:
        self._read = file.read
        self.seek = file.seek
        self.tell = file.tell
        self._bytes_left = limit
        self._reads_left = READS_LIMIT

    def read(self, size: int) -> bytes:
        self._reads_left -= 1
        self._bytes_left -= size
        if self._reads_left < 0 or self._bytes_left < 0:
            raise ValueError("the header is too large")
        return self._read(size)


class _Header:
    """Turns data elements into plain JSON values, until ``HEADER_LIMIT`` is used up."""

    def __init__(self, whole: bool) -> None:
        self.partial = not whole
        self._left = HEADER_LIMIT

    def attributes(self, dataset: Dataset, depth: int = 0) -> dict[str, Any]:
        """Return the standard attributes of `dataset` that are not bulk, by keyword."""
        found: dict[str, Any] = {}
        charsets = charsets_of(dataset)
        for tag, element in list(dataset.items()):
            if self._left <= 0:
                self.partial = True
                break
            vr, keyword = dictionary(int(tag))  # an int compares faster
            if not keyword or keyword in found or not tag & 0xFFFF:
                continue
            if vr == "SQ":
                items = self._sequence(dataset, element, depth)
                if items and self._fits(keyword, 0):
                    found[keyword] = items
                continue
            value = self._value(dataset, element, vr, charsets)
            if value.plain is not None and self._fits(keyword, value.length):
                found[keyword] = value.plain
        return found

    def value(self, dataset: Dataset, element: Element) -> Any:
        """Return the plain value of one element, or None if it is empty, bulk or unreadable."""
        vr, _ = dictionary(int(element.tag))
        return self._value(dataset, element, vr, charsets_of(dataset)).plain

    def _fits(self, keyword: str, length: int) -> bool:
        size = len(keyword) + 6 + length  # the members of a sequence were counted one by one
        if size > self._left:
            self.partial = True
            return False
        self._left -= size
        return True

    def _sequence(
        self, dataset: Dataset, element: Element, depth: int
    ) -> list[dict[str, Any]] | None:
        if depth == SEQUENCE_DEPTH:
            self.partial = True
            return None
        items = []
        try:
            for item in items_of(dataset, element):
                if self._left <= 0:
                    self.partial = True
                    break
                self._left -= len("{}, ")
                items.append(self.attributes(item, depth + 1))
        except UNREADABLE:
            self.partial = True
        return items or None

    def _value(
        self, dataset: Dataset, element: Element, vr: str, charsets: Charsets
    ) -> values.Value:
        if values.is_bulk(vr):
            return values.NOTHING
        try:
            value = value_of(dataset, element, vr, charsets)
        except UNREADABLE:
            value = values.UNREADABLE_VALUE
        if not value.readable:
            self.partial = True
        return value


# --- elements and their values, also for metadata.py ---------------------------------------------


def value_of(
    dataset: Dataset, element: Element, dictionary_vr: str, charsets: Charsets
) -> values.Value:
    """Return the value of an element that is not a sequence.

    Raises
    ------
    ValueError
        If it is longer than ``LONGEST_VALUE``, or a sequence.
    """
    vr = vr_of(dataset, element, dictionary_vr)
    if vr == "SQ":
        raise ValueError("a sequence where a value belongs")
    if isinstance(element, RawDataElement):
        if element.value is None and element.length:
            raise ValueError("a value that is too long")
        if " or " not in vr and int(element.tag) not in LUT_DESCRIPTORS:
            return values.from_bytes(
                vr, dictionary_vr, element.value or b"", element.is_little_endian, charsets
            )
        element = dataset[element.tag]  # pydicom looks at other elements to tell the VR
    return values.from_decoded(element.VR, dictionary_vr, element.value)


def vr_of(dataset: Dataset, element: Element, dictionary_vr: str) -> str:
    """Return the VR as the file gives it, or else as the dictionaries do."""
    if element.VR not in (None, "UN") or isinstance(element, DataElement):
        return str(element.VR)
    if dictionary_vr and element.VR is None:
        return dictionary_vr
    found: dict[str, Any] = {}
    raw_element_vr(element, found, ds=dataset)
    return str(found["VR"])


def items_of(dataset: Dataset, element: Element) -> Iterable[Dataset]:
    """Return the items of a sequence.

    Raises
    ------
    ValueError
        If the element is not a sequence or too long, and others of ``UNREADABLE``.
    """
    if isinstance(element, RawDataElement):
        if not element.length:
            return ()
        if element.value is None or vr_of(dataset, element, dictionary(element.tag)[0]) != "SQ":
            raise ValueError("a sequence that cannot be read")
        element = dataset[element.tag]
    return cast(Iterable[Dataset], element.value)


def charsets_of(dataset: Dataset) -> Charsets:
    charsets = dataset.original_character_set
    return (charsets,) if isinstance(charsets, str) else tuple(charsets)


@functools.lru_cache(maxsize=8192)
def dictionary(tag: int) -> tuple[str, str]:
    """Return VR and keyword of an attribute; both are empty if it is not in the dictionary."""
    try:
        vr, _, _, _, keyword = datadict.get_entry(tag)
    except KeyError:
        return "", ""
    return vr, keyword


_tag = functools.cache(Tag)
