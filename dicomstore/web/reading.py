"""What takes the processor or reads a file through the store: done in threads."""

from __future__ import annotations

import io
import json
import re
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np
import pydicom
from PIL import Image

from dicomstore.errors import NotDicomError
from dicomstore.imaging import header, rendering
from dicomstore.store import DicomStore
from dicomstore.web.fetching import Stored
from dicomstore.web.inflating import plain

IMAGES = {"image/jpeg": "JPEG", "image/png": "PNG"}
#: Rows or columns of an image that is made.
LONGEST_SIDE = 4096
FUNCTIONS = {"linear": "LINEAR", "linear-exact": "LINEAR_EXACT", "sigmoid": "SIGMOID"}


class NotShownError(ValueError):
    """An image cannot be made; `is_absent` if there is none."""

    def __init__(self, words: str, *, is_absent: bool) -> None:
        super().__init__(words)
        self.is_absent = is_absent


class Shown(NamedTuple):
    """How an image is to be shown (PS3.18 8.3.5)."""

    window: tuple[float, float, str] | None = None
    size: tuple[int, int] | None = None
    region: tuple[float, ...] | None = None
    quality: int = 90

    @classmethod
    def of(cls, parameters: dict[str, str], size: tuple[int, int] | None) -> Shown:
        """Return what the parameters of a query say.

        Raises
        ------
        ValueError
            If they are not those of the standard.
        """
        window, region, quality = None, None, 90
        if text := parameters.get("window"):
            parts = text.split(",")
            number = r"-?\d{1,12}(\.\d{1,12})?"
            if len(parts) not in (2, 3) or not all(re.fullmatch(number, p) for p in parts[:2]):
                raise ValueError("window is a centre, a width and a function.")
            function = FUNCTIONS.get(parts[2] if len(parts) == 3 else "linear")
            if function is None or not float(parts[1]) >= (1 if function == "LINEAR" else 1e-12):
                raise ValueError("window: the width or the function is none of the standard.")
            window = float(parts[0]), float(parts[1]), function
        if text := parameters.get("viewport"):
            if not re.fullmatch(r"\d{1,4},\d{1,4}(,-?\d{0,6}(\.\d*)?){0,4}", text):
                raise ValueError("viewport is a width and a height, and a part of the image.")
            numbers = text.split(",")
            size = int(numbers[0]), int(numbers[1])
            if not all(1 <= side <= LONGEST_SIDE for side in size):
                raise ValueError(f"viewport: each side is 1 to {LONGEST_SIDE}.")
            if len(numbers) == 6 and all(numbers[2:]):
                region = tuple(map(float, numbers[2:]))
            elif len(numbers) > 2:
                raise ValueError("viewport: give all four numbers of a part of the image.")
        if text := parameters.get("quality"):
            if not re.fullmatch(r"\d{1,3}", text) or not 1 <= int(text) <= 100:
                raise ValueError("quality is 1 to 100.")
            quality = int(text)
        return cls(window, size, region, quality)


def image(store: DicomStore, key: str, k: int, kind: str, shown: Shown) -> bytes:
    """Return frame `k`, from 0, as an image file.

    Raises
    ------
    NotShownError
        If there is none, or it cannot be decoded.
    """
    with store.open(key) as stored:
        if header.dataset_start(cast(BinaryIO, stored)) is None:
            raise NotShownError("A slide is not shown here.", is_absent=False)
        file = plain(cast(BinaryIO, stored))
        syntax = header.dataset_syntax(file)
        try:
            array = rendering.render_file(file, k, syntax, longest=10**9, window=shown.window)
        except (AttributeError, KeyError) as error:
            raise NotShownError("The instance has no pixels.", is_absent=True) from error
        except (ValueError, RuntimeError, NotImplementedError, TypeError) as error:
            raise NotShownError("The frame cannot be shown.", is_absent=False) from error
    return _encoded(array, kind, shown)


def _encoded(array: Any, kind: str, shown: Shown) -> bytes:
    picture = Image.fromarray(array)
    if shown.region is not None:
        x, y, width, height = shown.region
        box = (x, y, x + abs(width), y + abs(height))
        picture = picture.crop(tuple(round(side) for side in box))  # type: ignore[arg-type]
        if width < 0:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if height < 0:
            picture = picture.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    if shown.size is not None:
        scale = min(shown.size[0] / picture.width, shown.size[1] / picture.height)
        sides = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        picture = picture.resize(sides)
    buffer = io.BytesIO()
    options = {"quality": shown.quality} if kind == "image/jpeg" else {}
    picture.save(buffer, IMAGES[kind], **options)
    return buffer.getvalue()


def decoded(stored: Stored, k: int, raw: bytes) -> bytes:
    """Return a frame's samples as they are in Explicit VR Little Endian."""
    array = stored.frames.decode(k, raw)
    little = array.dtype.newbyteorder("<")
    return np.ascontiguousarray(array.astype(little, copy=False)).tobytes()


def bulk(store: DicomStore, key: str, where: str, most: int) -> bytes | None:
    """Return the value at ``tag``, or ``tag/item/tag``, of a file; None if there is none.

    Raises
    ------
    ValueError
        If it is longer than `most` bytes.
    """
    steps = where.split("/")
    with store.open(key) as stored:
        start = header.dataset_start(cast(BinaryIO, stored))
        if start is None:
            raise NotDicomError("A slide has no bulk data.")
        file = plain(cast(BinaryIO, stored))
        file.seek(0 if start == 132 else start)
        top = int(steps[0], 16)
        dataset = pydicom.dcmread(file, force=True, specific_tags=[top], stop_before_pixels=False)
        for tag, number in zip(steps[::2], [*steps[1::2], None], strict=True):
            if int(tag, 16) not in dataset:
                return None
            element = dataset[int(tag, 16)]
            if number is not None:
                if element.VR != "SQ" or int(number) >= len(element.value):
                    return None
                dataset = element.value[int(number)]
        value = element.value
        return value if isinstance(value, bytes) and len(value) <= most else None


def dumped(found: list[dict[str, Any]]) -> bytes:
    """Return data sets as JSON text."""
    return json.dumps(found, ensure_ascii=False, separators=(",", ":")).encode(errors="replace")
