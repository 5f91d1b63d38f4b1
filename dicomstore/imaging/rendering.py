"""One frame as a radiologist expects to see it; knows DICOM's pixels, not Redis."""

from __future__ import annotations

import io
import warnings
from typing import Any, BinaryIO

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.pixels import apply_color_lut, apply_modality_lut, apply_voi_lut, pixel_array
from pydicom.uid import UID, ImplicitVRLittleEndian, RLELossless

from dicomstore.imaging import header

#: Without a window in the header, grey runs between these percentiles of the frame.
GREY_PERCENTILES = (1.0, 99.0)


def read_dataset(image: bytes | bytearray | memoryview) -> Dataset:
    """Return the data set of a DICOM file's bytes, also of one without preamble or file meta."""
    file = io.BytesIO(image)
    start = header.dataset_start(file)
    if start is None:
        raise ValueError("These bytes are not a DICOM file.")
    file.seek(0 if start == 132 else start)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they quote values, which may be a patient's
        dataset = pydicom.dcmread(io.BytesIO(file.read()), force=True)
    if "TransferSyntaxUID" not in dataset.file_meta:
        dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
    return dataset


def render(dataset: Dataset, frame: int = 0) -> NDArray[np.uint8]:
    """Return one frame, decompressed and windowed.

    Grey values go through the modality LUT and the first VOI window or LUT (PS3.3 C.11.1, C.11.2);
    MONOCHROME1 is inverted (PS3.3 C.7.6.3.1.2); palettes and YBR become RGB.

    Parameters
    ----------
    dataset : pydicom.Dataset
        With its pixel data, or with what can still read it.
    frame : int, optional
        From 0.

    Returns
    -------
    numpy.ndarray
        uint8, of shape (rows, columns) or (rows, columns, 3).

    Raises
    ------
    AttributeError, ValueError, RuntimeError, ...
        What pydicom raises for a data set without pixels or with pixels it cannot decode.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as above
        return _shown(pixel_array(dataset, index=frame), dataset)


def render_file(file: BinaryIO, frame: int, syntax: str, *, longest: int) -> NDArray[np.uint8]:
    """Return one frame of a file as :func:`render` does, reading and decoding no other.

    Parameters
    ----------
    file : binary file, seekable
        Its data set is not deflated.
    frame : int
        From 0.
    syntax : str
        Its transfer syntax UID.
    longest : int
        Of more rows or columns than twice this, only every second, third, ... is used.

    Raises
    ------
    AttributeError, ValueError, RuntimeError, ...
        As for :func:`render`.
    """
    dataset = Dataset()
    # pylibjpeg-rle panics at broken data, with an exception that is no Exception.
    plugin = "pydicom" if syntax == RLELossless else ""
    array = pixel_array(
        file,
        ds_out=dataset,
        index=frame,
        transfer_syntax_uid=UID(syntax),
        decoding_plugin=plugin,
    )
    step = max(1, max(array.shape[:2]) // longest)
    return _shown(array[::step, ::step], dataset)


def _shown(array: NDArray[Any], dataset: Dataset) -> NDArray[np.uint8]:
    if dataset.PhotometricInterpretation == "PALETTE COLOR":
        array = apply_color_lut(array, dataset)
    if array.ndim == 3:
        return _colour(array, dataset)
    return _grey(array, dataset)


def _colour(array: NDArray[Any], dataset: Dataset) -> NDArray[np.uint8]:
    bits = 16 if dataset.PhotometricInterpretation == "PALETTE COLOR" else dataset.BitsStored
    eight_bits: NDArray[np.uint8] = (array >> max(0, int(bits) - 8)).astype(np.uint8)
    return eight_bits


def _grey(array: NDArray[Any], dataset: Dataset) -> NDArray[np.uint8]:
    values = apply_modality_lut(array, dataset)
    if "WindowCenter" in dataset or "VOILUTSequence" in dataset:
        # The same function says what its darkest and its brightest output are.
        extremes = np.array([np.iinfo(np.int32).min, np.iinfo(np.int32).max], dtype=np.int64)
        shown = apply_voi_lut(values, dataset).astype(np.float64)
        low, high = apply_voi_lut(extremes, dataset).astype(np.float64)
        grey = np.clip((shown - low) / ((high - low) or 1.0), 0.0, 1.0)
    else:
        grey = stretched(values.astype(np.float64)) / 255
    if dataset.PhotometricInterpretation == "MONOCHROME1":
        grey = 1.0 - grey
    levels: NDArray[np.uint8] = np.rint(grey * 255).astype(np.uint8)
    return levels


def stretched(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return `values` as grey levels, 0.0 to 255.0, between their ``GREY_PERCENTILES``."""
    low, high = np.percentile(values, GREY_PERCENTILES)
    levels: NDArray[np.float64] = np.clip((values - low) / ((high - low) or 1.0), 0.0, 1.0) * 255
    return levels


def aspect(dataset: Dataset) -> float:
    """Return a pixel's height over its width (PS3.3 C.7.6.3.1.7, C.8.11.3 and 10.7.1.3)."""
    for keyword in ("PixelSpacing", "ImagerPixelSpacing", "PixelAspectRatio"):
        spacing = dataset.get(keyword)
        if spacing and len(spacing) == 2 and min(map(float, spacing)) > 0:
            return float(spacing[0]) / float(spacing[1])
    return 1.0


def caption(dataset: Dataset) -> str:
    """Return modality, size, frames and transfer syntax in two lines; nothing about the patient."""
    size = f"{dataset.get('Rows', '?')} × {dataset.get('Columns', '?')}"
    frames = int(dataset.get("NumberOfFrames") or 1)
    many = f", {frames} frames" if frames > 1 else ""
    name = dataset.file_meta.TransferSyntaxUID.name.replace(" Image Compression", "")
    syntax = name.replace("(Lossless Only)", "Lossless").split(",")[0].split(" (")[0]
    return f"{dataset.get('Modality', '?')}, {size}{many}\n{syntax}"
