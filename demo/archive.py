"""A made-up archive for the notebook about the hot tier: patients, their studies, a slow disk."""

from __future__ import annotations

import io
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
import matplotlib.pyplot as plt
import numpy as np
import pydicom
from matplotlib.figure import Figure
from pydicom.uid import generate_uid

from demo.ct import write_sample_ct
from dicom_helpers import BLUE, GREY, WIDTH_INCHES
from dicomstore import DicomStore

IMAGES = 4  # of a study
SIDE = 912  # rows, and columns: 1.7 MB an image
SEED = 11
#: The last priors, here three, hold the relevant one in 91% of cases (doi 10.1007/BF03168731).
LAST, HIT = 3, 0.91


class Opening(NamedTuple):
    """A radiologist opens a prior study."""

    patient: str
    files: list[str]


def write_archive(
    folder: str | os.PathLike[str], *, patients: int, studies: int, side: int = SIDE
) -> Path:
    """Write CT studies of four images, a folder for each patient and study, the oldest first.

    Parameters
    ----------
    folder : path
    patients, studies : int
        How many, and how many each of them has: one a year, the last of 2024.
    side : int, optional
        Rows of an image, and columns.

    Returns
    -------
    pathlib.Path
        `folder`.
    """
    folder = Path(folder)
    with tempfile.TemporaryDirectory() as workspace:
        made = sorted(write_sample_ct(workspace, slices=IMAGES, side=side).iterdir())
        images = [pydicom.dcmread(path) for path in made]
    for patient in range(patients):
        for study in range(studies):
            place = folder / f"p{patient:03}" / f"s{study:02}"
            place.mkdir(parents=True)
            name = f"p{patient:03}-s{study:02}"
            for number, image in enumerate(images):
                image.PatientID = f"P{patient:03}"
                image.StudyDate = f"{2025 - studies + study}0401"
                image.StudyInstanceUID = generate_uid(entropy_srcs=[name])
                image.SeriesInstanceUID = generate_uid(entropy_srcs=[name, "series"])
                image.SOPInstanceUID = generate_uid(entropy_srcs=[name, str(number)])
                image.file_meta.MediaStorageSOPInstanceUID = image.SOPInstanceUID
                image.save_as(place / f"{number}.dcm")
    return folder


def worklist(*, patients: int, studies: int) -> Iterator[Opening]:
    """Yield which prior is opened of each patient in turn; of every third, once more at the end.

    It is one of the last three in 91% of cases, an older one otherwise.
    """
    random = np.random.default_rng(SEED)
    openings = []
    for patient in random.permutation(patients):
        back = random.integers(LAST) if random.random() < HIT else random.integers(LAST, studies)
        place = f"p{patient:03}/s{studies - 1 - back:02}"
        files = [f"{place}/{number}.dcm" for number in range(IMAGES)]
        openings.append(Opening(f"P{patient:03}", files))
    yield from openings
    yield from openings[::3]


def work_through(
    tier: DicomStore, openings: Sequence[Opening], *, prefetch: bool
) -> list[tuple[bool, float]]:
    """Open studies one after the other, as a day's work.

    Parameters
    ----------
    tier : DicomStore
        With a source.
    openings : sequence of Opening
    prefetch : bool
        Whether a patient's last three priors are fetched before the first of them is opened. A
        radiologist reads for minutes, so that this is done while the patient before is read.

    Returns
    -------
    list of (bool, float)
        For each image: whether Redis had all of it, and how long it took, in ms.
    """
    times, known = [], set()
    for patient, files in openings:
        if prefetch and patient not in known:
            tier.prefetch_priors(patient, last=LAST).wait()
            known.add(patient)
        for name in files:
            misses, started = tier.misses, time.perf_counter()
            tier.read(name)
            times.append((tier.misses == misses, (time.perf_counter() - started) * 1000))
    return times


def worklist_figure(runs: Mapping[tuple[int, bool], Sequence[tuple[bool, float]]]) -> Figure:
    """Return a figure of a day's work: how often images were in memory, and what reads took.

    Parameters
    ----------
    runs : mapping
        By the disk's delay (ms) and whether there was a prefetch: for each image whether it was in
        memory, and how long it took (ms).
    """
    delays = sorted({delay for delay, _ in runs})
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH_INCHES, 3.4), layout="constrained")
    ways = {"without prefetch": (False, GREY), "with prefetch": (True, BLUE)}
    shares = [100 * np.mean([hit for hit, _ in runs[delays[0], one]]) for one, _ in ways.values()]
    drawn = left.bar(list(ways), shares, 0.6, color=[color for _, color in ways.values()])
    left.bar_label(drawn, fmt="%.0f%%", padding=3)
    left.set(ylabel="images found in memory, %", ylim=(0, 108))
    for shift, (way, (prefetch, color)) in zip((-0.2, 0.2), ways.items(), strict=True):
        means = [np.mean([ms for _, ms in runs[delay, prefetch]]) for delay in delays]
        drawn = right.bar(np.arange(len(delays)) + shift, means, 0.4, color=color, label=way)
        right.bar_label(drawn, fmt="%.1f", padding=3)
    right.set_xticks(range(len(delays)), [f"+{delay} ms" for delay in delays])
    right.set(xlabel="the archive's disk, each read", ylabel="mean ms an image")
    right.margins(y=0.12)
    right.legend(frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"Prefetch raises the hits from {shares[0]:.0f}% to {shares[1]:.0f}%")
    plt.close(figure)  # shown once, as the value of its cell
    return figure


class SlowDisk(fsspec.AbstractFileSystem):  # type: ignore[misc]
    """A local disk that takes so many ms more for each read: ``slow-disk://20/folder``."""

    protocol = "slow-disk"

    def __init__(self, delay_ms: str, **options: Any) -> None:
        super().__init__(**options)
        self._delay_s = float(delay_ms) / 1000

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.removeprefix(f"{cls.protocol}://").partition("/")[2].lstrip("/")

    @staticmethod
    def _get_kwargs_from_urls(path: str) -> dict[str, str]:
        return {"delay_ms": path.partition("://")[2].partition("/")[0]}

    def cat_ranges(
        self, paths: Sequence[str], starts: Sequence[int], ends: Sequence[int], **_: Any
    ) -> list[bytes]:
        """Return pieces of files; pieces that follow each other are one read."""
        time.sleep(self._delay_s)
        with io.FileIO(paths[0]) as file:
            pieces = []
            for start, end in zip(starts, ends, strict=True):
                file.seek(start)
                pieces.append(file.read(end - start))
        return pieces


fsspec.register_implementation(SlowDisk.protocol, SlowDisk, clobber=True)
