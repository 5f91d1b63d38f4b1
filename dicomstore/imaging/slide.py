"""What a whole-slide image says of itself, as members of its document; knows OpenSlide, not Redis.

Beside a DICOM file's document, a slide's has ``vendor``, ``dimensions``, ``levelCount``,
``objectivePower`` and ``micronsPerPixel``.
"""

from __future__ import annotations

import math
import os
from typing import Any

import openslide

#: How the files begin that OpenSlide opens by themselves: TIFF, BigTIFF, and Zeiss CZI.
SLIDE_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+", b"ZISR")

#: The indexed members and their types in RediSearch.
FIELDS = {
    "vendor": "TAG",
    "dimensions": "NUMERIC",
    "levelCount": "NUMERIC",
    "objectivePower": "NUMERIC",
    "micronsPerPixel": "NUMERIC",
}


def describe(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Return the searchable part of a slide's document, or None if the file is no slide.

    Parameters
    ----------
    path : path
        A local file.

    Returns
    -------
    dict or None
        ``vendor`` as OpenSlide names it, ``dimensions`` (width and height of level 0 in pixels),
        ``levelCount``, and where the file says so ``objectivePower`` and ``micronsPerPixel``.
    """
    with open(path, "rb") as file:
        if file.read(4) not in SLIDE_MAGIC:
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
    except openslide.OpenSlideError:  # another TIFF, or a damaged one
        return None
    return {name: value for name, value in members.items() if value is not None}


def _number(text: str | None) -> float | None:
    try:
        number = float(text or "nan")
    except ValueError:
        return None
    return number if math.isfinite(number) else None
