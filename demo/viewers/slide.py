"""A slide viewer for the notebook: its tiles go from Redis to the browser as they are stored."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple, cast

import imagecodecs
import numpy as np
import tifffile
from numpy.typing import NDArray

from demo.viewers.viewer import Answer, Viewer, module
from dicomstore import DicomStore
from dicomstore.errors import DamagedError, FrameError

#: Of the picture that stands in for the viewer, the longer side at most (pixels).
STILL = 1024
START_OF_IMAGE, END_OF_IMAGE = b"\xff\xd8", b"\xff\xd9"
#: An Adobe segment, which says whether the colours are RGB (0) or YCbCr (1): a TIFF says it outside
#: of the tile, and a browser would take all for YCbCr.
ADOBE = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00"


class Level(NamedTuple):
    """Where the tiles of one level lie, row by row."""

    width: int
    height: int
    tile: tuple[int, int]  # width and height
    offsets: NDArray[np.int64]
    lengths: NDArray[np.int64]
    head: bytes  # what stands before each tile's own bytes, so that it is a JPEG file

    @property
    def columns(self) -> int:
        """How many tiles lie side by side."""
        return -(-self.width // self.tile[0])


class SlideViewer(Viewer):
    """Pans and zooms in one version of a slide.

    Parameters
    ----------
    store : DicomStore
    name : str or pandas.Series
        As for :meth:`DicomStore.open`.

    Raises
    ------
    FrameError
        If its tiles are not JPEG, or it has none.
    """

    _esm = module("slide.js")

    def __init__(self, store: DicomStore, name: Any) -> None:
        start = time.perf_counter()
        self._file = store.open(name)
        self.levels = _levels(self._file)
        about = {
            "levels": [
                {"width": one.width, "height": one.height, "tile": one.tile} for one in self.levels
            ],
            "size": self._file.size,
            "bytes": self._file.bytes_fetched,
            "roundTrips": self._file.round_trips,
            "ms": (time.perf_counter() - start) * 1000,
        }
        super().__init__(about, self._overview())

    def answer(self, asked: Mapping[str, Any]) -> Answer:
        """Return tiles: ``{"ask": [[level, number], ...]}`` gives a JPEG file for each.

        An empty buffer stands for a tile that the slide leaves out.
        """
        places = [(int(level), int(number)) for level, number in asked["ask"]]
        start = time.perf_counter()
        before = self._file.bytes_fetched, self._file.round_trips
        tiles = self.tiles(places)
        message = {
            "places": places,
            "bytes": self._file.bytes_fetched - before[0],
            "roundTrips": self._file.round_trips - before[1],
            "ms": (time.perf_counter() - start) * 1000,
        }
        return message, tiles

    def tiles(self, places: Sequence[tuple[int, int]]) -> list[bytes]:
        """Return tiles by level and number as JPEG files, all in one round trip."""
        spans = [
            (int(self.levels[level].offsets[number]), int(self.levels[level].lengths[number]))
            for level, number in places
        ]
        stored = self._file.read_spans([span for span in spans if span[1]])
        parts = iter(stored)
        return [
            self.levels[level].head + next(parts)[len(START_OF_IMAGE) :] if length else b""
            for (level, _), (_, length) in zip(places, spans, strict=True)
        ]

    def _overview(self) -> NDArray[np.uint8]:
        """Return a picture of the whole slide, from the tiles of its last level."""
        last = len(self.levels) - 1
        level = self.levels[last]
        columns, (width, height) = level.columns, level.tile
        rows = -(-level.height // height)
        picture = np.full((rows * height, columns * width, 3), 255, np.uint8)
        tiles = self.tiles([(last, number) for number in range(rows * columns)])
        for number, tile in enumerate(tiles):
            if tile:
                y, x = number // columns * height, number % columns * width
                picture[y : y + height, x : x + width] = imagecodecs.jpeg8_decode(tile)
        step = max(1, -(-max(level.width, level.height) // STILL))
        return np.ascontiguousarray(picture[: level.height : step, : level.width : step])


def _levels(file: Any) -> list[Level]:
    """Return the levels of a slide, the finest first."""
    try:
        with tifffile.TiffFile(cast(BinaryIO, file), name=file.name) as tiff:
            pages = [level.pages[0] for level in tiff.series[0].levels]
            levels = [_level(cast(Any, page), file.name) for page in pages]
    except (tifffile.TiffFileError, IndexError) as error:
        raise FrameError(f"{file.name} has no tiles to look at: it is not a slide.") from error
    for level in levels:
        if np.any(level.offsets < 0) or np.any(level.offsets + level.lengths > file.size):
            raise DamagedError(f"{file.name} is damaged: it has tiles beyond its end.")
    return levels


def _level(page: Any, name: str) -> Level:
    if not page.is_tiled or page.compression != tifffile.COMPRESSION.JPEG:
        raise FrameError(
            f"{name} has no JPEG tiles, which browsers can show: open it with tiffslide."
        )
    transform = 0 if page.photometric == tifffile.PHOTOMETRIC.RGB else 1
    tables = (page.jpegtables or START_OF_IMAGE + END_OF_IMAGE)[2:-2]
    return Level(
        page.imagewidth,
        page.imagelength,
        (page.tilewidth, page.tilelength),
        np.array(page.dataoffsets, np.int64),
        np.array(page.databytecounts, np.int64),
        START_OF_IMAGE + ADOBE + bytes([transform]) + tables,
    )
