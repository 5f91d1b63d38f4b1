"""What the notebook shows: figures, timings and dumps, so that the store needs no matplotlib."""

from __future__ import annotations

import json
import os
import re
import shutil
import statistics
import textwrap
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar, cast

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import psutil
import pydicom
import redis
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pydicom.dataset import Dataset
from pydicom.encaps import parse_basic_offsets
from pydicom.pixels import apply_rescale

from demo.viewers.slide import SlideViewer
from demo.viewers.stack import StackViewer, open_stack
from dicomstore import DicomStore, connect, containing, not_, words
from dicomstore.imaging import rendering
from dicomstore.imaging.volume import Volume

#: Legible on white and on dark pages alike, and in greyscale.
BLUE, GREY = "#2a6fbb", "#8a929b"
#: What a notebook shows unshrunk in a window of 1280 pixels, and nearly so in one of 1024.
WIDTH_INCHES = 9.0
#: Under an image a fifth of that wide, at CAPTION_SIZE.
CAPTION_CHARACTERS, CAPTION_SIZE = 26, 8

__all__ = ["DicomStore", "connect", "containing", "not_", "words"]

Result = TypeVar("Result")


class Timing(NamedTuple):
    """How long one call took, in ms: the first one, and the quartiles of those after it."""

    first: float
    lower: float
    median: float
    upper: float
    repeats: int

    def __str__(self) -> str:
        return (
            f"{self.median:.2f} ms (median of {self.repeats}; middle half {self.lower:.2f}–"
            f"{self.upper:.2f}; first call {self.first:.2f})"
        )


def timed(function: Callable[[], Result], *, repeats: int = 200) -> tuple[Result, Timing]:
    """Call `function` once, then `repeats` times more; return its result and how long it took.

    Parameters
    ----------
    function : callable
        Called without arguments.
    repeats : int, optional
        At least 2.

    Returns
    -------
    result, Timing
    """
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        result = function()
        times.append((time.perf_counter() - start) * 1000)
    lower, median, upper = statistics.quantiles(times[1:], n=4)
    return result, Timing(times[0], lower, median, upper, repeats)


def document_text(client: redis.Redis, key: str, *, most: int = 4) -> str:
    """Return a document as it lies in Redis; of `header`, only the first `most` members."""
    document = json.loads(client.execute_command("JSON.GET", key))
    header = document["header"]
    if "thumbnail" in document:
        document["thumbnail"] = f"({len(document['thumbnail'])} grey levels)"
    document["header"] = dict(list(header.items())[:most])
    document["header"] = document.pop("header")  # the longest last
    text = json.dumps(document, indent=2, ensure_ascii=False)
    # A list of plain values takes one line; no string has a line break of its own in JSON.
    plain_list = r"\[\n *([^][{}]*)\n *\]"
    text = re.sub(plain_list, lambda found: "[" + re.sub(r"\n *", " ", found[1]) + "]", text)
    return text.replace("\n  }\n}", f",\n    … {len(header) - most} more\n  }}\n}}")


class Table:
    """A table to show as it is: nothing shortened, thousands set apart, rows unnumbered."""

    def __init__(self, frame: pd.DataFrame) -> None:
        self._cells = frame.map(lambda cell: f"{cell:,}" if isinstance(cell, Integral) else cell)

    def __repr__(self) -> str:
        return self._cells.to_string(index=False)

    def _repr_html_(self) -> str:
        with pd.option_context("display.max_colwidth", None):
            return self._cells.to_html(index=False, border=0)


def answer(found: pd.DataFrame) -> Table:
    """Return a table of `find` as it is read best: without keys, with dates as 2004-08-26."""
    shown = found.drop(columns="key")
    for column in shown.columns[shown.columns.str.endswith("Date")]:
        days = pd.to_datetime(shown[column].astype("string"), format="%Y%m%d")
        shown[column] = days.dt.strftime("%Y-%m-%d").fillna("")
    return Table(shown)


def hex_dump(data: bytes, start: int, length: int) -> str:
    """Return `length` bytes of `data` from `start`, 16 a line: offset, hexadecimal, ASCII."""
    lines = []
    for offset in range(start, min(start + length, len(data)), 16):
        row = data[offset : offset + 16]
        text = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in row)
        lines.append(f"{offset:08x}  {row.hex(' '):47}  {text}")
    return "\n".join(lines)


def clear(store: DicomStore, under: str) -> None:
    """Delete every file stored below `under`, and what a load that was killed left there."""
    for key in store.client.scan_iter(f"file:{under}/*", count=1000):
        store.delete(key.decode())
    store.sweep(under=under)


def key_counts(store: DicomStore, under: str) -> pd.Series[int]:
    """Return how many keys in this Redis belong to files below `under`, and how many do not."""
    below = sum(1 for _ in store.client.scan_iter(f"*file:{under}/*", count=1000))
    counts = {"of this notebook": below, "all others": store.client.dbsize() - below}
    return pd.Series(counts, name="keys")


def memory_table(store: DicomStore, report: pd.DataFrame) -> Table:
    """Return what the loaded files of a report take on disk, and their chunks in Redis (bytes)."""
    loaded = report[report["key"] != ""]
    chunks = [chunk for key in loaded["key"] for chunk in store.manifest(key).chunk_keys()]
    in_redis = sum(store.client.memory_usage(chunk, samples=0) or 0 for chunk in chunks)
    on_disk = loaded["size"].sum()
    row = {"files": len(loaded), "bytes on disk": on_disk, "chunks": len(chunks)}
    more = {"bytes in Redis": in_redis, "ratio": f"{in_redis / on_disk:.3f}"}
    return Table(pd.DataFrame([row | more]))


def draw_image(axes: Axes, dataset: Dataset, *, frame: int = 0, title: str | None = None) -> None:
    """Draw one frame into `axes`: windowed, in its pixels' aspect, captioned."""
    image = rendering.render(dataset, frame)
    axes.imshow(image, cmap="gray", vmin=0, vmax=255, aspect=rendering.aspect(dataset))
    lines = (rendering.caption(dataset) if title is None else title).splitlines()
    wrapped = [textwrap.fill(line, CAPTION_CHARACTERS) for line in lines]
    axes.set_title("\n".join(wrapped), fontsize=CAPTION_SIZE)
    axes.set_anchor("N")  # captions in a row stand at one height
    axes.set_axis_off()


def show_image(image: bytes, *, frame: int = 0, title: str | None = None) -> Figure:
    """Return a figure of one frame of a DICOM file.

    Parameters
    ----------
    image : bytes
        The file.
    frame : int, optional
        From 0.
    title : str, optional
        Modality, size and transfer syntax by default.

    Returns
    -------
    matplotlib.figure.Figure
    """
    figure, axes = plt.subplots(figsize=(4.5, 4.8), layout="constrained")
    draw_image(axes, rendering.read_dataset(image), frame=frame, title=title)
    return _finished(figure)


def gallery(store: DicomStore, names: Sequence[str], *, columns: int = 5) -> Figure:
    """Return a figure of stored images, each captioned.

    Parameters
    ----------
    store : DicomStore
    names : sequence of str
        As for :meth:`DicomStore.read`.
    columns : int, optional
        Images in a row.

    Returns
    -------
    matplotlib.figure.Figure
    """
    rows = -(-len(names) // columns)
    figure, grid = plt.subplots(
        rows,
        columns,
        figsize=(WIDTH_INCHES, 2.4 * rows),
        layout="constrained",
        squeeze=False,
    )
    for axes in grid.flat:
        axes.set_axis_off()
    for name, axes in zip(names, grid.flat, strict=False):
        draw_image(axes, rendering.read_dataset(store.read(name)))
    return _finished(figure)


def bars(counts: pd.Series[Any], title: str, *, xlabel: str = "images") -> Figure:
    """Return a bar chart of counts by value, largest on top, each bar with its number."""
    figure, axes = plt.subplots(
        figsize=(WIDTH_INCHES, 0.9 + 0.36 * len(counts)), layout="constrained"
    )
    drawn = axes.barh([str(value) for value in counts.index], counts.to_numpy(), color=BLUE)
    axes.bar_label(drawn, padding=3)
    axes.invert_yaxis()
    axes.set(title=title, xlabel=xlabel, ylabel=str(counts.index.name))
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.08)
    return _finished(figure)


def frames_of(store: DicomStore, name: str, numbers: Sequence[int], title: str) -> Figure:
    """Return a figure of some frames of a stored image, fetching little more than them."""
    size = (WIDTH_INCHES, 3.4)
    figure, row = plt.subplots(1, len(numbers), figsize=size, layout="constrained", squeeze=False)
    header = store.header(name)
    longest = max(header.Rows, header.Columns)
    with store.open(name) as file:
        for number, axes in zip(numbers, row.flat, strict=True):
            frame = rendering.render_file(
                cast(BinaryIO, file), number, header.file_meta.TransferSyntaxUID, longest=longest
            )
            axes.imshow(frame, cmap="gray", vmin=0, vmax=255, aspect=rendering.aspect(header))
            axes.set_title(f"frame {number}", fontsize=9)
            axes.set_axis_off()
    figure.suptitle(title)
    return _finished(figure)


def frame_costs(store: DicomStore, names: Iterable[str]) -> Table:
    """Return what the middle frame of each image costs, beside its whole file."""
    rows = []
    for name in names:
        header = store.header(name)
        middle = int(header.NumberOfFrames) // 2
        frame, one = timed(partial(store.frame_bytes, name, middle), repeats=50)
        whole, all_of_it = timed(partial(store.read, name), repeats=5)
        rows.append(
            {
                "image": Path(name).name,
                "transfer syntax": header.file_meta.TransferSyntaxUID.name.split(" (")[0],
                "frames": int(header.NumberOfFrames),
                "offset table": _offset_table(store, name),
                "bytes of a frame": len(frame),
                "bytes of the file": len(whole),
                "ms a frame": f"{one.median:.2f}",
                "ms the file": f"{all_of_it.median:.2f}",
            }
        )
    return Table(pd.DataFrame(rows))


def _offset_table(store: DicomStore, name: str) -> str:
    """Return what an image says of where its frames begin (PS3.5 A.4)."""
    with store.open(name) as stored:
        file = cast(BinaryIO, stored)
        header = pydicom.dcmread(file, stop_before_pixels=True)
        if not header.file_meta.TransferSyntaxUID.is_encapsulated:
            return "needs none"
        if "ExtendedOffsetTable" in header:
            return "extended"
        file.seek(12, os.SEEK_CUR)  # tag, VR and length of Pixel Data
        return "basic" if parse_basic_offsets(file) else "empty"


def cuts(volume: Volume, title: str, *, window: tuple[float, float] = (40, 400)) -> Figure:
    """Return a figure of a volume's middle axial, coronal and sagittal cut, in true proportions.

    Parameters
    ----------
    volume : Volume
        Axial slices.
    title : str
    window : tuple of float, optional
        Centre and width, in the volume's values; soft tissue by default.
    """
    (centre, width), array = window, volume.array
    if volume.affine[2, 0] > 0:  # the first slice is the one nearest to the feet; show the head up
        array = array[::-1]
    z, y, x = (number // 2 for number in array.shape)
    dz, dy, dx = volume.spacing
    panels = [
        (f"axial, slice {z}", array[z], dy, dx, "to the left, mm", "to the back, mm"),
        (f"coronal, row {y}", array[:, y], dz, dx, "to the left, mm", "to the feet, mm"),
        (f"sagittal, column {x}", array[:, :, x], dz, dy, "to the back, mm", "to the feet, mm"),
    ]
    figure, row = plt.subplots(1, 3, figsize=(WIDTH_INCHES, 3.6), layout="constrained")
    for (name, cut, down, across, xlabel, ylabel), axes in zip(panels, row, strict=True):
        extent = (0, cut.shape[1] * across, cut.shape[0] * down, 0)
        low, high = centre - width / 2, centre + width / 2
        axes.imshow(cut, cmap="gray", vmin=low, vmax=high, extent=extent, aspect="equal")
        axes.set_title(name, fontsize=9)
        axes.set_xlabel(xlabel, fontsize=CAPTION_SIZE)
        axes.set_ylabel(ylabel, fontsize=CAPTION_SIZE)
        axes.tick_params(labelsize=CAPTION_SIZE)
    figure.suptitle(title)
    return _finished(figure)


def volume_times(store: DicomStore, under: str, folder: Path) -> Table:
    """Return the median time to a whole series from Redis, and from local files with pydicom."""

    def from_files() -> np.ndarray[Any, Any]:
        slices = [pydicom.dcmread(path) for path in folder.iterdir()]
        slices.sort(key=lambda one: one.ImagePositionPatient[2])
        return np.stack([apply_rescale(one.pixel_array, one).astype(np.int16) for one in slices])

    ways = {
        "store.volume(...), from Redis": lambda: store.volume(under=under).array,
        "pydicom, from the local disk's cache": from_files,
    }
    rows = []
    for way, function in ways.items():
        array, timing = timed(function, repeats=3)
        rows.append(
            {
                "300 slices of 512 × 512".replace("300", str(len(array))): way,
                "ms (median of 3)": round(timing.median),
                "slices a second": round(1000 * len(array) / timing.median),
            }
        )
    return Table(pd.DataFrame(rows))


def slide_size(folder: Path, *, most: int = 1_000_000_000) -> int:
    """Return how large a slide (bytes) fits into a quarter of what is free, at most `most`.

    It lies on the disk of `folder`, in Redis, and once in the notebook.
    """
    free = min(psutil.virtual_memory().available, shutil.disk_usage(folder).free)
    return max(5_000_000, min(most, free // 4))


def times_by_size(store: DicomStore, names: Iterable[str]) -> pd.DataFrame:
    """Return the median times (ms) to read a part and the whole of each file, by its size."""
    rows = {}
    for name in names:
        size = store.manifest(name).size
        buffer = bytearray(size)

        def part(name: str = name, size: int = size) -> None:
            with store.open(name) as file:
                file.seek(size // 2)
                file.read(65_536)

        def whole(name: str = name, buffer: bytearray = buffer) -> None:
            store.read(name, into=buffer)

        rows[size] = {
            "64 KiB from its middle": timed(part, repeats=30)[1].median,
            "the whole file": timed(whole, repeats=2)[1].median,
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("size")


def heat_map(counts: pd.DataFrame, title: str) -> Figure:
    """Return a heat map of a cross table of counts, each cell with its number.

    Columns that are years have no gap: a year without files is there, empty.
    """
    years = pd.to_numeric(pd.Series(counts.columns.astype(str)), errors="coerce")
    if years.notna().all():
        every_year = range(int(years.min()), int(years.max()) + 1)
        counts = counts.set_axis(years.astype(int), axis=1).reindex(columns=every_year)
        counts = counts.fillna(0).astype(int).rename_axis(columns="year")
    figure, axes = plt.subplots(
        figsize=(WIDTH_INCHES, 1.2 + 0.3 * len(counts)), layout="constrained"
    )
    shades = np.log1p(counts.to_numpy())
    axes.imshow(shades, cmap="Blues", aspect="auto")
    for (row, column), count in np.ndenumerate(counts.to_numpy()):
        if count:
            color = "white" if shades[row, column] > 0.6 * shades.max() else "black"
            axes.text(column, row, str(count), ha="center", va="center", color=color, fontsize=9)
    axes.set_xticks(range(counts.shape[1]), [str(value) for value in counts.columns], rotation=60)
    axes.set_yticks(range(counts.shape[0]), [str(value) for value in counts.index])
    axes.set(title=title, xlabel=str(counts.columns.name), ylabel=str(counts.index.name))
    return _finished(figure)


def nearest(store: DicomStore, name: str, found: pd.DataFrame, title: str) -> Figure:
    """Return a figure of an image and those that look like it, with their distances."""
    figure, row = plt.subplots(1, len(found) + 1, figsize=(WIDTH_INCHES, 2.8), layout="constrained")
    caption = f"{Path(name).name}\nasked for"
    draw_image(row[0], rendering.read_dataset(store.read(name)), title=caption)
    for hit, axes in zip(found.itertuples(), row[1:], strict=True):
        caption = f"{hit.imageName}\ndistance {hit.distance:.1f}"
        draw_image(axes, rendering.read_dataset(store.read(str(hit.key))), title=caption)
    figure.suptitle(title)
    return _finished(figure)


def latency_by_size(times: pd.DataFrame) -> Figure:
    """Return a figure of times (ms, one column a way to read) against file size (bytes, index)."""
    figure, axes = plt.subplots(figsize=(WIDTH_INCHES, 3.8), layout="constrained")
    most = np.ceil(times.iloc[:, 0].max() * 10) / 10
    smallest, largest = (size / 1e6 for size in (times.index.min(), times.index.max()))
    sizes = f"files of {smallest:.2g} to {largest:,.0f} MB"
    title = f"{times.columns[0]}: at most {most:.1f} ms in {sizes}"
    styles = zip(times.columns, (BLUE, GREY), ("o-", "s--"), strict=False)
    for name, color, style in styles:
        axes.plot(times.index / 1e6, times[name], style, color=color, label=name)
    axes.set(xscale="log", yscale="log", xlabel="file size, MB", ylabel="ms", title=title)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return _finished(figure)


def scroll(store: DicomStore, names: Any = None, **conditions: Any) -> StackViewer:
    """Return a viewer to scroll through a series, or through the frames of one instance.

    Parameters
    ----------
    store : DicomStore
    names, **conditions
        As for :meth:`DicomStore.volume`: ``scroll(store, seriesInstanceUID=uid)``.
    """
    return open_stack(store, names, **conditions)


def look_around(store: DicomStore, name: str) -> SlideViewer:
    """Return a viewer to pan and zoom in a stored slide; only the tiles in view are fetched."""
    return SlideViewer(store, name)


def _finished(figure: Figure) -> Figure:
    # Shown once, as the value of its cell, not again when the cell ends.
    plt.close(figure)
    return figure
