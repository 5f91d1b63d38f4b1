"""A made-up whole-slide image, for machines that have none: no patient, no scanner.

The slide is a tiled, pyramidal, JPEG-compressed Aperio TIFF that looks like an H&E section.
To paint each of its pixels would take minutes, so its tiles come from an atlas of at most
976. What a tile shows depends on two things only:

- its place in periodic textures of 4 x 4 tiles (fibres, nuclei, gaps), and
- the tissue classes at its four corners, between which the class is interpolated.

Neighbours share two corners and the texture runs on, hence no seams. The lower levels are put
together from shrunken tiles of the atlas, hence they show what level 0 shows.
"""

from __future__ import annotations

import errno
import math
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import imagecodecs
import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image

MINIMUM_SIZE = 1_000_000  # bytes
TOLERANCE = 0.03  # the file is larger or smaller than asked for by at most this share
TILE = 256  # pixels a side
FACTORS = (4, 16, 64)  # downsampling of the lower levels
MAGNIFICATION = 20
MPP = 0.4990  # microns per pixel
JPEG_QUALITY = 88
THUMBNAIL = 512  # pixels, the longer side

_CLASSES = 5  # background, loose stroma, dense stroma, epithelium, lymphocytes
_PERIOD = 4  # tiles
_SHRINKS = (*FACTORS, TILE)  # the last, one pixel a tile, serves the thumbnail of a large slide
_SIDE = _PERIOD * TILE
_KEY = (_CLASSES,) * 4 + (_PERIOD,) * 2  # a tile's key counts its corners' classes and its place
_SEED = 20
_ASPECT = 4 / 3
_TYPICAL_TILE = 18_000  # bytes, the first guess
_WITH_LOWER_LEVELS = 1.09  # bytes of all levels by bytes of level 0, as measured
_THUMBNAIL_BYTES = 75_000  # the same
_CLASSIC_TIFF = 4_000_000_000  # bytes; its offsets have 32 bits, beyond it is BigTIFF
_ENCODE_BUFFER = 8 * 2**20  # bytes of pixels that wait for the encoder
_SUBSAMPLING = (2, 2)

Floats = NDArray[np.float32]
Pixels = NDArray[np.uint8]
Layout = NDArray[np.int64]


class _Tile(NamedTuple):
    jpeg: bytes
    shrunk: list[Pixels]  # one for each of _SHRINKS


Atlas = dict[int, _Tile]


def _wave(rng: np.random.Generator, length: float, stretch: float = 1) -> Floats:
    """Periodic noise of unit variance, of about one wavelength (in pixels)."""
    y, x = np.fft.fftfreq(_SIDE)[:, None], np.fft.rfftfreq(_SIDE)
    band = np.exp(-2 * np.log(np.maximum(np.hypot(x * stretch, y), 1e-9) * length) ** 2)
    white = rng.standard_normal((_SIDE, _SIDE + 2), dtype=np.float32).view(np.complex64)
    noise = np.fft.irfft2(white * band.astype(np.float32), s=(_SIDE, _SIDE))
    return np.asarray(noise / noise.std(), np.float32)


def _nuclei(
    rng: np.random.Generator, spacing: float, jitter: float, radius: float, longer: float
) -> Floats:
    """Nuclei on a jittered grid, darker at the rim; the value is the amount of haematoxylin."""
    count = round(_SIDE / spacing)
    n = count * count
    rows, columns = np.divmod(np.arange(n), count)
    centre = np.stack([rows, columns]) * (_SIDE / count) + rng.normal(0, jitter, (2, n))
    corner = np.floor(centre).astype(np.int32)
    short = radius * rng.uniform(0.75, 1.15, n)
    long = short * (1 + (longer - 1) * rng.uniform(0.4, 1.2, n))
    angle = rng.uniform(0, np.pi, n)
    shade = rng.uniform(0.65, 1.1, n)
    reach = np.arange(-math.ceil(radius * longer * 1.4), math.ceil(radius * longer * 1.4) + 2)
    field = np.zeros((_SIDE, _SIDE), np.float32)
    for i in range(n):
        dy = reach[:, None] + (corner[0, i] - centre[0, i])
        dx = reach + (corner[1, i] - centre[1, i])
        along = dx * math.cos(angle[i]) + dy * math.sin(angle[i])
        across = dy * math.cos(angle[i]) - dx * math.sin(angle[i])
        square = (along / long[i]) ** 2 + (across / short[i]) ** 2
        value = shade[i] * (0.7 + 0.35 * square) * np.clip(2.6 - 2.2 * square, 0, 1)
        where = np.ix_((corner[0, i] + reach) % _SIDE, (corner[1, i] + reach) % _SIDE)
        field[where] = np.maximum(field[where], value)
    return field


@cache
def _textures() -> dict[str, Floats]:
    """Periodic textures of `_SIDE` x `_SIDE` pixels."""
    rng = np.random.default_rng(_SEED)
    rows, columns = np.arange(_SIDE)[:, None], np.arange(_SIDE)
    bend = (55 * _wave(rng, 330) + 9 * _wave(rng, 90)).astype(int)
    sway = (45 * _wave(rng, 330)).astype(int)
    fibres = _wave(rng, 15, 6)[(rows + bend) % _SIDE, (columns + sway) % _SIDE]
    chromatin = 1 + 0.16 * _wave(rng, 5)
    return {
        "outline": 0.22 * _wave(rng, 230) + 0.13 * _wave(rng, 70) + 0.04 * _wave(rng, 18),
        "fibres": fibres,
        "gaps": 0.75 * _wave(rng, 60, 2) + 0.45 * fibres,
        "lumen": _wave(rng, 170) + 0.12 * _wave(rng, 30),
        "spindle": _nuclei(rng, 34, 13, 3.4, 3.2) * chromatin,
        "epithelial": _nuclei(rng, 18.5, 4.2, 6.2, 1.35) * chromatin,
        "lymphocyte": _nuclei(rng, 13.5, 3.2, 5.2, 1.1) * chromatin,
        "grain": rng.standard_normal((_SIDE, _SIDE), dtype=np.float32) + 0.6 * _wave(rng, 6),
    }


@cache
def _palette() -> Pixels:
    """RGB by haematoxylin * 256 + eosin (255: an amount of 2), by the law of Beer and Lambert."""
    amount = np.linspace(0, 2, 256)[:, None]
    haematoxylin, eosin = amount * (1.0, 1.36, 0.62), amount * (0.07, 0.52, 0.27)
    light = np.array((244, 243, 245)) * np.exp(-haematoxylin[:, None] - eosin[None])
    return light.round().astype(np.uint8).reshape(-1, 3)


def _step(x: Floats, at: float, width: float) -> Floats:
    return np.asarray(np.clip((x - at) / width + 0.5, 0, 1), np.float32)


def _paint(key: int) -> _Tile:
    *classes, row, column = (int(n) for n in np.unravel_index(key, _KEY))
    window = np.s_[row * TILE : (row + 1) * TILE, column * TILE : (column + 1) * TILE]
    part = {name: texture[window] for name, texture in _textures().items()}
    ramp = np.stack([np.arange(TILE, 0, -1), np.arange(TILE)]).astype(np.float32) / TILE
    corners = np.array(classes, np.float32).reshape(2, 2)
    tissue = np.asarray(ramp.T @ corners @ ramp, np.float32)
    tissue += np.minimum(2 * tissue, 1) * part["outline"]

    epithelium, lymph = _step(tissue, 2.5, 0.12), _step(tissue, 3.5, 0.3)
    stroma = 1 - epithelium
    lumen = _step(part["lumen"] + 0.6 * (3 - tissue), 1.6, 0.1) * (epithelium - lymph)
    gap = _step(part["gaps"] - 0.7 * tissue, 0.35, 0.25)
    solid = _step(tissue, 0.5, 0.08) * (1 - gap) * (1 - lumen)
    eosin = 0.62 - 0.1 * lymph
    eosin += stroma * (0.17 * np.minimum(tissue, 2) + 0.12 * part["fibres"])
    haematoxylin = 0.03 + 0.16 * epithelium
    haematoxylin += stroma * _step(tissue, 0.9, 0.3) * part["spindle"]
    haematoxylin += (epithelium - lymph) * part["epithelial"] + lymph * part["lymphocyte"]
    stains = haematoxylin * solid, eosin * solid + 0.03 + 0.015 * part["grain"]

    blue, pink = (np.clip(stain * 127.5, 0, 255).astype(np.uint16) for stain in stains)
    pixels = _palette().take(blue * 256 + pink, axis=0)
    image, shrunk = Image.fromarray(pixels), []
    for _ in _SHRINKS:
        image = image.reduce(FACTORS[0])
        shrunk.append(np.asarray(image))
    jpeg = imagecodecs.jpeg8_encode(pixels, level=JPEG_QUALITY, subsampling=_SUBSAMPLING)
    return _Tile(bytes(jpeg), shrunk)


def _smooth(rng: np.random.Generator, shape: tuple[int, int], length: float) -> Floats:
    """Noise over the corners of the tiles, of one value every `length` corners."""
    coarse = [max(2, round(n / length) + 1) for n in shape]
    image = Image.fromarray(rng.standard_normal(coarse, dtype=np.float32))
    return np.asarray(image.resize(shape[::-1], Image.Resampling.BICUBIC))


def _layout(rows: int, columns: int) -> Layout:
    """Key of the tile at each place; `_paint` turns a key into a tile."""
    rng = np.random.default_rng(_SEED)
    shape = rows + 1, columns + 1
    y, x = np.meshgrid(np.linspace(-1, 1, shape[0]), np.linspace(-1, 1, shape[1]), indexing="ij")
    coast = 0.3 * _smooth(rng, shape, rows / 4)
    for length, height in ((14, 0.08), (40, 0.05), (110, 0.03)):
        coast += height * _smooth(rng, shape, rows / length)
    cleft = np.abs(_smooth(rng, shape, rows / 6) + 0.25 * _smooth(rng, shape, rows / 25))
    cleft += np.maximum(0.3 * _smooth(rng, shape, rows / 8), 0)
    inside = (coast > np.hypot(x, y) ** 4 * 0.9 - 0.65) & (cleft > 0.035)
    cells = 2.1 + 0.7 * _smooth(rng, shape, rows / 5)
    for length, height in ((40, 0.4), (16, 0.4), (7, 0.5), (3, 0.4), (1, 0.25)):
        cells += height * _smooth(rng, shape, length)
    classes = np.where(inside, np.clip(cells.round(), 1, _CLASSES - 1), 0).astype(np.int64)
    classes[[0, -1]] = classes[:, [0, -1]] = 0
    # Neighbouring corners differ by one class at most: this bounds the atlas.
    for _ in range(_CLASSES):
        near = np.pad(classes, 1, mode="edge")
        lowest = np.lib.stride_tricks.sliding_window_view(near, (3, 3)).min((2, 3))
        classes = np.minimum(classes, lowest + 1)
    corners = classes[:-1, :-1], classes[:-1, 1:], classes[1:, :-1], classes[1:, 1:]
    place = np.arange(rows)[:, None] % _PERIOD, np.arange(columns) % _PERIOD
    return np.asarray(np.ravel_multi_index((*corners, *place), _KEY), np.int64)


def _plan(size: int) -> tuple[Layout, Atlas, int]:
    """Layout whose file comes near to `size` bytes, its atlas, and the bytes expected."""
    _textures()  # before several threads ask for them at once
    atlas: Atlas = {}
    plans = []
    tiles = size / _TYPICAL_TILE
    for attempt in range(20):
        rows = round(math.sqrt(tiles / _ASPECT)) + attempt % 7 - 3
        layout = _layout(rows, round(tiles / rows))
        keys, counts = (array.tolist() for array in np.unique(layout, return_counts=True))
        missing = [key for key in keys if key not in atlas]
        with ThreadPoolExecutor() as pool:
            atlas.update(zip(missing, pool.map(_paint, missing), strict=True))
        used = sum(len(atlas[key].jpeg) * count for key, count in zip(keys, counts, strict=True))
        expected = round(used * _WITH_LOWER_LEVELS) + _THUMBNAIL_BYTES
        plans.append((abs(expected / size - 1), expected, layout))
        if plans[-1][0] < TOLERANCE / 3:
            break
        tiles = layout.size * size / expected
    _, expected, layout = min(plans, key=lambda plan: plan[0])
    return layout, atlas, expected


def _shrunk(atlas: Atlas, layout: Layout, level: int) -> Pixels:
    """Pixels of a part of the slide, shrunk by `_SHRINKS[level - 1]`."""
    keys, index = np.unique(layout, return_inverse=True)
    parts = np.stack([atlas[key].shrunk[level - 1] for key in keys.tolist()])[index]
    rows, columns, side = parts.shape[:3]
    return parts.swapaxes(1, 2).reshape(rows * side, columns * side, 3)


def _write(
    file: Path,
    layout: Layout,
    atlas: Atlas,
    expected: int,
    progress: Callable[[int, int], object] | None,
) -> None:
    height, width = layout.shape[0] * TILE, layout.shape[1] * TILE

    def level_0() -> Iterator[bytes]:
        written = 0
        for row in layout:
            jpegs = [atlas[key].jpeg for key in row.tolist()]
            yield from jpegs
            written += sum(map(len, jpegs))
            if progress:
                progress(min(written, expected), expected)

    def lower(level: int, factor: int) -> Iterator[Pixels]:
        for y in range(0, layout.shape[0], factor):
            for x in range(0, layout.shape[1], factor):
                yield _shrunk(atlas, layout[y : y + factor, x : x + factor], level)

    heading = "Aperio Image Library v12.0.16\r\n"
    heading += f"{width}x{height} [0,0 {width}x{height}] ({TILE}x{TILE})"
    ending = f"JPEG/YCC Q={JPEG_QUALITY}|AppMag = {MAGNIFICATION}|MPP = {MPP:.4f}"
    ending += "|Title = made-up sample, no patient"
    options: dict[str, Any] = {
        "dtype": np.uint8,
        "photometric": "rgb",  # of the pixels that are handed over; the file's are YCbCr
        "compression": "jpeg",
        "compressionargs": {"level": JPEG_QUALITY},
        "subsampling": _SUBSAMPLING,
        "metadata": None,
        "software": False,
        "maxworkers": os.cpu_count(),
        "buffersize": _ENCODE_BUFFER,
    }
    tiled = options | {"tile": (TILE, TILE)}
    fine = (n for n, shrink in enumerate(_SHRINKS, 1) if width <= 2 * THUMBNAIL * shrink)
    thumbnail = Image.fromarray(_shrunk(atlas, layout, next(fine, len(_SHRINKS))))
    thumbnail.thumbnail((THUMBNAIL, THUMBNAIL))
    # The order of the pages is Aperio's: level 0, thumbnail, lower levels.
    with tifffile.TiffWriter(file, bigtiff=expected > _CLASSIC_TIFF) as tiff:
        text = f"{heading} {ending}"
        tiff.write(level_0(), shape=(height, width, 3), description=text, **tiled)
        text = f"{heading} -> {thumbnail.width}x{thumbnail.height} {ending}"
        tiff.write(np.asarray(thumbnail), rowsperstrip=16, description=text, **options)
        for level, factor in enumerate(FACTORS, 1):
            shape = height // factor, width // factor, 3
            text = f"{heading} -> {shape[1]}x{shape[0]} {ending}"
            tiff.write(lower(level, factor), shape=shape, description=text, **tiled)
    if progress:
        progress(expected, expected)


def write_sample_slide(
    path: str | os.PathLike[str],
    *,
    size: int,
    progress: Callable[[int, int], object] | None = None,
) -> Path:
    """Write a made-up slide that OpenSlide opens as vendor ``aperio``.

    The same size gives the same bytes. An interrupted run leaves no file, and a file that is
    at `path` already is replaced only by a complete one.

    Parameters
    ----------
    path
        The file to write; its folder exists.
    size
        Bytes asked for. The file is larger or smaller by at most 3%.
    progress
        Called now and then with the bytes written and the bytes expected.

    Returns
    -------
    Path
        `path`.

    Raises
    ------
    ValueError
        `size` is below 1 MB.
    OSError
        The folder has no space for the slide (``errno.ENOSPC``), or cannot be written.
    """
    path = Path(path)
    if size < MINIMUM_SIZE:
        raise ValueError(f"{path.name}: {size} bytes are too few, ask for {MINIMUM_SIZE} or more.")
    needed = round(size * (1 + TOLERANCE))
    free = shutil.disk_usage(path.parent).free
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"The sample slide needs {needed / 1e6:.0f} MB in {path.parent.resolve()}, where "
            f"{free / 1e6:.0f} MB are free; ask for a smaller one or another folder.",
        )
    layout, atlas, expected = _plan(size)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        _write(partial, layout, atlas, expected, progress)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path
