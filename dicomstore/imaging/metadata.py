"""A file's whole data set as DICOM JSON (PS3.18 Annex F), as DICOMweb's metadata is asked for.

It is made while a file is loaded, so that a series is answered without reading its files.
"""

from __future__ import annotations

import zlib
from typing import BinaryIO, cast

from pydicom.dataelem import DataElement, RawDataElement
from pydicom.dataset import Dataset
from pydicom.filereader import read_dataset, read_sequence
from pydicom.tag import BaseTag

from dicomstore.imaging import values
from dicomstore.imaging.header import (
    LONGEST_VALUE,
    READ_LIMIT,
    Bounded,
    Charsets,
    Element,
    Elements,
    charsets_of,
    dictionary,
    items_of,
    value_of,
    vr_of,
)

#: Longer JSON (characters), and deeper sequences, are not made.
JSON_LIMIT = 4 * 1024 * 1024
SEQUENCE_DEPTH = 32
#: In encapsulated pixel data of more fragments than this, nothing is looked for behind it.
FRAGMENTS_LIMIT = 1_000_000
UNDEFINED_LENGTH = 0xFFFFFFFF
SEQUENCE_END = 0xFFFEE0DD
#: Float, Double Float and Pixel Data are always given by URI.
PIXELS = frozenset([0x7FE00008, 0x7FE00009, 0x7FE00010])
#: Colour palettes are never given by URI: viewers want them before the first pixel.
PALETTES = frozenset([0x00281201, 0x00281202, 0x00281203, 0x00281221, 0x00281222, 0x00281223])


def compressed_json(elements: Elements) -> bytes | None:
    """Return a data set as DICOM JSON, compressed with zlib.

    Pixels, and other binary values over ``values.INLINE_LIMIT`` bytes, are given by a BulkDataURI
    that is relative to the instance: ``bulkdata/7FE00010``, or ``bulkdata/00880200/0/7FE00010``
    for an element of a sequence's first item. File meta information and group lengths are left
    out, and elements that are not readable.

    Parameters
    ----------
    elements : header.Elements
        As :func:`header.read` returns them; what it has not read is read here and added, so use
        :func:`header.members` before.

    Returns
    -------
    bytes or None
        None if the data set cannot be read to its end, or is too large.
    """
    if not elements.whole:
        return None
    try:
        bounded = cast(BinaryIO, Bounded(elements.file, READ_LIMIT))
        _read_rest(elements, bounded)
        text = _Json(bounded).data_set(elements.dataset, "bulkdata/", 0)
    except (*values.UNREADABLE, _TooLargeError):
        return None
    return zlib.compress(text.encode(), 1)


def _read_rest(elements: Elements, file: BinaryIO) -> None:
    """Add the elements from the bulk data on to the others, without the pixels."""
    implicit_vr, little_endian = elements.dataset.original_encoding
    stopped: list[tuple[BaseTag, str | None, int]] = []

    def stop(tag: BaseTag, vr: str | None, length: int) -> bool:
        if int(tag) in PIXELS:
            stopped.append((tag, vr, length))
        return bool(stopped)

    file.seek(elements.position)
    while True:
        rest = read_dataset(
            file,
            bool(implicit_vr),
            bool(little_endian),
            stop_when=stop,
            defer_size=LONGEST_VALUE,
            parent_encoding=elements.dataset.original_character_set,
        )
        elements.dataset.update(rest)
        if not stopped:
            return
        tag, vr, length = stopped.pop()
        # pydicom has gone back to the element's beginning: 2 + 2 bytes tag, 4 or 8 VR and length.
        file.seek(file.tell() + (12 if vr in ("OB", "OD", "OF", "OW", "UN") else 8))
        elements.dataset[tag] = RawDataElement(
            tag, vr, length, None, file.tell(), vr is None, bool(little_endian)
        )
        if length == UNDEFINED_LENGTH:
            _skip_fragments(elements.file)
        else:
            file.seek(file.tell() + length)


def _skip_fragments(file: BinaryIO) -> None:
    """Move behind encapsulated pixel data (PS3.5 A.4), which is little-endian."""
    for _ in range(FRAGMENTS_LIMIT):
        head = file.read(8)
        if len(head) < 8:
            return
        tag = int.from_bytes(head[:2], "little") << 16 | int.from_bytes(head[2:4], "little")
        if tag == SEQUENCE_END:
            return
        file.seek(int.from_bytes(head[4:], "little"), 1)
    raise ValueError("too many fragments")


class _TooLargeError(Exception):
    """A limit is reached, so that the JSON would not be complete."""


class _Json:
    """Writes elements as JSON text, until ``JSON_LIMIT`` is used up."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._left = JSON_LIMIT

    def data_set(self, dataset: Dataset, path: str, depth: int) -> str:
        """Return a data set, whose bulk data is found below `path`."""
        if depth > SEQUENCE_DEPTH:
            raise _TooLargeError
        charsets = charsets_of(dataset)
        written = []
        for key, element in list(dataset.items()):
            if not key & 0xFFFF:
                continue
            try:
                text = self._element(dataset, element, path, depth, charsets)
            except values.UNREADABLE:
                continue  # the standard has no way to say so
            if text is not None:
                written.append(f'"{key:08X}":{text}')
                self._left -= len(written[-1])
                if self._left < 0:
                    raise _TooLargeError
        return "{" + ",".join(written) + "}"

    def _element(
        self, dataset: Dataset, element: Element, path: str, depth: int, charsets: Charsets
    ) -> str | None:
        tag = int(element.tag)
        dictionary_vr, _ = dictionary(tag)
        vr = vr_of(dataset, element, dictionary_vr)
        if tag in PIXELS or (vr in values.BINARY_VRS and _is_long(element)):
            if " or " in vr:  # only where VRs are implicit
                vr = "OB" if _is_encapsulated(element) else "OW"
            return f'{{"vr":"{vr}","BulkDataURI":"{path}{tag:08X}"}}'
        if _is_unread(element):
            element = self._read_now(dataset, cast(RawDataElement, element), vr)
        if vr != "SQ":
            return value_of(dataset, element, dictionary_vr, charsets).json
        items = [
            self.data_set(item, f"{path}{tag:08X}/{number}/", depth + 1)
            for number, item in enumerate(items_of(dataset, element))
        ]
        return f'{{"vr":"SQ","Value":[{",".join(items)}]}}'

    def _read_now(self, dataset: Dataset, element: RawDataElement, vr: str) -> Element:
        self._file.seek(element.value_tell)
        try:
            if vr != "SQ":
                return element._replace(value=self._file.read(element.length))
            sequence = read_sequence(
                self._file,
                element.is_implicit_VR,
                element.is_little_endian,
                element.length,
                dataset.original_character_set,
            )
        except values.UNREADABLE as error:
            raise _TooLargeError from error
        dataset[element.tag] = DataElement(element.tag, "SQ", sequence)
        return dataset[element.tag]


def _is_unread(element: Element) -> bool:
    return isinstance(element, RawDataElement) and element.value is None and element.length > 0


def _is_encapsulated(element: Element) -> bool:
    return isinstance(element, RawDataElement) and element.length == UNDEFINED_LENGTH


def _is_long(element: Element) -> bool:
    """Whether a binary value is given by URI."""
    if int(element.tag) in PALETTES:
        return False
    length = element.length if _is_unread(element) else len(element.value or b"")  # type: ignore
    return bool(length > values.INLINE_LIMIT)
