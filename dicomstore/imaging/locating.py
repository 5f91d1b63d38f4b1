"""Where the frames of an instance lie in its file, found once, while it is loaded; knows no Redis.

The document keeps a few numbers, and one string beside the chunks says where each of several
compressed frames begins. So any frame can be fetched and decoded without the others.
"""

from __future__ import annotations

import struct
import zlib
from array import array
from collections.abc import Mapping
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)
from pydicom.valuerep import EXPLICIT_VR_LENGTH_32

from dicomstore.errors import FrameError
from dicomstore.imaging import header
from dicomstore.imaging.codecs import END_OF_IMAGE

#: No more data elements and items are stepped over than this, nor more fragments counted.
ELEMENTS_LIMIT = 4_000_000
FRAGMENTS_LIMIT = 1_000_000
NATIVE = (ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian)
PIXELS = {
    0x7FE00008: "FloatPixelData",
    0x7FE00009: "DoubleFloatPixelData",
    0x7FE00010: "PixelData",
}
EXTENDED_OFFSETS, EXTENDED_LENGTHS = 0x7FE00001, 0x7FE00002
UNDEFINED = 0xFFFFFFFF  # as a length (PS3.5 7.1.1)
ITEM, DELIMITER = b"\xfe\xff\x00\xe0", b"\xfe\xff\xdd\xe0"
#: So near to a fragment's end it is looked for: padding may follow it.
END_BYTES = 10
LONG_VRS = frozenset(vr.encode() for vr in EXPLICIT_VR_LENGTH_32)
Offsets = NDArray[np.int64]


class Span(NamedTuple):
    """A range of a file's bytes."""

    offset: int
    length: int


def locate(
    file: BinaryIO, members: Mapping[str, Any], elements: header.Elements | None = None
) -> tuple[dict[str, Any] | None, bytes | None]:
    """Find where the frames of a DICOM file lie, reading none of them.

    Parameters
    ----------
    file : binary file, seekable
        Its position is not kept.
    members : mapping
        What :func:`header.searchable` says of it.
    elements : header.Elements, optional
        What :func:`header.read` has read of it: the search begins behind that.

    Returns
    -------
    member : dict or None
        For the document; None if the file has no pixel data. With native pixel data ``count``,
        ``start`` (where frame 0 begins) and ``bits`` (a frame's length); with encapsulated pixel
        data ``count`` and ``span`` (where its first fragment begins and its last one ends).
        Where frames cannot be told apart there is only ``fault``, which says why.
    table : bytes or None
        Where each of several encapsulated frames begins; None if ``member`` says it all.
    """
    try:
        return _located(file, members.get("header", {}), elements)
    except FrameError as error:
        return {"fault": str(error)}, None


class _Pixels(NamedTuple):
    """A pixel data element: `start` and `length` are its value's, `tables` the Extended ones'."""

    keyword: str
    vr: bytes
    start: int
    length: int
    tables: dict[int, Span]


def _located(
    file: BinaryIO, attributes: Mapping[str, Any], elements: header.Elements | None
) -> tuple[dict[str, Any] | None, bytes | None]:
    if elements is None or not elements.whole:
        syntax = header.dataset_syntax(file)
        start = file.tell()
        # Some files have the other one of both encodings than they say; pydicom looks as well.
        has_vrs = file.read(6)[4:].isalpha()
        file.seek(start)
    else:
        syntax, has_vrs = elements.syntax, not elements.dataset.original_encoding[0]
        file.seek(elements.position)
    if syntax == DeflatedExplicitVRLittleEndian:
        return ({"fault": "its data set is deflated"} if "Rows" in attributes else None), None
    pixels = _pixels(file, ">" if syntax == ExplicitVRBigEndian else "<", has_vrs)
    if pixels is None:
        return None, None
    count = attributes.get("NumberOfFrames") or 1
    if not isinstance(count, int) or count < 1:
        raise FrameError("its NumberOfFrames is not a count")
    size = file.seek(0, 2)
    if pixels.length != UNDEFINED:
        return _native(pixels, attributes, count, syntax, size), None
    if syntax in NATIVE:
        raise FrameError("its pixel data is encapsulated, its transfer syntax is not")
    offsets = _frame_offsets(file, pixels, count, size)
    member = {"count": count, "span": [int(offsets[0]), int(offsets[-1])]}
    return member, _packed(offsets) if count > 1 else None


def _pixels(file: BinaryIO, order: str, has_vrs: bool) -> _Pixels | None:
    """Return the pixel data of a data set, of which an element begins here; None if it has none."""
    implicit = [not has_vrs]  # for the data set, and each item that is open
    tables: dict[int, Span] = {}
    for _ in range(ELEMENTS_LIMIT):
        head = file.read(8)
        if len(head) < 8:
            if len(implicit) > 1:
                raise FrameError("its data set breaks off")
            return None
        group, number, length = struct.unpack(f"{order}HHL", head)
        if group == 0xFFFE:
            if number != 0xE000:  # a delimiter
                implicit = implicit[:-1] or implicit
            elif length == UNDEFINED:
                implicit.append(implicit[-1])
            else:
                file.seek(length, 1)
            continue
        vr = b"OW" if implicit[-1] else head[4:6]
        if not implicit[-1]:
            wide = vr in LONG_VRS
            raw = file.read(4) if wide else head[6:]
            length = int.from_bytes(raw, "big" if order == ">" else "little")
        tag = group << 16 | number
        if len(implicit) == 1 and tag in PIXELS:
            return _Pixels(PIXELS[tag], vr, file.tell(), length, tables)
        if length == UNDEFINED:
            implicit.append(implicit[-1] or vr == b"UN")  # PS3.5 6.2.2, note 2
            continue
        if len(implicit) == 1 and tag in (EXTENDED_OFFSETS, EXTENDED_LENGTHS):
            tables[tag] = Span(file.tell(), length)
        file.seek(length, 1)
    raise FrameError("its data set has too many elements")


def _native(
    pixels: _Pixels, attributes: Mapping[str, Any], count: int, syntax: str, size: int
) -> dict[str, Any]:
    """Return the member for frames without compression, which follow each other (PS3.5 8.1.1)."""
    if syntax not in NATIVE:
        raise FrameError("its pixel data is not encapsulated, its transfer syntax is")
    bits = attributes.get("SamplesPerPixel", 1)
    for keyword in ("Rows", "Columns", "BitsAllocated"):
        value = attributes.get(keyword)
        if not isinstance(value, int) or not isinstance(bits, int) or value < 1:
            raise FrameError(f"it has no usable {keyword}")
        bits *= value
    if attributes.get("PhotometricInterpretation") == "YBR_FULL_422":
        bits = bits // 3 * 2  # two pixels share one CB and one CR (PS3.3 C.7.6.3.1.2)
    member = {"count": count, "start": pixels.start, "bits": bits}
    if syntax == ExplicitVRBigEndian:
        member["vr"] = pixels.vr.decode("ascii", "replace")
        if pixels.vr == b"OW" and attributes["BitsAllocated"] == 8:
            if bits % 16 and count > 1:
                raise FrameError("its frames begin within words")
            member["bits"] = bits = bits + bits % 16
    if pixels.keyword != "PixelData":
        member["keyword"] = pixels.keyword
    length = min(pixels.length, size - pixels.start)
    if not 0 < bits * count <= 8 * length:
        held = 8 * length // bits if bits > 0 else 0
        raise FrameError(f"its pixel data holds {held} frames, its NumberOfFrames is {count}")
    return member


def _frame_offsets(file: BinaryIO, pixels: _Pixels, count: int, size: int) -> Offsets:
    """Return where the first fragment of each frame begins, and where the last one ends.

    The Extended Offset Table comes first, then the Basic Offset Table, then the fragments
    themselves (PS3.5 A.4). A table is believed only if fragments begin where it says.
    """
    file.seek(pixels.start)
    head = file.read(8)
    length = int.from_bytes(head[4:], "little")
    if head[:4] != ITEM or len(head) < 8 or length % 4:
        raise FrameError("its Basic Offset Table is broken")
    fragments = _fragments(file, pixels.start + 8 + length, size)
    if len(fragments) == 1:
        raise FrameError("its pixel data has no fragment")
    if count == 1:
        offsets = fragments[[0, -1]]
    elif EXTENDED_OFFSETS in pixels.tables:
        starts = _table(file, pixels.tables[EXTENDED_OFFSETS], "<u8", count, "Extended")
        offsets = _checked(starts, fragments, "Extended")
        lengths = pixels.tables.get(EXTENDED_LENGTHS, Span(0, 0))
        stated = _table(file, lengths, "<u8", count, "Extended")
        actual = (np.diff(offsets) - 8).astype(np.uint64)
        if not np.all((stated == actual) | (stated == actual - 1)):  # without padding
            raise FrameError("its Extended Offset Table has wrong lengths")
    elif length:
        starts = _table(file, Span(pixels.start + 8, length), "<u4", count, "Basic")
        offsets = _checked(starts, fragments, "Basic")
    elif len(fragments) == count + 1:
        offsets = fragments
    else:
        offsets = _ends_of_images(file, fragments)
        if len(offsets) != count + 1 or offsets[-1] != fragments[-1]:
            raise FrameError(
                f"it has no offset table, its {len(fragments) - 1} fragments do not show where "
                f"{count} frames end"
            )
    in_each = np.diff(np.searchsorted(fragments, offsets))
    contents = np.diff(offsets) - 8 * in_each
    if not contents.all():
        raise FrameError(f"its frame {int(np.argmin(contents))} is empty")
    return offsets


def _fragments(file: BinaryIO, start: int, size: int) -> Offsets:
    """Return where each fragment begins, and where the last one ends."""
    file.seek(start)
    found = array("q", [start])
    for _ in range(FRAGMENTS_LIMIT + 1):
        head = file.read(8)
        if not head or head[:4] == DELIMITER:
            return np.array(found, np.int64)
        if head[:4] != ITEM or len(head) < 8:
            raise FrameError("its fragments are not in a row")
        length = int.from_bytes(head[4:], "little")
        found.append(found[-1] + 8 + length)
        if found[-1] > size:
            raise FrameError("a fragment ends beyond its file")
        file.seek(length, 1)
    raise FrameError(f"its pixel data has over {FRAGMENTS_LIMIT:,} fragments")


def _table(file: BinaryIO, span: Span, dtype: str, count: int, which: str) -> NDArray[np.uint64]:
    number, rest = divmod(span.length, np.dtype(dtype).itemsize)
    if number != count or rest:
        raise FrameError(f"its {which} Offset Table is not for {count} frames")
    file.seek(span.offset)
    raw = file.read(span.length)
    if len(raw) < span.length:
        raise FrameError(f"its {which} Offset Table breaks off")
    return np.frombuffer(raw, dtype).astype(np.uint64)


def _checked(starts: NDArray[np.uint64], fragments: Offsets, which: str) -> Offsets:
    """Return a table's offsets as those of the file, if fragments begin there, in order."""
    known = (fragments - fragments[0]).astype(np.uint64)
    if starts[0] != 0 or np.any(starts[1:] <= starts[:-1]):
        raise FrameError(f"its {which} Offset Table is not in order")
    if not np.isin(starts, known[:-1]).all():
        raise FrameError(f"its {which} Offset Table points where no fragment begins")
    return np.append(starts.astype(np.int64) + fragments[0], fragments[-1])


def _ends_of_images(file: BinaryIO, fragments: Offsets) -> Offsets:
    """Return where the first fragment begins, and where each one ends that ends an image."""
    ends = [int(fragments[0])]
    for start, end in zip(fragments[:-1].tolist(), fragments[1:].tolist(), strict=True):
        first = max(start + 8, end - END_BYTES)
        file.seek(first)
        if END_OF_IMAGE in file.read(end - first):
            ends.append(end)
    return np.array(ends, np.int64)


def _packed(offsets: Offsets) -> bytes:
    """Return the frames' lengths, compressed: first the lowest bytes of all, then the next ones."""
    planes = np.diff(offsets).astype("<u8").view(np.uint8).reshape(-1, 8).T
    return zlib.compress(planes.tobytes())


def unpacked(table: bytes, count: int) -> Offsets:
    """Return the lengths that `_packed` has compressed, none if these are not so many."""
    try:
        raw = zlib.decompressobj().decompress(table, 8 * count + 1)
        planes = np.frombuffer(raw, np.uint8).reshape(8, count)
    except (ValueError, zlib.error):
        return np.array([], np.int64)
    return np.ascontiguousarray(planes.T).view("<u8").ravel().astype(np.int64)


def is_sound(member: Any, size: int) -> bool:
    """Whether a document's member is of the form that `locate` makes.

    Parameters
    ----------
    member : Any
        None where the document has none.
    size : int
        The file's, in bytes.
    """
    if not isinstance(member, dict):
        return member is None
    if "fault" in member:
        return isinstance(member["fault"], str)
    count = _natural(member.get("count"))
    if "bits" in member:
        start, bits = _natural(member.get("start")), _natural(member["bits"])
        return min(count, bits) > 0 <= start and 8 * start + bits * count <= 8 * size
    span = member.get("span")
    first, last = map(_natural, span) if isinstance(span, list) and len(span) == 2 else (-1, -1)
    return count > 0 <= first and first + 8 * count <= last <= size


def _natural(value: Any) -> int:
    """Return a number from 0 on, -1 for anything else."""
    return value if type(value) is int and value >= 0 else -1
