"""What a DICOM file says of itself, as a JSON document; knows DICOM, not Redis.

The bytes in Redis are lossless; the document made here is for searching. RediSearch drops a
document from the index in silence when one value has the wrong type, so every value gets the type
that the DICOM dictionary calls for, or is left out.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import logging
import math
import re
import struct
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator
from datetime import date
from typing import Any, BinaryIO, NamedTuple, cast

from pydicom import config, datadict
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.errors import BytesLengthException
from pydicom.filereader import read_dataset
from pydicom.sequence import Sequence
from pydicom.tag import BaseTag, Tag
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)
from pydicom.values import convert_value, converters

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

NUMBER_VRS = frozenset(["DS", "FD", "FL", "IS", "SL", "SS", "SV", "UL", "US", "UV"])
BULK_VRS = frozenset(["OB", "OD", "OF", "OL", "OV", "OW", "UN"])

#: What pydicom raises for elements that break the standard, depending on where they do.
UNREADABLE = (
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    BytesLengthException,
    struct.error,
    zlib.error,
)


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
    "manufacturer": Field("Manufacturer", "TAG", lambda value: _text(value).upper()),
    "modality": Field("Modality", "TAG", _text),
    "patientID": Field("PatientID", "TAG", _text),
    "studyInstanceUID": Field("StudyInstanceUID", "TAG", _text),
    "seriesInstanceUID": Field("SeriesInstanceUID", "TAG", _text),
    "sopInstanceUID": Field("SOPInstanceUID", "TAG", _text),
    "studyDescription": Field("StudyDescription", "TAG", _text),
    "seriesDescription": Field("SeriesDescription", "TAG", _text),
    "bodyPartExamined": Field("BodyPartExamined", "TAG", _text),
    "rows": Field("Rows", "NUMERIC", _number),
    "columns": Field("Columns", "NUMERIC", _number),
    "numberOfFrames": Field("NumberOfFrames", "NUMERIC", _number),
    "transferSyntaxUID": Field("TransferSyntaxUID", "TAG", _text),
}


def describe(file: BinaryIO) -> dict[str, Any] | None:
    """Return the searchable part of a DICOM file's document, or None if it is not a DICOM file.

    Parameters
    ----------
    file : binary file, seekable
        Read from its beginning up to the bulk data; its position is not kept.

    Returns
    -------
    dict or None
        The normalised fields of ``FIELDS`` that the file has; ``header``, its standard attributes
        by keyword; and ``headerPartial`` if some of them are missing there.
    """
    with quietly():
        start = dataset_start(file)
        if start is None:
            return None
        dataset, whole = _read_header(file, start)
        header = _Header(whole)
        members = {}
        for name, field in FIELDS.items():
            value = header.value(dataset, Tag(field.keyword))
            converted = None if value is None else field.convert(value)
            if converted not in (None, ""):
                members[name] = converted
        members["header"] = header.attributes(dataset)
        if header.partial:
            members["headerPartial"] = True
        return members


_one_at_a_time = threading.Lock()


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Keep pydicom from warning and logging: it quotes values, which may be a patient's."""
    # The settings are the whole process's, hence the lock.
    with _one_at_a_time, warnings.catch_warnings(), config.disable_value_validation():
        warnings.simplefilter("ignore")
        level = config.logger.level
        config.logger.setLevel(logging.CRITICAL + 1)
        try:
            yield
        finally:
            config.logger.setLevel(level)


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
        elements, _ = _read_header(io.BytesIO(head), start, last_tag=0x00080018)
        for keyword in ("SOPClassUID", "MediaStorageSOPClassUID"):
            uid = _Header(True).value(elements, Tag(keyword))
            if isinstance(uid, str) and re.fullmatch(r"[0-9]+(\.[0-9]+){3,}", uid):
                return start
    return None


def _read_header(
    file: BinaryIO, start: int, *, last_tag: int | None = None
) -> tuple[Dataset, bool]:
    """Return file meta information and data set as one, and whether nothing was unreadable."""
    file.seek(start)
    last = FIRST_BULK_TAG - 1 if last_tag is None else last_tag
    meta, meta_whole = _read_elements(file, False, True, lambda tag: tag >> 16 != 2)
    syntax = _Header(True).value(meta, Tag("TransferSyntaxUID"))
    if syntax == DeflatedExplicitVRLittleEndian:
        try:
            inflated = zlib.decompressobj(-zlib.MAX_WBITS).decompress(
                file.read(READ_LIMIT), READ_LIMIT
            )
        except zlib.error:
            return meta, False
        file = io.BytesIO(inflated)
    implicit_vr, little_endian = _encoding(file, syntax)
    dataset, whole = _read_elements(file, implicit_vr, little_endian, lambda tag: tag > last)
    dataset.update(meta)
    return dataset, meta_whole and whole


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
    meta, _ = _read_elements(file, False, True, lambda tag: tag >> 16 != 2)
    named = _Header(True).value(meta, BaseTag(0x00020010))
    if isinstance(named, str):
        return named
    implicit_vr, little_endian = _encoding(file, None)
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
        for tag in list(dataset.keys()):
            if self._left <= 0:
                self.partial = True
                break
            vr, keyword = _dictionary(int(tag))
            if not keyword or keyword in found or tag.element == 0:
                continue
            value = self._sequence(dataset, tag, depth) if vr == "SQ" else self.value(dataset, tag)
            if value is not None and self._fits(keyword, value):
                found[keyword] = value
        return found

    def _fits(self, keyword: str, value: Any) -> bool:
        # The members of a sequence were counted one by one.
        is_sequence = isinstance(value, list) and isinstance(value[0], dict)
        size = len(keyword) + 6 + (0 if is_sequence else len(json.dumps(value)))
        if size > self._left:
            self.partial = True
            return False
        self._left -= size
        return True

    def _sequence(self, dataset: Dataset, tag: BaseTag, depth: int) -> list[dict[str, Any]] | None:
        if depth == SEQUENCE_DEPTH:
            self.partial = True
            return None
        items = []
        try:
            for item in dataset[tag].value or ():
                if self._left <= 0:
                    self.partial = True
                    break
                self._left -= len("{}, ")
                items.append(self.attributes(item, depth + 1))
        except UNREADABLE:
            self.partial = True
        return items or None

    def value(self, dataset: Dataset, tag: BaseTag) -> Any:
        """Return the plain value of one element, or None if it is empty, bulk or unreadable."""
        vr, _ = _dictionary(int(tag))
        if tag not in dataset or vr == "SQ" or not BULK_VRS.isdisjoint(vr.split(" or ")):
            return None
        try:
            element = dataset.get_item(tag)  # pydicom raises if it is longer than LONGEST_VALUE
            known = element.VR or vr  # implicit VR has none
            plain = known != "UN" and " or " not in known and known in converters
            if plain and isinstance(element, RawDataElement):
                # What `dataset[tag]` does in the end, in half the time.
                value = convert_value(known, element, dataset.original_character_set)
            else:
                value = dataset[tag].value
            if isinstance(value, Sequence):
                raise TypeError(f"a sequence where {vr} belongs")
            if isinstance(value, list | tuple) or type(value).__name__ == "MultiValue":
                values = [_plain(vr, item) for item in value]
                return [item for item in values if item is not None] or None
            return _plain(vr, value)
        except UNREADABLE:
            self.partial = True
            return None


@functools.lru_cache(maxsize=8192)
def _dictionary(tag: int) -> tuple[str, str]:
    """Return VR and keyword of an attribute; both are empty if it is not in the dictionary."""
    try:
        vr, _, _, _, keyword = datadict.get_entry(tag)
    except KeyError:
        return "", ""
    return vr, keyword


def _plain(vr: str, value: Any) -> str | int | float | None:
    """Return `value` as the JSON type that the dictionary's `vr` calls for, or None."""
    if value is None or isinstance(value, bytes):
        return None
    if not NUMBER_VRS.isdisjoint(vr.split(" or ")):
        number = int(value) if isinstance(value, int) else float(value)
        fits = abs(number) < 2**63 if isinstance(number, int) else math.isfinite(number)
        return number if fits else None
    if vr == "AT":
        return f"{int(value):08X}"
    # NUL ends a value in RediSearch, and RedisJSON takes no lone surrogates.
    text = str(value).replace("\0", "").strip()
    return text.encode("utf-8", "replace").decode() or None
