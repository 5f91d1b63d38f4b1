"""A made-up multi-frame instance for the notebook: a beating heart of ellipses, no patient."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, MultiFrameGrayscaleWordSecondaryCaptureImageStorage

SIDE = 512  # pixels
BEAT = 40  # frames
#: One UID for all time: the same instance each time it is made (2.25: PS3.5 B.2).
UID = "2.25.290763081541274361527361982734650918273"


def write_sample_cine(path: str | os.PathLike[str], *, frames: int = 400) -> Path:
    """Write an uncompressed multi-frame instance of 512 KiB a frame.

    Parameters
    ----------
    path : path
        The file to write.
    frames : int, optional
        400 make 200 MiB.

    Returns
    -------
    pathlib.Path
        `path`.
    """
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset = Dataset()
    dataset.file_meta = meta
    dataset.SOPClassUID = MultiFrameGrayscaleWordSecondaryCaptureImageStorage
    dataset.SOPInstanceUID = dataset.StudyInstanceUID = dataset.SeriesInstanceUID = UID
    dataset.Modality, dataset.SeriesDescription = "OT", "Made-up cine"
    dataset.PatientName = dataset.PatientID = "MADE UP"
    dataset.Rows = dataset.Columns = SIDE
    dataset.NumberOfFrames = frames
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 12, 11
    dataset.PixelRepresentation = 0
    dataset.WindowCenter, dataset.WindowWidth = 2048, 4096
    path = Path(path)
    pydicom.dcmwrite(path, dataset, enforce_file_format=True)
    with path.open("ab") as file:
        # Pixel Data, frame by frame: the data set never lies in memory whole (PS3.5 7.1.2).
        file.write(struct.pack("<HH2sHL", 0x7FE0, 0x0010, b"OW", 0, frames * SIDE * SIDE * 2))
        for frame in _frames(frames):
            file.write(frame.tobytes())
    return path


def _frames(count: int) -> Iterator[NDArray[np.uint16]]:
    y, x = np.mgrid[-1 : 1 : SIDE * 1j, -1 : 1 : SIDE * 1j]
    texture = 90 * np.sin(23 * x + 5 * y) * np.sin(19 * y - 4 * x)
    chest = 900.0 * (x**2 / 0.8 + y**2 / 0.6 < 1)
    phases = [0.5 - 0.5 * np.cos(2 * np.pi * beat / BEAT) for beat in range(BEAT)]
    beats = []
    for phase in phases:
        wall = ((x - 0.1) / (0.46 + 0.05 * phase)) ** 2 + ((y + 0.05) / (0.4 + 0.05 * phase)) ** 2
        room = ((x - 0.1) / (0.2 + 0.14 * phase)) ** 2 + ((y + 0.05) / (0.16 + 0.14 * phase)) ** 2
        levels = chest + 1100 * (wall < 1) + 1700 * (room < 1) + texture * (chest > 0)
        beats.append(np.clip(levels, 0, 4095).astype("<u2"))
    for number in range(count):
        yield beats[number % BEAT]
