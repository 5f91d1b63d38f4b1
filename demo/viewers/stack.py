"""A stack viewer for the notebook: the slices of a series, or the frames of one instance."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.pixels import apply_color_lut

from demo.viewers.viewer import Answer, Viewer, module
from dicomstore import DicomStore
from dicomstore.errors import MissingChunkError, VolumeError
from dicomstore.imaging import rendering
from dicomstore.imaging.volume import Volume

#: Windows for CT in Hounsfield units: centre and width.
CT_WINDOWS = {
    "soft tissue": (40, 400),
    "lung": (-600, 1500),
    "bone": (400, 1800),
    "brain": (40, 80),
}
#: Frames a second, where the instance does not say.
RATE = 25.0
#: What JavaScript has typed arrays of, and a canvas can be drawn from.
SENT_AS_IT_IS = ("uint8", "int8", "uint16", "int16", "float32")
#: Without a window of the instance's own, it lies between these percentiles of the values.
PERCENTILES = (1, 99)


class StackViewer(Viewer):
    """Scrolls through a stack; the browser keeps what was sent and windows it.

    Parameters
    ----------
    stack : SeriesStack or FrameStack
    """

    _esm = module("stack.js")

    def __init__(self, stack: SeriesStack | FrameStack) -> None:
        self._stack = stack
        middle = stack.count // 2
        (picture,) = stack.pictures([middle])
        windows = _windows(stack.header, picture, stack.rescale)
        about = {
            "count": stack.count,
            "first": middle,
            "rows": picture.shape[0],
            "columns": picture.shape[1],
            "samples": picture.shape[2] if picture.ndim == 3 else 1,
            "type": picture.dtype.name,
            "rescale": stack.rescale,
            "windows": windows,
            "inverse": _is_inverse(stack.header),
            "aspect": rendering.aspect(stack.header),
            "rate": _rate(stack.header),
            "what": stack.what,
            "cost": stack.cost,
        }
        super().__init__(about, _still(picture, about))

    def answer(self, asked: Mapping[str, Any]) -> Answer:
        """Return slices: ``{"ask": [0, 1]}`` gives one buffer for each, raw, little-endian."""
        numbers = [int(number) for number in asked["ask"]]
        start, trips = time.perf_counter(), self._stack.round_trips
        pictures = self._stack.pictures(numbers)
        message = {
            "numbers": numbers,
            "roundTrips": self._stack.round_trips - trips,
            "ms": (time.perf_counter() - start) * 1000,
        }
        return message, [picture.data for picture in pictures]


class SeriesStack:
    """The slices of a series, read at once as a volume: what is shown stays this version.

    Parameters
    ----------
    volume : Volume
    header : pydicom.Dataset
        Of one of its instances.
    seconds : float
        How long it took to read.
    """

    what = "slice"
    rescale = (1.0, 0.0)
    round_trips = 0  # no more of them, once it is read

    def __init__(self, volume: Volume, header: Dataset, seconds: float) -> None:
        self.header = header
        self.count = len(volume.array)
        self.cost = f"{volume.array.nbytes / 1e6:.0f} MB from Redis in {seconds * 1000:.0f} ms"
        self._array = volume.array

    def pictures(self, numbers: Sequence[int]) -> list[NDArray[Any]]:
        """Return slices, with Rescale applied."""
        return [_sendable(self._array[number]) for number in numbers]


class FrameStack:
    """The frames of one version of an instance, fetched when they are asked for.

    Parameters
    ----------
    store : DicomStore
    name : str
    """

    what = "frame"
    cost = ""

    def __init__(self, store: DicomStore, name: Any) -> None:
        manifest = store.manifest(name)
        self._store, self._key, self._version = store, manifest.key, manifest.version
        self.header = store.header(manifest.key)
        self.count = int(self.header.get("NumberOfFrames") or 1)
        self.round_trips = 0
        slope = self.header.get("RescaleSlope")
        self.rescale = (float(slope or 1), float(self.header.get("RescaleIntercept") or 0))

    def pictures(self, numbers: Sequence[int]) -> list[NDArray[Any]]:
        """Return frames decoded, colours as RGB of 8 bits, no rescale applied.

        Raises
        ------
        MissingChunkError
            If the instance was replaced since the stack was made.
        """
        try:
            frames = self._store.frame(self._key, list(numbers))
        finally:
            # Asked afterwards: a version that is still there was there when the frames were read.
            self._check_version()
        self.round_trips += 2
        return [_sendable(_coloured(frame, self.header)) for frame in frames]

    def _check_version(self) -> None:
        if self._store.manifest(self._key).version != self._version:
            raise MissingChunkError(
                f"{self._key} was replaced since it was opened. Open it again to see the new one."
            )


def open_stack(store: DicomStore, names: Any = None, **conditions: Any) -> StackViewer:
    """Return a viewer of a series' slices, or of the frames of what is no series in space.

    Parameters
    ----------
    store : DicomStore
    names : str, sequence of str, or pandas.DataFrame, optional
        As for :meth:`DicomStore.volume`.
    **conditions
        As for :meth:`DicomStore.find`, in place of `names`.

    Raises
    ------
    VolumeError
        If several instances do not form one volume; it says which files are in the way.
    """
    if names is None:
        names = store.find(**conditions)
    single = [names] if isinstance(names, str | pd.Series) else names
    start = time.perf_counter()
    try:
        volume = store.volume(single)
    except VolumeError:
        if len(single) != 1:
            raise
        # One instance without a place in space: a cine, an ultrasound, a photograph.
        only = single.iloc[0] if isinstance(single, pd.DataFrame) else single[0]
        return StackViewer(FrameStack(store, only))
    seconds = time.perf_counter() - start
    middle = store.header(volume.paths[len(volume.paths) // 2])
    return StackViewer(SeriesStack(volume, middle, seconds))


def _sendable(picture: NDArray[Any]) -> NDArray[Any]:
    """Return a picture in one piece, of a type that JavaScript knows, little-endian."""
    kind = picture.dtype.newbyteorder("<") if picture.dtype.name in SENT_AS_IT_IS else "<f4"
    return np.ascontiguousarray(picture, kind)


def _coloured(frame: NDArray[Any], header: Dataset) -> NDArray[Any]:
    """Return a frame in colours with 8 bits a sample; a grey one as it is."""
    bits = int(header.get("BitsStored", 8))
    if header.get("PhotometricInterpretation") == "PALETTE COLOR":
        frame = apply_color_lut(frame, header)
        bits = 8 * frame.itemsize
    if frame.ndim == 3 and bits > 8:
        return (frame >> (bits - 8)).astype(np.uint8)
    return frame


def _windows(
    header: Dataset, picture: NDArray[Any], rescale: tuple[float, float]
) -> dict[str, tuple[float, float]]:
    """Return centre and width of each window that is offered, by name, the first one first."""
    values = np.percentile(picture, PERCENTILES) * rescale[0] + rescale[1]
    centres, widths = (
        np.ravel(header.get(keyword) or []).astype(float)
        for keyword in ("WindowCenter", "WindowWidth")
    )
    windows = {"whole range": (float(values.mean()), max(1.0, float(np.ptp(values))))}
    if len(centres) and len(widths) and widths[0] >= 1:
        windows = {"as stored": (float(centres[0]), float(widths[0])), **windows}
    return windows | (CT_WINDOWS if header.get("Modality") == "CT" else {})


def _is_inverse(header: Dataset) -> bool:
    """Whether low values are bright (PS3.3 C.7.6.3.1.2)."""
    return bool(header.get("PhotometricInterpretation") == "MONOCHROME1")


def _rate(header: Dataset) -> float:
    """Return how many frames a second are meant to be shown."""
    if rate := header.get("RecommendedDisplayFrameRate") or header.get("CineRate"):
        return float(rate)
    frame_ms = header.get("FrameTime")
    return 1000 / float(frame_ms) if frame_ms else RATE


def _still(picture: NDArray[Any], about: Mapping[str, Any]) -> NDArray[np.uint8]:
    """Return a picture as the viewer shows it at first (PS3.3 C.11.2.1.2)."""
    if picture.ndim == 3:
        return np.asarray(picture, np.uint8)
    (slope, intercept), (centre, width) = about["rescale"], next(iter(about["windows"].values()))
    values = picture * slope + intercept
    grey = np.clip((values - (centre - 0.5)) / max(width - 1, 1e-6) + 0.5, 0, 1)
    levels: NDArray[np.float64] = np.rint((1 - grey if about["inverse"] else grey) * 255)
    return levels.astype(np.uint8)
