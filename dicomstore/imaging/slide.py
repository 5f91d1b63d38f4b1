"""What a whole-slide image says about itself, as members of its document; knows OpenSlide.

Besides what every document has, a slide's has ``vendor``, ``dimensions``, ``levelCount``,
``objectivePower`` and ``micronsPerPixel``.
"""

from __future__ import annotations

import math
import os
from typing import Any, BinaryIO

#: The first bytes of files that OpenSlide opens by themselves: TIFF, BigTIFF, and Zeiss CZI.
SLIDE_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+", b"ZISR")

#: The indexed members and their types in RediSearch.
FIELDS = {
    "vendor": "TAG",
    "dimensions": "NUMERIC",
    "levelCount": "NUMERIC",
    "objectivePower": "NUMERIC",
    "micronsPerPixel": "NUMERIC",
}


def begins_like_a_slide(file: BinaryIO) -> bool:
    """Whether OpenSlide may know a file, by its first bytes; its position is not kept."""
    file.seek(0)
    return file.read(4) in SLIDE_MAGIC


def searchable(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Return the searchable part of a slide's document, or None if the file is not a slide.

    OpenSlide is a C library that a damaged file can crash: call this only in a process that may
    end for it.

    Parameters
    ----------
    path : path
        A local file.

    Returns
    -------
    dict or None
        ``vendor`` as OpenSlide names it, ``dimensions`` (width and height of level 0 in pixels),
        ``levelCount``, and ``objectivePower`` and ``micronsPerPixel`` where the file has them.
    """
    import openslide  # here, as only workers need it

    with open(path, "rb") as file:
        if not begins_like_a_slide(file):
            return None
    try:
        with openslide.OpenSlide(path) as slide:
            properties = slide.properties
            members = {
                "vendor": properties[openslide.PROPERTY_NAME_VENDOR],
                "dimensions": list(slide.dimensions),
                "levelCount": slide.level_count,
                "objectivePower": _number(properties.get(openslide.PROPERTY_NAME_OBJECTIVE_POWER)),
                "micronsPerPixel": _number(properties.get(openslide.PROPERTY_NAME_MPP_X)),
            }
    except openslide.OpenSlideError:  # a TIFF of a different kind, or a damaged one
        return None
    return {name: value for name, value in members.items() if value is not None}


def _number(text: str | None) -> float | None:
    try:
        number = float(text or "nan")
    except ValueError:
        return None
    return number if math.isfinite(number) else None
