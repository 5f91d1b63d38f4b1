"""One frame as a radiologist expects to see it; knows DICOM's pixels, not Redis."""

from __future__ import annotations

import io
import math
import re
import struct
import warnings
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.datadict import DicomDictionary
from pydicom.dataset import Dataset
from pydicom.filereader import read_dataset as read_elements
from pydicom.multival import MultiValue
from pydicom.pixels import apply_color_lut, as_pixel_options, convert_color_space
from pydicom.tag import Tag
from pydicom.uid import (
    UID,
    ImplicitVRLittleEndian,
    XRayAngiographicImageStorage,
    XRayRadiofluoroscopicImageStorage,
)

from dicomstore.imaging import codecs, header

#: Without a window in the header, grey runs between these percentiles of the frame.
GREY_PERCENTILES = (1.0, 99.0)
#: Where attributes of each frame and of all frames may stand (PS3.3 C.7.6.16).
FUNCTIONAL_GROUPS = ("PerFrameFunctionalGroupsSequence", "SharedFunctionalGroupsSequence")
#: Pixel data elements by their tags (PS3.3 C.7.6.3 and C.7.6.24).
PIXEL_DATA = {
    0x7FE00008: "FloatPixelData",
    0x7FE00009: "DoubleFloatPixelData",
    0x7FE00010: "PixelData",
}
#: Of a file's header, a frame needs group 0028 and these.
WANTED_TAGS = [
    *(tag for tag in DicomDictionary if tag >> 16 == 0x0028),
    *map(
        Tag,
        (
            "SOPClassUID",
            "PresentationLUTShape",
            "ExtendedOffsetTable",
            "ExtendedOffsetTableLengths",
            *FUNCTIONAL_GROUPS,
        ),
    ),
]
COLOUR_MODELS = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_PARTIAL_422", "YBR_ICT", "YBR_RCT")
#: Where pixels that are made for display have a modality LUT that leads back to intensities.
ANGIOGRAPHY = (XRayAngiographicImageStorage, XRayRadiofluoroscopicImageStorage)


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

    Grey values go through the modality LUT or rescale (PS3.3 C.11.1), then through the first
    window, or else the first VOI LUT (PS3.3 C.11.2), of the frame's own functional groups, of the
    shared ones (PS3.3 C.7.6.16.2) or of the data set. Without either, they are stretched between
    their percentiles, pixel padding left out (PS3.3 C.7.5.1.1.2). MONOCHROME1 is inverted;
    palettes and YBR become RGB (PS3.3 C.7.6.3.1.2). Overlays are not drawn.

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
    syntax = dataset.file_meta.TransferSyntaxUID
    keyword = next((keyword for keyword in PIXEL_DATA.values() if keyword in dataset), None)
    if keyword is None:
        raise AttributeError("The data set has no pixel data.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as above
        element = dataset[keyword]
        array = _samples(element.value, dataset, frame, syntax, (keyword, element.VR))
        return _shown(array, dataset, frame)


def render_file(
    file: BinaryIO,
    frame: int,
    syntax: str,
    *,
    longest: int,
    window: tuple[float, float, str] | None = None,
) -> NDArray[np.uint8]:
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
    window : (float, float, str), optional
        Centre, width and VOI LUT Function that count instead of the file's.

    Raises
    ------
    AttributeError, ValueError, RuntimeError, ...
        As for :func:`render`.
    """
    uid = UID(syntax)
    header.dataset_syntax(file)  # leaves the file at its data set
    dataset = read_elements(
        file,
        uid.is_implicit_VR,
        uid.is_little_endian,
        stop_when=lambda tag, _vr, _length: tag in PIXEL_DATA,
        specific_tags=WANTED_TAGS,
    )
    implicit_vr, little_endian = dataset.original_encoding  # not always that of the syntax
    element = file.read(8 if implicit_vr else 12)  # tag, VR and length (PS3.5 7.1)
    group, number = struct.unpack("<HH" if little_endian else ">HH", element[:4])
    vr = "OW" if implicit_vr else element[4:6].decode("ascii")
    array = _samples(file, dataset, frame, uid, (PIXEL_DATA[group << 16 | number], vr))
    step = max(1, max(array.shape[:2]) // longest)
    return _shown(array[::step, ::step], dataset, frame, window)


def _samples(
    source: bytes | BinaryIO, dataset: Dataset, frame: int, syntax: UID, element: tuple[str, str]
) -> NDArray[Any]:
    """Return a frame's stored values, of shape (rows, columns) or (rows, columns, samples).

    `source` is the value of the pixel data or a file that is there, `element` keyword and VR.
    """
    image = dataset.group_dataset(0x0028)
    digits = re.findall(r"^\d+", str(image.get("NumberOfFrames")).strip())
    image.NumberOfFrames = int(digits[0]) if digits else 1
    if dataset.get("ExtendedOffsetTable"):
        for keyword in ("ExtendedOffsetTable", "ExtendedOffsetTableLengths"):
            image[keyword] = dataset[keyword]
    if image.PhotometricInterpretation == "YBR_PARTIAL_422":
        image.PhotometricInterpretation = "YBR_FULL_422"  # they differ only in their range
    options = as_pixel_options(
        image,
        pixel_keyword=element[0],
        pixel_vr=element[1],
        correct_unused_bits=False,  # it knows no High Bit
    )
    decoder, plugin = codecs.decoder_for(syntax)
    array, _ = decoder.as_array(
        source,
        index=frame,
        raw=True,
        decoding_plugin=plugin,
        **options,
    )
    allocated, stored = image.BitsAllocated, image.get("BitsStored", image.BitsAllocated)
    if 0 < stored < allocated and array.dtype.kind in "iu":
        # Beside the stored bits, overlays may lie (PS3.5 8.1.1, and its editions before 2004).
        high = stored - 1 if syntax.is_encapsulated else max(image.HighBit, stored - 1)
        array <<= allocated - 1 - high
        array >>= allocated - stored
    return array


def _shown(
    array: NDArray[Any],
    dataset: Dataset,
    frame: int,
    window: tuple[float, float, str] | None = None,
) -> NDArray[np.uint8]:
    if dataset.PhotometricInterpretation == "PALETTE COLOR":
        return _coloured(array, dataset)
    if array.ndim == 3:
        return _colour(array, dataset)
    return _grey(array, dataset, frame, window)


# --- colour --------------------------------------------------------------------------------------


def _colour(array: NDArray[Any], dataset: Dataset) -> NDArray[np.uint8]:
    levels = _eight_bits(array, int(dataset.BitsStored))
    # JPEG's own markers may say other than the header, which counts (PS3.5 8.2.1).
    photometric = dataset.PhotometricInterpretation
    if photometric not in COLOUR_MODELS:
        raise ValueError(f"A frame in the colours {photometric} cannot be shown.")
    if photometric == "YBR_PARTIAL_422":  # luminance from 16 to 235, chrominance from 16 to 240
        full = (levels - [16.0, 128.0, 128.0]) * [255 / 219, 255 / 224, 255 / 224] + [0, 128, 128]
        levels = np.rint(full).clip(0, 255).astype(np.uint8)
    if photometric in ("YBR_FULL", "YBR_FULL_422", "YBR_PARTIAL_422"):
        levels = convert_color_space(levels, "YBR_FULL", "RGB")
    return levels


def _coloured(array: NDArray[Any], dataset: Dataset) -> NDArray[np.uint8]:
    """Return stored values as the colours of their palette (PS3.3 C.7.6.3.1.5 and C.7.9)."""
    channels = []
    for number, colour in enumerate(("Red", "Green", "Blue")):
        descriptor = dataset[f"{colour}PaletteColorLookupTableDescriptor"].value
        data = dataset.get(f"{colour}PaletteColorLookupTableData")
        if data is None:  # segmented: pydicom puts the segments together
            entries, first, _ = descriptor
            every_value = np.arange(first, first + (entries or 2**16))
            data = apply_color_lut(every_value, dataset)[:, number].tolist()
        table = _Table.of(descriptor, data, dataset)
        channels.append(_eight_bits(table.look_up(array), table.bits))
    return np.stack(channels, axis=-1)


def _eight_bits(array: NDArray[Any], bits: int) -> NDArray[np.uint8]:
    if bits < 8:
        array = array.astype(np.uint16) * 255 // (2**bits - 1)
    levels: NDArray[np.uint8] = (array >> max(0, bits - 8)).astype(np.uint8)
    return levels


class _Table(NamedTuple):
    """A lookup table (PS3.3 C.11.1.1): its entries, the value that the first is for, and bits."""

    entries: NDArray[np.uint16]
    first: int
    bits: int

    @classmethod
    def of(cls, descriptor: Any, data: Any, dataset: Dataset) -> _Table:
        """Return the table of a descriptor and its data, words or pairs of bytes."""
        count, first, bits = (int(number) for number in descriptor)
        count = count % 2**16 or 2**16
        order = ">" if dataset.original_encoding[1] is False else "<"
        if isinstance(data, bytes):
            words = np.frombuffer(data[: len(data) // 2 * 2], f"{order}u2")
        else:
            words = np.atleast_1d(np.asarray(data)).astype(np.uint16)
        if len(words) <= (count + 1) // 2:
            words = words.astype("<u2").view(np.uint8).astype(np.uint16)
        entries = words[:count].astype(np.uint16)
        if not entries.size:
            raise ValueError("The lookup table is empty.")
        if dataset.get("PixelRepresentation") and first >= 2**15:
            first -= 2**16  # a descriptor whose VR was taken for US
        return cls(entries, first, max(bits, int(entries.max()).bit_length()))

    def look_up(self, values: NDArray[Any]) -> NDArray[np.uint16]:
        """Return the entry for each value; the first and the last are for those beyond too."""
        positions = np.clip(np.rint(values).astype(np.int64) - self.first, 0, len(self.entries) - 1)
        found: NDArray[np.uint16] = self.entries[positions]
        return found


# --- grey ----------------------------------------------------------------------------------------


def _grey(
    array: NDArray[Any], dataset: Dataset, frame: int, window: tuple[float, float, str] | None
) -> NDArray[np.uint8]:
    values = _modality_values(array, dataset, frame)
    grey = _windowed(values, *window) if window else _voi_levels(values, dataset, frame)
    background = None
    if grey is None:
        background = _padding(array, dataset)
        grey = stretched(values, ~background) / 255
    # The shape says what MONOCHROME1 and 2 say, and counts where they disagree (PS3.3 C.11.6).
    shape = dataset.get("PresentationLUTShape")
    if shape == "INVERSE" or (
        shape != "IDENTITY" and dataset.PhotometricInterpretation == "MONOCHROME1"
    ):
        grey = 1.0 - grey
    if background is not None:
        grey[background] = 0.0
    levels: NDArray[np.uint8] = np.rint(grey * 255).astype(np.uint8)
    return levels


def _modality_values(array: NDArray[Any], dataset: Dataset, frame: int) -> NDArray[np.float64]:
    """Return stored values as what they measure (PS3.3 C.11.1)."""
    made_for_display = dataset.get("PixelIntensityRelationship") in ("DISP", "LOG")
    if made_for_display and dataset.get("SOPClassUID") in ANGIOGRAPHY:
        return array.astype(np.float64)
    for place in _places(dataset, frame, "PixelValueTransformationSequence"):
        if items := place.get("ModalityLUTSequence"):
            table = _Table.of(items[0].LUTDescriptor, items[0].LUTData, dataset)
            return table.look_up(array).astype(np.float64)
        slope, intercept = (
            _numbers(place.get(keyword))[0] for keyword in ("RescaleSlope", "RescaleIntercept")
        )
        if slope and intercept is not None:
            return array.astype(np.float64) * slope + intercept
    return array.astype(np.float64)


def _voi_levels(
    values: NDArray[np.float64], dataset: Dataset, frame: int
) -> NDArray[np.float64] | None:
    """Return grey, 0.0 to 1.0, by the first usable window or VOI LUT; None if there is none."""
    for place in _places(dataset, frame, "FrameVOILUTSequence"):
        function = str(place.get("VOILUTFunction") or "LINEAR").strip().upper()
        # A linear window is at least one wide; the other functions take less.
        least = math.ulp(0.0) if function in ("LINEAR_EXACT", "SIGMOID") else 1.0
        centres, widths = _numbers(place.get("WindowCenter")), _numbers(place.get("WindowWidth"))
        for centre, width in zip(centres, widths, strict=False):
            if centre is not None and width is not None and width >= least:
                return _windowed(values, centre, width, function)
        if items := place.get("VOILUTSequence"):
            table = _Table.of(items[0].LUTDescriptor, items[0].LUTData, dataset)
            levels: NDArray[np.float64] = table.look_up(values) / (2.0**table.bits - 1)
            return levels
    return None


def _windowed(
    values: NDArray[np.float64], centre: float, width: float, function: str
) -> NDArray[np.float64]:
    """Return grey, 0.0 to 1.0 (PS3.3 C.11.2.1.2 and C.11.2.1.3)."""
    if function == "SIGMOID":
        with np.errstate(over="ignore"):
            levels: NDArray[np.float64] = 1.0 / (1.0 + np.exp(-4.0 * (values - centre) / width))
        return levels
    if function != "LINEAR_EXACT":
        centre, width = centre - 0.5, width - 1.0
    if width == 0.0:
        return (values > centre).astype(np.float64)
    return np.clip((values - centre) / width + 0.5, 0.0, 1.0)


def _places(dataset: Dataset, frame: int, macro: str) -> Iterator[Dataset]:
    """Yield where attributes of a functional group macro may stand, the frame's own place first."""
    for groups, index in zip(FUNCTIONAL_GROUPS, (frame, 0), strict=True):
        items = dataset.get(groups) or ()
        if index < len(items) and (macros := items[index].get(macro)):
            yield macros[0]
    yield dataset


def _numbers(value: Any) -> list[float | None]:
    """Return the values of an attribute, None for each that is empty or is no finite number."""
    numbers: list[float | None] = []
    for item in value if isinstance(value, list | MultiValue) else [value]:
        number = float(item) if item not in (None, "") else math.nan
        numbers.append(number if math.isfinite(number) else None)
    return numbers or [None]


def _padding(array: NDArray[Any], dataset: Dataset) -> NDArray[np.bool_]:
    """Return which stored values are pixel padding (PS3.3 C.7.5.1.1.2), or are not finite."""
    padding: NDArray[np.bool_] = ~np.isfinite(array)
    for kind in ("", "Float", "DoubleFloat"):
        first = _numbers(dataset.get(f"{kind}PixelPaddingValue"))[0]
        if first is None:
            continue
        last = _numbers(dataset.get(f"{kind}PixelPaddingRangeLimit"))[0]
        ends = [first, first if last is None else last]
        if dataset.get("PixelRepresentation"):
            # Its VR may have been taken for US.
            ends = [end - 2**16 if end >= 2**15 else end for end in ends]
        padding |= (min(ends) <= array) & (array <= max(ends))
    return padding


def stretched(
    values: NDArray[np.float64], counted: NDArray[np.bool_] | None = None
) -> NDArray[np.float64]:
    """Return `values` as grey levels, 0.0 to 255.0, between their ``GREY_PERCENTILES``.

    Only the values that are `counted` have a say in the percentiles; all, if it is not given.
    """
    sample = values if counted is None else values[counted]
    if not sample.size:
        return np.zeros(values.shape)
    low, high = np.percentile(sample, GREY_PERCENTILES)
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
