"""A series as one array: which slice comes where, and what its values are; knows no Redis.

:func:`plan_volumes` orders slices by what their headers say. Then somebody brings each slice's
pixels, in any order and from several threads, and the :class:`Plan` makes them values::

    plan = plan_volumes(instances)[0]
    array = plan.empty()
    for n, one in enumerate(plan.slices):
        room = plan.room(array, n)  # takes the bytes of an uncompressed frame as they are
        ...
        plan.put_native(array, n, room)  # or, of a compressed frame: plan.put(array, n, decoded)
    volume = plan.volume(array)
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRBigEndian

from dicomstore.errors import VolumeError

Attributes = Mapping[str, Any] | Dataset
Floats = NDArray[np.float64]

#: Steps between slices may differ by this share and so much (mm): files hold rounded positions.
STEP_SHARE, STEP_MM = 0.01, 0.01
#: Slices that are nearer to each other than this (mm) are at the same position.
SAME_POSITION_MM = 1e-4
#: Direction cosines and pixel spacings (mm) that differ by no more are the same.
SAME_PLANE = 1e-4
#: By so much the two directions of an orientation may miss a length of 1 and a right angle.
UNIT = 1e-2
#: So many files are named in an error.
NAMED = 5
WAY_OUT = "Leave them out, or give split=True for several volumes."


class Instance(NamedTuple):
    """An instance whose frames are to be slices.

    Attributes
    ----------
    path : str
    attributes : mapping or pydicom.Dataset
        The ``header`` of its document, or where :func:`needs_dataset` says so its data set.
    syntax : str or None
        Its transfer syntax UID.
    """

    path: str
    attributes: Attributes
    syntax: str | None = None


class Kind(NamedTuple):
    """What the slices of one volume have in common."""

    series: str
    frame_of_reference: str
    localizer: bool
    size: tuple[int, int]
    spacing: tuple[float, ...]
    orientation: tuple[float, ...]

    def difference(self, other: Kind) -> str | None:
        """Return the DICOM keyword of the first difference, or None."""
        if self == other:
            return None
        for keyword, mine, its in zip(KEYWORDS, self[:4], other[:4], strict=True):
            if mine != its:
                return keyword
        if not np.allclose(self.spacing, other.spacing, rtol=0, atol=SAME_PLANE):
            return "PixelSpacing"
        if not np.allclose(self.orientation, other.orientation, rtol=0, atol=SAME_PLANE):
            return "ImageOrientationPatient"
        return None


KEYWORDS = ("SeriesInstanceUID", "FrameOfReferenceUID", "ImageType", "Rows or Columns")


class Slice(NamedTuple):
    """One frame as a slice of a volume."""

    path: str
    frame: int  # of the instance's frames, from 0
    number: int  # InstanceNumber, which orders slices at the same position
    kind: Kind
    position: tuple[float, ...]  # mm
    thickness: float  # mm, for a volume of one slice
    stored: np.dtype[Any]  # of its pixels, uncompressed
    bits: int  # used of each
    slope: float
    intercept: float

    @property
    def rescaled(self) -> bool:
        """Whether its values are not the stored ones."""
        return (self.slope, self.intercept) != (1, 0)

    @property
    def fits_int16(self) -> bool:
        """Whether every value that its bits can hold is an integer in int16 after Rescale."""
        lowest = -(1 << self.bits - 1) if self.stored.kind == "i" else 0
        ends = [
            stored * self.slope + self.intercept
            for stored in (lowest, lowest + (1 << self.bits) - 1)
        ]
        whole = float(self.slope).is_integer() and float(self.intercept).is_integer()
        return whole and min(ends) >= -(2**15) and max(ends) < 2**15


@dataclasses.dataclass(frozen=True)
class Volume:
    """A series as one array.

    Attributes
    ----------
    array : numpy.ndarray
        Of shape (slices, rows, columns): values after Rescale.
    affine : numpy.ndarray
        4 × 4, float64: ``affine @ (slice, row, column, 1)`` is where the centre of a voxel lies in
        the patient, as (x, y, z, 1) in mm; x grows to the left, y to the back, z to the head
        (LPS, PS3.3 C.7.6.2.1.1).
    spacing : tuple of float
        Between the centres of neighbours along each axis of `array`, in mm.
    paths : tuple of str
        The file of each slice, in order.
    """

    array: NDArray[Any]
    affine: Floats
    spacing: tuple[float, float, float]
    paths: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Plan:
    """One volume before its pixels are there.

    Attributes
    ----------
    slices : tuple of Slice
        Ordered by the projection of their positions on the normal, the cross product of the
        directions of rows and columns.
    affine, spacing
        As for :class:`Volume`.
    """

    slices: tuple[Slice, ...]
    affine: Floats
    spacing: tuple[float, float, float]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Slices, rows, columns."""
        return (len(self.slices), *self.slices[0].kind.size)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the values.

        The stored one where no slice is rescaled and all are stored alike; int16 where slopes and
        intercepts are integers and int16 holds whatever they can give; else float32.
        """
        stored = {one.stored.newbyteorder("=") for one in self.slices}
        if len(stored) == 1 and not any(one.rescaled for one in self.slices):
            return stored.pop()
        return np.dtype(np.int16 if all(one.fits_int16 for one in self.slices) else np.float32)

    def empty(self) -> NDArray[Any]:
        """Return the array that the slices are put into."""
        try:
            return np.empty(self.shape, self.dtype)
        except (MemoryError, ValueError) as error:  # more than there is, or than can be counted
            raise VolumeError(
                f"A volume of {' x '.join(map(str, self.shape))} values does not fit into memory."
            ) from error

    def room(self, array: NDArray[Any], n: int) -> NDArray[Any]:
        """Return a contiguous array for the bytes of slice `n`, uncompressed as they are stored.

        It is the slice's place in `array` wherever a value takes as many bytes as a stored one.
        """
        stored = self.slices[n].stored
        if stored.itemsize == array.dtype.itemsize:
            place: NDArray[Any] = array[n].view(stored)
            return place
        return np.empty(array.shape[1:], stored)

    def put_native(self, array: NDArray[Any], n: int, room: NDArray[Any]) -> None:
        """Turn slice `n`, whose bytes are in the array that `room` gave, into values in `array`.

        Bits beyond BitsStored, which may hold anything (PS3.5 8.1.1), are cleared.
        """
        one = self.slices[n]
        unused = 8 * one.stored.itemsize - one.bits
        if unused and one.stored.kind == "u":
            room &= (1 << one.bits) - 1
        elif unused:
            room <<= unused
            room >>= unused
        self.put(array, n, room)

    def put(self, array: NDArray[Any], n: int, pixels: NDArray[Any]) -> None:
        """Put slice `n` into `array`, rescaled, from its decoded `pixels`.

        Raises
        ------
        VolumeError
            If they are not of the size that the header says.
        """
        one, target = self.slices[n], array[n]
        if pixels.shape != target.shape:
            raise VolumeError(
                f"{one.path} has a frame of {pixels.shape}, where its header says {target.shape}."
            )
        if array.dtype == np.float32:
            target[...] = pixels * one.slope + one.intercept
            return
        if not (pixels.dtype.isnative and np.may_share_memory(pixels, target)):
            np.copyto(target, pixels, casting="unsafe")
        # What fits at the end fits whatever overflows on the way: int16 counts modulo 2**16.
        if one.slope != 1:
            target *= np.int64(one.slope).astype(np.int16)
        if one.intercept:
            target += np.int64(one.intercept).astype(np.int16)

    def volume(self, array: NDArray[Any]) -> Volume:
        """Return the volume, when all slices are in `array`."""
        return Volume(array, self.affine, self.spacing, tuple(one.path for one in self.slices))


# --- from headers to slices ----------------------------------------------------------------------


def needs_dataset(attributes: Attributes) -> bool:
    """Whether only an instance's data set says where its frames lie.

    Functional groups (PS3.3 C.7.6.16) are not in the ``header`` of a document.
    """
    return "NumberOfFrames" in attributes and "ImagePositionPatient" not in attributes


def plan_volumes(instances: Iterable[Instance], *, split: bool = False) -> list[Plan]:
    """Order slices by where they lie in the patient (PS3.3 C.7.6.2), and check their geometry.

    Parameters
    ----------
    instances : iterable of Instance
        In any order.
    split : bool, optional
        Whether slices that do not form one volume may form several: one for each series, size,
        orientation and so on; then one for each of several slices at the same positions; then one
        for each row without gaps.

    Returns
    -------
    list of Plan
        One, or with `split` at least one, those of most slices first.

    Raises
    ------
    VolumeError
        If there is no slice, a file has no geometry or no grey integer pixels, or without `split`
        if slices differ, share a position or leave gaps. It says which files.
    """
    slices: list[Slice] = []
    unusable: dict[str, list[str]] = {}
    for instance in instances:
        try:
            slices += _slices(instance)
        except _UnusableError as error:
            unusable.setdefault(str(error), []).append(instance.path)
    for reason, paths in unusable.items():
        raise VolumeError(f"{_named(paths)} {reason}. Leave out what is not a slice.")
    if not slices:
        raise VolumeError("There are no slices: no instance was given.")
    plans = []
    for alike in _of_each_kind(slices, split):
        for layer in _of_each_position(alike, split):
            plans += [_plan(row) for row in _without_gaps(layer, split)]
    return sorted(plans, key=lambda plan: -len(plan.slices))


class _UnusableError(Exception):
    """Why an instance has no slices, as the end of a sentence that begins with its name."""


def _slices(instance: Instance) -> list[Slice]:
    attributes = instance.attributes
    count = attributes.get("NumberOfFrames") or 1
    if not needs_dataset(attributes):
        if count != 1:
            raise _UnusableError("has several frames at one position")
        return [_slice(instance, 0, [attributes])]
    shared = _items(attributes, "SharedFunctionalGroupsSequence")[:1]
    each = _items(attributes, "PerFrameFunctionalGroupsSequence")
    if len(each) != count:
        raise _UnusableError("has no functional groups for each of its frames")
    return [_slice(instance, k, [frame, *shared, attributes]) for k, frame in enumerate(each)]


#: Where functional groups hold what other instances hold themselves (PS3.3 C.7.6.16.2).
MACROS = {
    "ImagePositionPatient": "PlanePositionSequence",
    "ImageOrientationPatient": "PlaneOrientationSequence",
    "PixelSpacing": "PixelMeasuresSequence",
    "SliceThickness": "PixelMeasuresSequence",
    "SpacingBetweenSlices": "PixelMeasuresSequence",
    "RescaleSlope": "PixelValueTransformationSequence",
    "RescaleIntercept": "PixelValueTransformationSequence",
}


def _slice(instance: Instance, frame: int, groups: Sequence[Attributes]) -> Slice:
    """Return frame `frame` as a slice; of `groups` the first that holds an attribute counts."""
    attributes = instance.attributes
    found = {}
    for keyword, macro in MACROS.items():
        for group in groups:
            for holder in (group, *_items(group, macro)[:1]):
                if keyword not in found and holder.get(keyword) is not None:
                    found[keyword] = holder.get(keyword)
    orientation = _numbers(found, "ImageOrientationPatient", 6)
    if not _is_perpendicular(orientation):
        raise _UnusableError("has an ImageOrientationPatient without two perpendicular directions")
    spacing = _numbers(found, "PixelSpacing", 2)
    if min(spacing) <= 0:
        raise _UnusableError("has a PixelSpacing that is not positive")
    kind = Kind(
        str(attributes.get("SeriesInstanceUID", "")),
        str(attributes.get("FrameOfReferenceUID", "")),
        "LOCALIZER" in (attributes.get("ImageType") or ()),
        (_integer(attributes, "Rows"), _integer(attributes, "Columns")),
        spacing,
        orientation,
    )
    own_extent = ("SpacingBetweenSlices", "SliceThickness")
    extents = [abs(_numbers(found, keyword, 1)[0]) for keyword in own_extent if keyword in found]
    number = attributes.get("InstanceNumber")
    return Slice(
        instance.path,
        frame,
        number if isinstance(number, int) else 0,
        kind,
        _numbers(found, "ImagePositionPatient", 3),
        next(filter(None, extents), 1.0),
        *_pixels(instance),
        *(_numbers({keyword: default} | found, keyword, 1)[0] for keyword, default in RESCALE),
    )


@functools.lru_cache
def _is_perpendicular(orientation: tuple[float, ...]) -> bool:
    directions = np.array(orientation).reshape(2, 3)
    return np.allclose(directions @ directions.T, np.eye(2), rtol=0, atol=UNIT)


RESCALE = (("RescaleSlope", 1), ("RescaleIntercept", 0))


def _pixels(instance: Instance) -> tuple[np.dtype[Any], int]:
    """Return how pixels are stored, and how many bits of each are used."""
    attributes = instance.attributes
    if not str(attributes.get("PhotometricInterpretation", "")).startswith("MONOCHROME"):
        raise _UnusableError("is not grey")
    if attributes.get("ModalityLUTSequence"):
        raise _UnusableError("has a Modality LUT, which is not a Rescale")
    allocated, used = (_integer(attributes, name) for name in ("BitsAllocated", "BitsStored"))
    signed = attributes.get("PixelRepresentation")
    if allocated not in (8, 16, 32) or used > allocated or signed not in (0, 1):
        raise _UnusableError("has no pixels of 8, 16 or 32 bits")
    order = ">" if instance.syntax == ExplicitVRBigEndian else "<"
    return np.dtype(f"{order}{'ui'[signed]}{allocated // 8}"), used


def _items(attributes: Attributes, keyword: str) -> Sequence[Attributes]:
    items: Sequence[Attributes] = attributes.get(keyword) or ()
    return items


def _integer(attributes: Attributes, keyword: str) -> int:
    value = attributes.get(keyword)
    if not isinstance(value, int) or value < 1:
        raise _UnusableError(f"has no usable {keyword}")
    return int(value)


def _numbers(attributes: Mapping[str, Any], keyword: str, count: int) -> tuple[float, ...]:
    value = attributes.get(keyword)
    if value is None:
        raise _UnusableError(f"has no {keyword}")
    try:
        numbers = tuple(float(number) for number in ([value] if count == 1 else value))
    except (TypeError, ValueError):
        numbers = ()
    if len(numbers) != count or not all(map(math.isfinite, numbers)):
        raise _UnusableError(f"has a {keyword} that is not {count} numbers")
    return numbers


# --- from slices to volumes ----------------------------------------------------------------------


def _of_each_kind(slices: Iterable[Slice], split: bool) -> list[list[Slice]]:
    groups: list[list[Slice]] = []
    for one in slices:
        for group in groups:
            if group[0].kind.difference(one.kind) is None:
                group.append(one)
                break
        else:
            groups.append([one])
    groups.sort(key=lambda group: -len(group))
    if not split and len(groups) > 1:
        others = [one for group in groups[1:] for one in group]
        which = sorted({str(groups[0][0].kind.difference(one.kind)) for one in others})
        raise VolumeError(
            f"{_named([one.path for one in others])} differ in {', '.join(which)} from the other "
            f"{len(groups[0])} slices. {WAY_OUT}"
        )
    return groups


def _distances(slices: Sequence[Slice]) -> Floats:
    """Return how far along the normal each slice lies."""
    directions = np.array(slices[0].kind.orientation).reshape(2, 3)
    normal = np.cross(*directions)
    positions = np.array([one.position for one in slices])
    projected: Floats = positions @ (normal / np.linalg.norm(normal))
    return projected


def _of_each_position(slices: list[Slice], split: bool) -> list[list[Slice]]:
    """Return the slices in order; those at the position of another in a layer of their own."""
    along = _distances(slices)
    order = sorted(range(len(slices)), key=lambda n: (along[n], slices[n].number, slices[n].frame))
    layers: list[list[Slice]] = []
    groups = np.split(order, np.flatnonzero(np.diff(along[order]) > SAME_POSITION_MM) + 1)
    for group in groups:
        together = sorted((slices[n] for n in group), key=lambda one: (one.number, one.frame))
        for depth, one in enumerate(together):
            if depth == len(layers):
                layers.append([])
            layers[depth].append(one)
    if not split and len(layers) > 1:
        shared = [slices[n].path for group in groups if len(group) > 1 for n in group]
        raise VolumeError(f"{_named(shared)} share their positions. {WAY_OUT}")
    return layers


def _without_gaps(slices: list[Slice], split: bool) -> list[list[Slice]]:
    """Return the slices, ordered already, as rows of equal steps."""
    positions = np.array([one.position for one in slices])
    steps = np.diff(positions, axis=0)
    if not len(steps):
        return [slices]
    typical = np.median(steps, axis=0)
    tolerance = STEP_MM + STEP_SHARE * float(np.linalg.norm(typical))
    breaks = np.flatnonzero(np.linalg.norm(steps - typical, axis=1) > tolerance)
    if not split and len(breaks):
        sides = [slices[n].path for after in breaks.tolist() for n in (after, after + 1)]
        raise VolumeError(
            f"There are gaps between {_named(list(dict.fromkeys(sides)))}: most steps are "
            f"{np.linalg.norm(typical):.4g} mm. Add what is missing, or give split=True for "
            "several volumes."
        )
    cuts = [0, *(breaks + 1).tolist(), len(slices)]
    return [slices[first:last] for first, last in itertools.pairwise(cuts)]


def _plan(slices: Sequence[Slice]) -> Plan:
    first, last = slices[0], slices[-1]
    along_row, along_column = np.array(first.kind.orientation).reshape(2, 3)
    if len(slices) == 1:
        step = np.cross(along_row, along_column) * first.thickness
    else:
        step = (np.array(last.position) - first.position) / (len(slices) - 1)
    between_rows, between_columns = first.kind.spacing
    affine = np.eye(4)
    affine[:3] = np.column_stack(
        (step, along_column * between_rows, along_row * between_columns, first.position)
    )
    return Plan(tuple(slices), affine, (float(np.linalg.norm(step)), between_rows, between_columns))


def _named(paths: Sequence[str]) -> str:
    named = ", ".join(paths[:NAMED])
    return named if len(paths) <= NAMED else f"{named} and {len(paths) - NAMED} more"
