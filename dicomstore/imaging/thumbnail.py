"""The thumbnail of an image: what one frame looks like in 64 numbers; knows pixels, not Redis."""

from __future__ import annotations

import io
import zlib
from collections.abc import Mapping
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian

from dicomstore.imaging import header, rendering, values

#: Rows and columns of a thumbnail. Its 64 small integers take 0.6 kB in RedisJSON. 121 would take
#: 1.5 kB and find no more images of the same series; nor does it help to remove mean and contrast.
SIDE = 8
DIMENSIONS = SIDE * SIDE
#: A frame that takes more memory than this (bytes) once it is decoded gets no thumbnail.
FRAME_LIMIT = 64 * 1024 * 1024
#: A frame is thinned out to about this many rows and columns before it is windowed.
LONGEST_SIDE = 512
#: Luminance of red, green and blue (ITU-R BT.601, as in PS3.3 C.7.6.3.1.2 for YBR).
LUMINANCE = (0.299, 0.587, 0.114)


def is_sound(value: Any) -> bool:
    """Whether a document's member is a thumbnail, as the functions below return it."""
    levels = value if isinstance(value, list) else []
    return len(levels) == DIMENSIONS and all(
        isinstance(level, int) and 0 <= level <= 255 for level in levels
    )


def of_file(file: BinaryIO, members: Mapping[str, Any]) -> list[int] | None:
    """Return the thumbnail of a DICOM file's middle frame; only that frame is decoded.

    Parameters
    ----------
    file : binary file, seekable
        Its position changes.
    members : mapping
        As :func:`header.searchable` returns them.

    Returns
    -------
    list of int, or None
        ``DIMENSIONS`` grey levels, 0 to 255, row by row; None if the file has no pixels, if they
        cannot be decoded, or if a frame is larger than ``FRAME_LIMIT``.
    """
    attributes = members.get("header", {})
    try:
        samples = attributes.get("SamplesPerPixel", 1)
        bits = attributes["Rows"] * attributes["Columns"] * samples * attributes["BitsAllocated"]
        frames = int(attributes.get("NumberOfFrames", 1))
        if not 0 < bits <= 8 * FRAME_LIMIT:
            return None
        with values.quietly():
            syntax = header.dataset_syntax(file)
            if syntax == DeflatedExplicitVRLittleEndian:
                file, syntax = _inflated(file), ExplicitVRLittleEndian
            limit = FRAME_LIMIT + header.READ_LIMIT
            bounded = cast(BinaryIO, header.Bounded(file, limit))
            image = rendering.render_file(bounded, frames // 2, syntax, longest=LONGEST_SIDE)
        return of_array(image)
    except values.UNREADABLE:
        return None


def _inflated(file: BinaryIO) -> BinaryIO:
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    return io.BytesIO(inflater.decompress(file.read(header.READ_LIMIT), FRAME_LIMIT))


def of_array(image: NDArray[Any]) -> list[int]:
    """Return the thumbnail of a picture.

    Parameters
    ----------
    image : numpy.ndarray
        Of shape (rows, columns), or (rows, columns, 3) for RGB. Values of type uint8 are shown
        as they are; others are stretched first, as a frame without a window is.

    Returns
    -------
    list of int
        ``DIMENSIONS`` grey levels, 0 to 255, row by row.

    Raises
    ------
    ValueError
        If `image` has a different shape or type, or values that are not finite.
    """
    image = np.asarray(image)
    grey_or_rgb = image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 3)
    if not grey_or_rgb or not image.size or image.dtype.kind not in "buif":
        raise ValueError(
            f"An array of shape {image.shape} and type {image.dtype} is not a picture. Give "
            "numbers of shape (rows, columns) or (rows, columns, 3)."
        )
    levels = image.astype(np.float64)
    if image.dtype != np.uint8:
        if not np.isfinite(levels).all():
            raise ValueError("The array has values that are not finite. Replace them first.")
        levels = rendering.stretched(levels)
    if levels.ndim == 3:
        levels = levels @ np.array(LUMINANCE)
    for axis in (0, 1):
        levels = _averaged(levels, axis)
    found: list[int] = np.rint(levels).astype(int).ravel().tolist()
    return found


def _averaged(levels: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
    """Return `levels` with ``SIDE`` means along `axis`; fewer values than that are repeated."""
    length = levels.shape[axis]
    starts = np.arange(SIDE) * length // SIDE
    counts = np.maximum(np.diff(starts, append=length), 1)
    sums: NDArray[np.float64] = np.add.reduceat(levels, starts, axis=axis)
    means: NDArray[np.float64] = sums / (counts[:, None] if axis == 0 else counts)
    return means


def distance(squared: float) -> float:
    """Return the root mean square difference in grey levels that a squared distance stands for."""
    return float(np.sqrt(max(squared, 0.0) / DIMENSIONS))
