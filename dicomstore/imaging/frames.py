"""The frames of a stored instance: which bytes one is, and how it is decoded; knows no Redis."""

from __future__ import annotations

import dataclasses
import functools
import math
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.pixels import convert_color_space
from pydicom.uid import UID, ImplicitVRLittleEndian

from dicomstore.errors import FrameError
from dicomstore.imaging import codecs, values
from dicomstore.imaging.locating import ITEM, Offsets, Span, unpacked

EMPTY_TABLE = ITEM + bytes(4)  # a Basic Offset Table without offsets (PS3.5 A.4)
#: No compressed frame is decoded that takes more bytes: a few can claim as many as they like.
LARGEST_FRAME = 1024**3
#: Of what a decoder says, in characters.
LONGEST_REASON = 200
#: What pydicom calls the attributes that it decodes by.
OPTIONS = {
    "Rows": "rows",
    "Columns": "columns",
    "SamplesPerPixel": "samples_per_pixel",
    "BitsAllocated": "bits_allocated",
    "BitsStored": "bits_stored",
    "PixelRepresentation": "pixel_representation",
    "PhotometricInterpretation": "photometric_interpretation",
    "PlanarConfiguration": "planar_configuration",
}


@dataclasses.dataclass(frozen=True)
class Frames:
    """The frames of one stored instance.

    Parameters
    ----------
    name : str
        The file as errors name it.
    member : mapping or None
        The document's, as :func:`locating.locate` made it.
    attributes : mapping
        The document's ``header``.
    syntax : str or None
        Its transfer syntax UID; None is Implicit VR Little Endian.
    table : bytes, optional
        What :func:`locating.locate` made beside it; see `needs_table`.
    """

    name: str
    member: Mapping[str, Any] | None
    attributes: Mapping[str, Any]
    syntax: str | None = None
    table: bytes | None = None

    @staticmethod
    def needs_table(member: Mapping[str, Any] | None) -> bool:
        """Whether frames can be found only with the table that lies beside the chunks."""
        return member is not None and "span" in member and member["count"] > 1

    @property
    def count(self) -> int:
        """How many they are; 0 where they cannot be found."""
        return int(self.member.get("count", 0)) if self.member else 0

    def span(self, k: int) -> Span:
        """Return the bytes of the file that hold frame `k`, from 0; `stored` takes them.

        Raises
        ------
        FrameError
            If there is no such frame, or it cannot be told from the others.
        """
        if self.member is None:
            raise FrameError(f"{self.name} has no pixel data, hence no frames.")
        if "fault" in self.member:
            raise FrameError(
                f"The frames of {self.name} cannot be found: {self.member['fault']}. "
                "Read the whole file instead."
            )
        if not 0 <= k < self.count:
            raise FrameError(f"{self.name} has no frame {k}: it has {self.count}, counted from 0.")
        if "bits" in self.member:
            first, last = self.member["bits"] * k, self.member["bits"] * (k + 1)
            return Span(self.member["start"] + first // 8, -(-last // 8) - first // 8)
        offset = int(self._offsets[k])
        return Span(offset, int(self._offsets[k + 1]) - offset)

    def stored(self, k: int, fetched: bytes | bytearray | memoryview) -> bytes:
        """Return frame `k` as it is stored, from the bytes at its `span`.

        Fragments are joined. A frame of single bits that begins within a byte is moved to its
        first bit.

        Raises
        ------
        FrameError
            If these are not the bytes of a frame.
        """
        span, view = self.span(k), memoryview(fetched)
        assert self.member is not None
        if len(view) != span.length:
            raise FrameError(f"Frame {k} of {self.name} has {span.length} bytes, not {len(view)}.")
        if "bits" not in self.member:
            return self._joined(k, view)
        bits = self.member["bits"]
        if bits % 8 == 0:
            return bytes(view)
        first = bits * k % 8
        single = np.unpackbits(np.frombuffer(view, np.uint8), bitorder="little")
        return np.packbits(single[first : first + bits], bitorder="little").tobytes()

    def _joined(self, k: int, view: memoryview) -> bytes:
        parts, at = [], 0
        while at < len(view):
            end = at + 8 + int.from_bytes(view[at + 4 : at + 8], "little")
            if view[at : at + 4] != ITEM or end > len(view):
                raise FrameError(f"Frame {k} of {self.name} is not made of fragments.")
            parts.append(view[at + 8 : end])
            at = end
        return b"".join(parts)

    def decode(self, k: int, stored: bytes) -> NDArray[Any]:
        """Return frame `k` decoded, from what `stored` gave.

        Of several threads each may decode a frame. pydicom may warn: the caller silences it, once
        for all threads.

        Returns
        -------
        numpy.ndarray
            Of shape (rows, columns) or (rows, columns, samples), YBR as RGB. Rescale is not
            applied.

        Raises
        ------
        FrameError
            If there is no decoder, or the bytes are damaged.
        """
        member = self.member or {}
        syntax = UID(self.syntax or ImplicitVRLittleEndian)
        options: dict[str, Any] = {
            option: self.attributes[keyword]
            for keyword, option in OPTIONS.items()
            if keyword in self.attributes
        }
        options["number_of_frames"] = 1
        options["pixel_keyword"] = member.get("keyword", "PixelData")
        options["pixel_vr"] = member.get("vr", "OW")
        source = stored
        if "bits" not in member:
            size = _decoded_size(options)
            if size > LARGEST_FRAME:
                raise FrameError(
                    f"Frame {k} of {self.name} would take {size // 2**20:,} MiB decoded, more than "
                    f"the {LARGEST_FRAME // 2**20:,} MiB that are allowed. Take its bytes with "
                    "frame_bytes."
                )
            source = b"".join((EMPTY_TABLE, ITEM, struct.pack("<L", len(stored)), stored))
        try:
            decoder, plugin = codecs.decoder_for(syntax)
            decoded, _ = decoder.as_array(
                source, index=0, raw=True, decoding_plugin=plugin, **options
            )
            # A frame's own markers may say other than the header, which counts (PS3.5 8.2.1).
            if self.attributes.get("PhotometricInterpretation") in ("YBR_FULL", "YBR_FULL_422"):
                decoded = convert_color_space(decoded, "YBR_FULL", "RGB")
        except (*values.UNREADABLE, MemoryError) as error:
            reason = " ".join(str(error).split())[:LONGEST_REASON].rstrip(".")
            raise FrameError(f"Frame {k} of {self.name} cannot be decoded: {reason}.") from error
        return decoded

    @functools.cached_property
    def _offsets(self) -> Offsets:
        assert self.member is not None
        count, (first, last) = self.member["count"], self.member["span"]
        if count == 1:
            return np.array([first, last], np.int64)
        lengths = unpacked(self.table or b"", count)
        if len(lengths) != count or lengths.min() < 8 or lengths.sum() != last - first:
            raise FrameError(
                f"The frames of {self.name} cannot be found: their table does not fit its "
                "document. Load the file again with repair=True."
            )
        return np.append(first, first + np.cumsum(lengths))


def _decoded_size(options: Mapping[str, Any]) -> int:
    """Return the bytes of a frame decoded, 0 where the header does not say it: no decoder can."""
    names = ("rows", "columns", "samples_per_pixel", "bits_allocated")
    numbers = [number for name in names if isinstance(number := options.get(name), int)]
    return math.prod(numbers) // 8 if len(numbers) == len(names) else 0
