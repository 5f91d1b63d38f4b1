"""A made-up CT of a chest for the notebook: a body of ellipsoids and branching vessels, no patient.

A slice is painted in Hounsfield units, from the outside in: table, skin, fat and muscle, rib cage,
lungs and what fills them, the organs between and below, spine and sternum, noise. Lengths are in
mm, in the patient's own directions (LPS: x to the left, y to the back, z to the head).
"""

from __future__ import annotations

import functools
import io
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

WIDTH, HEIGHT = 384.0, 375.0  # of the field of view and of all slices, mm
AIR, FAT, WATER, SOFT, BLOOD, BONE = -1000.0, -95.0, 8.0, 55.0, 210.0, 620.0  # HU
INTERCEPT = -1024
HIGHEST = 4095  # 12 bits
NOISE = 14.0  # HU
SEED = 13
#: UIDs for all time: the same instances each time they are made (2.25: PS3.5 B.2).
UID_ROOT = "2.25.31719204857731625400981246350917"
STUDY, SERIES, FRAME_OF_REFERENCE = (f"{UID_ROOT}{n}" for n in (90001, 90002, 90003))
RIB_STEP, VERTEBRA = 24.0, 27.0  # from one to the next, mm
FORKS = 8  # of the vessels of a lung

Floats = NDArray[np.float32]
Box = tuple[slice, slice]  # of rows and of columns

#: From the outside in, all equally thick: skin, fat, muscle.
LAYERS = np.repeat(
    np.array([10, FAT, FAT - 10, SOFT - 60, SOFT, SOFT], np.float32), [3, 14, 4, 2, 77, 1]
)


class _Ellipsoid(NamedTuple):
    x: float
    y: float
    z: float
    radius_x: float
    radius_y: float
    radius_z: float
    value: float
    lean_x: float = 0.0  # mm to the side for each mm upwards
    lean_y: float = 0.0


#: Below the diaphragm: liver, its right and left lobe, spleen, stomach and the air in it, kidneys.
ABDOMEN = (
    _Ellipsoid(-62, 2, -118, 78, 82, 100, 105),
    _Ellipsoid(-8, -44, -108, 62, 40, 52, 105),
    _Ellipsoid(98, 52, -112, 28, 46, 62, 128),
    _Ellipsoid(66, -18, -122, 44, 52, 58, 30, -0.2),
    _Ellipsoid(66, -40, -118, 30, 22, 42, AIR + 15, -0.2),
    _Ellipsoid(-64, 56, -178, 28, 26, 52, 175, 0.1),
    _Ellipsoid(64, 58, -168, 28, 26, 54, 175, -0.1),
)
#: Between the lungs: muscle of the heart, its four rooms, the great vessels, the oesophagus.
HEART = (
    _Ellipsoid(24, -22, -42, 62, 50, 52, FAT + 20, -0.25),
    _Ellipsoid(24, -22, -42, 57, 46, 48, 95, -0.25),
    _Ellipsoid(48, -12, -48, 25, 21, 33, BLOOD + 15, -0.3, 0.2),
    _Ellipsoid(10, -44, -46, 28, 19, 34, BLOOD - 20, -0.2),
    _Ellipsoid(-22, -22, -34, 20, 22, 32, BLOOD - 25),
    _Ellipsoid(10, 14, -16, 32, 17, 24, BLOOD + 10),
    _Ellipsoid(-6, -24, 14, 15, 15, 52, BLOOD + 20, 0.05, -0.1),
    _Ellipsoid(18, -26, 12, 14, 13, 30, BLOOD, 0.3, 0.3),
    _Ellipsoid(-34, -18, 40, 9, 9, 76, BLOOD + 60),
    _Ellipsoid(12, 8, 62, 14, 42, 13, BLOOD + 20, 0.2),
    _Ellipsoid(22, 6, 128, 6, 6, 76, BLOOD + 10, 0.08),
    _Ellipsoid(-8, -8, 128, 7, 7, 78, BLOOD + 10, -0.12),
)
#: Vertical vessels and tubes from this z to that one: x, y, radius, value.
TUBES = (
    (26.0, 46.0, 12.5, BLOOD + 20, -190.0, 62.0),  # descending aorta
    (-20.0, 30.0, 11.0, BLOOD - 50, -190.0, -62.0),  # inferior vena cava
    (10.0, 36.0, 7.0, 40.0, -90.0, 190.0),  # oesophagus
)
CARINA = 48.0  # where the trachea divides, z


def write_sample_ct(folder: str | os.PathLike[str], *, slices: int = 300, side: int = 512) -> Path:
    """Write an axial CT series of a chest, a file a slice, uncompressed.

    Parameters
    ----------
    folder : path
        Is made if it is not there. The first file is the slice nearest to the head.
    slices : int, optional
        All of them cover 375 mm: fewer lie further apart.
    side : int, optional
        Rows, and columns, of 384 mm in all.

    Returns
    -------
    pathlib.Path
        `folder`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    step = round(HEIGHT / slices, 3)
    body = _Body(side)
    template = _template(side, step)

    def write(number: int) -> None:
        z = step * ((slices - 1) / 2 - number)
        head = template
        for placeholder, value in _differing(number, z).items():
            head = head.replace(placeholder.encode(), value.encode())
        with (folder / f"CT{number + 1:04}.dcm").open("wb", buffering=0) as file:
            file.write(head)
            file.write(body.stored(z).data)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in pool.map(write, range(slices)):
            pass
    return folder


# --- the files -----------------------------------------------------------------------------------


def _differing(number: int, z: float) -> dict[str, str]:
    """Return what differs in a slice's header, of fixed length, by the template's placeholder."""
    return {"7777777": f"{1_000_000 + number}", "6666": f"{number + 1:<4}", "-555.555": f"{z:8.3f}"}


def _template(side: int, step: float) -> bytes:
    """Return a slice's file up to its pixels, with placeholders for what differs."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset = Dataset()
    dataset.file_meta = meta
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    dataset.SOPClassUID = CTImageStorage
    dataset.SOPInstanceUID = f"{UID_ROOT[:-2]}7777777"
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = STUDY, SERIES
    dataset.FrameOfReferenceUID = FRAME_OF_REFERENCE
    dataset.StudyDate = dataset.ContentDate = "20200101"
    dataset.StudyTime = dataset.ContentTime = "120000"
    dataset.Modality, dataset.Manufacturer = "CT", "MADE UP"
    dataset.PatientName = dataset.PatientID = "MADE UP"
    dataset.PatientBirthDate, dataset.PatientSex = "", "O"
    dataset.StudyID, dataset.AccessionNumber, dataset.ReferringPhysicianName = "1", "", ""
    dataset.StudyDescription, dataset.SeriesDescription = "Made-up CT", "Made-up chest"
    dataset.BodyPartExamined, dataset.PatientPosition = "CHEST", "HFS"
    dataset.SeriesNumber, dataset.AcquisitionNumber, dataset.InstanceNumber = 1, 1, 6666
    dataset.PositionReferenceIndicator = ""
    dataset.KVP, dataset.ContrastBolusAgent = 120, "MADE UP"
    spacing = round(WIDTH / side, 6)
    corner = round(-spacing * (side - 1) / 2, 3)
    dataset.ImagePositionPatient = [corner, corner, -555.555]
    dataset.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    dataset.PixelSpacing = [spacing, spacing]
    dataset.SliceThickness = dataset.SpacingBetweenSlices = step
    dataset.Rows = dataset.Columns = side
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 12, 11
    dataset.PixelRepresentation = 0
    dataset.RescaleIntercept, dataset.RescaleSlope, dataset.RescaleType = INTERCEPT, 1, "HU"
    dataset.WindowCenter, dataset.WindowWidth = 40, 400
    dataset.PixelData = bytes(2 * side * side)
    dataset["PixelData"].VR = "OW"
    file = io.BytesIO()
    pydicom.dcmwrite(file, dataset, enforce_file_format=True)
    return file.getvalue()[: -2 * side * side]


# --- the body ------------------------------------------------------------------------------------


def _soft(amount: Floats, sharpness: float) -> Floats:
    """Return 0 to 1 for what lies outside to inside, in place."""
    amount *= np.float32(sharpness)
    amount += np.float32(0.5)
    return np.clip(amount, 0, 1, out=amount)


def _paint(picture: Floats, weight: Floats, value: float | Floats) -> None:
    """Mix `value` into `picture`, in place."""
    change = np.subtract(value, picture, dtype=np.float32)
    change *= weight
    picture += change


class _Body:
    """What is the same in all slices of one size, and each slice from it."""

    def __init__(self, side: int) -> None:
        rng = np.random.default_rng(SEED)
        self.side, self.pixel = side, WIDTH / side
        self.at = ((np.arange(side) - (side - 1) / 2) * self.pixel).astype(np.float32)
        self.x, self.y = self.at[None, :], self.at[:, None]
        self.grain = self._grain(rng)
        self.background = self._background()
        self.dome = self._dome()
        between = (
            16 + 20 * np.exp(-(((self.y + 2) / 42) ** 2)) + 16 / (1 + np.exp((52 - self.y) / 7))
        )
        self.beside = (np.abs(self.x) - between).astype(np.float32)
        # A rib climbs from the front to the back; so it shows as a short piece in a slice.
        turn = 2 * np.pi / RIB_STEP * (0.62 * self.y + 0.10 * np.abs(self.x))
        self.rib_cos, self.rib_sin = np.cos(turn), np.sin(turn)
        self.vessels = _vessels(rng)

    def _grain(self, rng: np.random.Generator) -> Floats:
        """Noise as reconstruction leaves it, larger than a slice: each takes another part."""
        white = rng.standard_normal((self.side + 66, self.side + 66), dtype=np.float32)
        smooth = white[1:-1, 1:-1] + 0.55 * (
            white[:-2, 1:-1] + white[2:, 1:-1] + white[1:-1, :-2] + white[1:-1, 2:]
        )
        return np.asarray(smooth * np.float32(NOISE / smooth.std()), np.float32)

    def _background(self) -> Floats:
        picture = np.full((self.side, self.side), AIR, np.float32)
        sag = self.y - (128 - (self.x / 48) ** 2)
        for depth, value in ((0.0, -350.0), (22.0, -450.0)):
            inside = np.abs(sag - depth) < 2.5
            picture[inside & (np.abs(self.x) < 178 - depth)] = value
        return picture

    def _dome(self) -> Floats:
        """How high the diaphragm reaches, by row and column."""
        right = -52 - ((self.x + 68) ** 2 / 78 + (self.y + 12) ** 2 / 120)
        left = -62 - ((self.x - 72) ** 2 / 78 + (self.y + 8) ** 2 / 120)
        return np.maximum(np.maximum(right, left), -230.0).astype(np.float32)

    def stored(self, z: float) -> NDArray[np.uint16]:
        """Return the stored values of the slice at `z`."""
        picture = self.background.copy()
        self._wall(picture, z)
        self._chest(picture, z)
        self._spine(picture, z)
        self._ellipsoid(picture, _Ellipsoid(0, -94 + 0.1 * z, 40, 17, 6, 95, 300), z)
        for side in (-1, 1):
            blade = _Ellipsoid(side * 90, 88, 60, 27, 4.5, 75, BONE, side * 0.12)
            self._ellipsoid(picture, blade, z)
        down, across = (int(abs(z) * step) % 64 for step in (37.7, 91.3))
        picture += self.grain[down : down + self.side, across : across + self.side]
        picture -= INTERCEPT
        return np.clip(picture, 0, HIGHEST, out=picture).astype("<u2")

    def _oval(self, half_width: float, half_depth: float) -> tuple[Box, Floats]:
        """Return rows and columns of an oval, and there 1 in its middle, 0 on the rim, then less.

        Its sides are flatter than an ellipse's.
        """
        box = self._range(-2, half_depth), self._range(0, half_width)
        across = 1 - (np.abs(self.x[:, box[1]]) / half_width) ** 2.4
        down = ((self.y[box[0]] + 2) / half_depth) ** 2
        return box, across.astype(np.float32) - down.astype(np.float32)

    def _wall(self, picture: Floats, z: float) -> None:
        """Paint skin, fat and muscle, by how deep they lie."""
        waist = 1 - 0.06 * np.exp(-(((z + 95) / 70) ** 2)) + 0.05 * np.clip((z - 80) / 100, 0, 1)
        box, depth = self._oval(176 * waist, 118)
        inside = depth > 0
        depth *= np.float32(len(LAYERS))
        layer = np.take(LAYERS, depth.astype(np.int16), mode="clip")
        np.copyto(picture[box], layer, where=inside)

    def _chest(self, whole: Floats, z: float) -> None:
        """Paint the rib cage, the lungs in it, and what lies between and below them."""
        narrow = np.sqrt(np.clip(1 - (max(z, 0) / 205) ** 2.2, 0.02, 1))
        box, cage = self._oval(138 * narrow, 92 * (0.55 + 0.45 * narrow))
        picture = whole[box]
        turn = 2 * np.pi / RIB_STEP * z
        ribs = self.rib_cos[box] * np.float32(np.cos(turn))
        ribs -= self.rib_sin[box] * np.float32(np.sin(turn))
        ribs -= np.float32(0.25)
        ribs *= np.float32(0.12)
        shell = np.abs(cage + np.float32(0.055))
        np.minimum(np.float32(0.06) - shell, ribs, out=ribs)
        bone = _soft(ribs, 40)
        marrow = shell < 0.028
        _paint(picture, bone, np.where(marrow, np.float32(BONE - 330), np.float32(BONE)))
        cavity = _soft(cage - np.float32(0.02), 30)
        _paint(picture, cavity, FAT)
        if z < 0:
            within = np.zeros_like(whole)
            within[box] = cavity
            for organ in ABDOMEN:
                self._ellipsoid(whole, organ, z, within)
        lung = np.minimum(self.beside[box], np.float32(z) - self.dome[box])
        lung = _soft(lung, 0.6)
        lung *= cavity
        # What lies below is pressed together by its weight.
        _paint(picture, lung, (-865 + 0.18 * self.y[box[0]]).astype(np.float32))
        self._branches(picture, box, z, lung)
        for organ in HEART:
            self._ellipsoid(whole, organ, z)
        for x, y, radius, value, low, high in TUBES:
            if low < z < high:
                self._ellipsoid(whole, _Ellipsoid(x, y, z, radius, radius, 9, value), z)
        self._airways(whole, z)

    def _airways(self, picture: Floats, z: float) -> None:
        if z > CARINA:
            _tube = _Ellipsoid(0, 14, z, 9.5, 8.5, 9, AIR)
            self._ellipsoid(picture, _tube._replace(radius_x=11, radius_y=10, value=70), z)
            self._ellipsoid(picture, _tube, z)
        elif z > CARINA - 40:
            below = CARINA - z
            for side in (-1, 1):
                tube = _Ellipsoid(side * (5 + 0.95 * below), 14, z, 8.0, 6.5, 9, AIR)
                self._ellipsoid(picture, tube._replace(radius_x=9.5, radius_y=8, value=60), z)
                self._ellipsoid(picture, tube, z)

    def _spine(self, picture: Floats, z: float) -> None:
        """Paint a vertebra or a disc, the canal behind it, and the processes."""
        along = abs((z / VERTEBRA) % 1 - 0.5)  # 0 amid a vertebra, 0.5 amid a disc
        y = 62 + 6 * np.cos(z / 90)
        disc = along > 0.39
        body = _Ellipsoid(0, y, z, 20 - 6 * (0.45 - along) ** 2 * 10, 15.5, 9, BONE)
        muscle = _Ellipsoid(0, y + 26, z, 42, 17, 9, SOFT)
        for side in (-1, 1):
            self._ellipsoid(picture, muscle._replace(x=side * 26, radius_x=24), z)
        if disc:
            self._ellipsoid(picture, body._replace(value=90), z)
        else:
            self._ellipsoid(picture, body, z)
            spongy = body._replace(radius_x=body.radius_x - 2.2, radius_y=13.4, value=230)
            if along < 0.34:
                self._ellipsoid(picture, spongy, z)
        if along > 0.16:
            process = _Ellipsoid(0, y + 38, z, 3.4, 15, 9, BONE - 80)
            self._ellipsoid(picture, process, z)
        if along < 0.3:
            for side in (-1, 1):
                wing = _Ellipsoid(side * 25, y + 21, z, 17, 4.2, 9, BONE - 150)
                self._ellipsoid(picture, wing, z)
        self._ellipsoid(picture, _Ellipsoid(0, y + 22, z, 12, 10.5, 9, BONE - 100), z)
        self._ellipsoid(picture, _Ellipsoid(0, y + 21.5, z, 9, 8, 9, 12), z)
        self._ellipsoid(picture, _Ellipsoid(0, y + 21.5, z, 5, 4, 9, 45), z)

    def _ellipsoid(
        self, picture: Floats, shape: _Ellipsoid, z: float, within: Floats | None = None
    ) -> None:
        up = z - shape.z
        room = 1 - (up / shape.radius_z) ** 2
        if room <= 0.003:
            return
        size = np.sqrt(room)
        x, y = shape.x + shape.lean_x * up, shape.y + shape.lean_y * up
        columns = self._range(x, shape.radius_x * size)
        rows = self._range(y, shape.radius_y * size)
        across = room - ((self.x[:, columns] - x) / shape.radius_x) ** 2
        down = ((self.y[rows] - y) / shape.radius_y) ** 2
        smaller = min(shape.radius_x, shape.radius_y)
        inside = across.astype(np.float32) - down.astype(np.float32)
        weight = _soft(inside, smaller / (3.2 * max(size, 0.3)))
        if within is not None:
            weight *= within[rows, columns]
        _paint(picture[rows, columns], weight, shape.value)

    def _range(self, centre: float, radius: float) -> slice:
        middle = centre / self.pixel + (self.side - 1) / 2
        reach = (radius * 1.15 + 2) / self.pixel
        return slice(max(0, int(middle - reach)), max(0, int(middle + reach) + 2))

    def _branches(self, picture: Floats, box: Box, z: float, lung: Floats) -> None:
        """Paint the vessels that pass through a slice, where there is lung."""
        x, y, height, radius = self.vessels
        near = slice(*np.searchsorted(height, np.array([z - 6, z + 6], np.float32)))
        square = radius[near] ** 2 - (height[near] - z) ** 2
        hit = square > 0
        reach = np.sqrt(square[hit]) / self.pixel
        column = np.rint(x[near][hit] / self.pixel + (self.side - 1) / 2).astype(np.int64)
        row = np.rint(y[near][hit] / self.pixel + (self.side - 1) / 2).astype(np.int64)
        layer = np.zeros((self.side, self.side), np.float32)
        for widening, share in ((0.9, 0.45), (0.0, 1.0)):
            size = np.rint(reach + widening).astype(np.int64)
            for pixels in range(int(size.max(initial=-1)) + 1):
                these = size == pixels
                centre = row[these] * self.side + column[these]
                layer.put(centre[:, None] + _disc(pixels, self.side), share, mode="clip")
        _paint(picture, layer[box] * lung, 90)


@functools.cache
def _disc(radius: int, side: int) -> NDArray[np.int64]:
    """Return the offsets of a disc's pixels, in a flat picture."""
    down, across = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    inside = down**2 + across**2 <= (radius + 0.3) ** 2
    offsets: NDArray[np.int64] = (down * side + across)[inside]
    return offsets


def _vessels(rng: np.random.Generator) -> tuple[Floats, Floats, Floats, Floats]:
    """Return points on two branching trees, ordered by z: x, y, z and radius there."""
    found = []
    for side in (-1, 1):
        start = np.array([[side * 32.0, 10.0, 22.0]])
        start = np.repeat(start, 7, axis=0)
        heading = np.stack(
            [
                side * np.array([1.0, 0.9, 0.7, 0.5, 0.8, 0.5, 0.9]),
                np.array([-0.6, 0.5, -0.2, 0.7, 0.1, -0.5, 0.9]),
                np.array([0.1, 0.2, 1.0, 0.9, -0.8, -1.1, -0.9]),
            ],
            axis=1,
        )
        radius = np.full(len(start), 4.6)
        for _ in range(FORKS):
            heading /= np.linalg.norm(heading, axis=1, keepdims=True)
            length = 9.5 * radius**0.55 + rng.uniform(1, 9, len(radius))
            steps = np.linspace(0, 1, 30)
            bend = rng.normal(0, 0.16, heading.shape)
            path = start[:, None] + length[:, None, None] * (
                steps[None, :, None] * heading[:, None] + (steps**2)[None, :, None] * bend[:, None]
            )
            thickness = (radius[:, None] * (1 - 0.14 * steps))[..., None]
            found.append(np.concatenate([path, thickness], axis=2).reshape(-1, 4))
            start = np.repeat(path[:, -1], 2, axis=0)
            heading = np.repeat(heading + bend, 2, axis=0) + rng.normal(0, 0.52, (len(start), 3))
            radius = np.repeat(radius, 2) * rng.uniform(0.7, 0.86, len(start))
    points = np.concatenate(found)
    points = points[(points[:, 3] > 0.35) & (np.abs(points[:, :2]) < 150).all(axis=1)]
    x, y, z, radius = points[np.argsort(points[:, 2], kind="stable")].T.astype(np.float32)
    return x, y, z, radius
