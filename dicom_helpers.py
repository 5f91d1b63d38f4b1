"""What the notebook shows: figures, timings and dumps, so that the store needs no matplotlib."""

from __future__ import annotations

import json
import re
import shutil
import statistics
import textwrap
import time
from collections.abc import Callable, Iterable, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar, cast

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import psutil
import redis
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, NullFormatter
from PIL.Image import Image
from pydicom.dataset import Dataset
from pydicom.pixels import pixel_array

from demo.viewers.slide import SlideViewer
from demo.viewers.stack import StackViewer, open_stack
from dicomstore import DicomStore, connect, containing, not_, words
from dicomstore.imaging import rendering

#: Legible on white and on dark pages alike, and in greyscale.
BLUE = "#2a6fbb"
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
    if "descriptor" in document:
        document["descriptor"] = f"({len(document['descriptor'])} grey levels)"
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


def hex_dump(data: bytes, start: int, length: int) -> str:
    """Return `length` bytes of `data` from `start`, 16 a line: offset, hexadecimal, ASCII."""
    lines = []
    for offset in range(start, min(start + length, len(data)), 16):
        row = data[offset : offset + 16]
        text = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in row)
        lines.append(f"{offset:08x}  {row.hex(' '):47}  {text}")
    return "\n".join(lines)


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


def one_of_each_kind(store: DicomStore, *, most: int = 15) -> list[str]:
    """Return the paths of images that differ in modality or transfer syntax, one of each kind.

    Of each kind the one with the most rows; first one of each modality, then a second, and so on.
    What cannot be decoded is passed over: some files are damaged on purpose.
    """
    images = store.find(columns=("modality", "transferSyntaxUID", "rows"))
    images = images[images["rows"].notna()].sort_values("rows", ascending=False, kind="stable")
    drawn = images[[_can_be_drawn(store.read(path)) for path in images["path"]]]
    kinds = drawn.groupby(["modality", "transferSyntaxUID"], as_index=False).first()
    kinds["turn"] = kinds.groupby("modality").cumcount()
    return list(kinds.sort_values(["turn", "modality"])["path"][:most])


def _can_be_drawn(image: bytes) -> bool:
    try:
        rendering.render(rendering.read_dataset(image))
    except (AttributeError, LookupError, NotImplementedError, RuntimeError, ValueError):
        return False
    return True


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


def frames_of(store: DicomStore, name: str, numbers: Sequence[int]) -> Figure:
    """Return a figure of some frames of a stored image, fetching little more than them."""
    figure, row = plt.subplots(
        1, len(numbers), figsize=(WIDTH_INCHES, 3.4), layout="constrained", squeeze=False
    )
    with store.open(name) as file:
        dataset = store.header(name)
        for number, axes in zip(numbers, row.flat, strict=True):
            frame = rendering.render_file(
                cast(BinaryIO, file),
                number,
                dataset.file_meta.TransferSyntaxUID,
                longest=max(dataset.Rows, dataset.Columns),
            )
            axes.imshow(frame, cmap="gray", vmin=0, vmax=255, aspect=rendering.aspect(dataset))
            axes.set_title(f"frame {number}", fontsize=9)
            axes.set_axis_off()
    return _finished(figure)


def frame_costs(store: DicomStore, names: Iterable[str]) -> Table:
    """Return what the middle frame of each image costs, against its whole file."""
    rows = []
    for name in names:
        with store.open(name) as file:
            frames = int(store.header(name).NumberOfFrames)
            frame = pixel_array(cast(BinaryIO, file), index=frames // 2)
            rows.append(
                {
                    "image": name,
                    "frames": frames,
                    "bytes of the frame": frame.nbytes,
                    "bytes of the file": file.size,
                    "bytes fetched": file.bytes_fetched,
                    "round trips": file.round_trips,
                }
            )
    return Table(pd.DataFrame(rows).sort_values("bytes of the file", ascending=False))


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
            "the whole file": timed(whole, repeats=5)[1].median,
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("size")


def slide_views(
    overview: Image, region: Image, corner: tuple[int, int], dimensions: tuple[int, int]
) -> Figure:
    """Return a figure of a slide: the overview with a box, and what is in the box.

    Parameters
    ----------
    overview, region : PIL.Image.Image
        The whole slide made small, and a part of it in full resolution.
    corner, dimensions : tuple of int
        Where the region begins, and how large the slide is; x and y, width and height, in pixels
        of full resolution.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH_INCHES, 4), layout="constrained")
    left.imshow(overview)
    scale = overview.width / dimensions[0]
    # A box of its true size would not be seen.
    width, height = (max(side * scale, overview.width / 40) for side in region.size)
    at = (corner[0] * scale - width / 2, corner[1] * scale - height / 2)
    left.add_patch(Rectangle(at, width, height, fill=False, edgecolor="black", linewidth=2))
    left.set_title(f"{dimensions[0]:,} × {dimensions[1]:,} pixels; the box is enlarged", fontsize=9)
    right.imshow(region)
    right.set_title(f"{region.width} × {region.height} pixels of it at full size", fontsize=9)
    for axes in (left, right):
        axes.set_anchor("N")
        axes.set_axis_off()
    return _finished(figure)


def heat_map(counts: pd.DataFrame, title: str) -> Figure:
    """Return a heat map of a cross table of counts, each cell with its number."""
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


def nearest(store: DicomStore, name: str, found: pd.DataFrame) -> Figure:
    """Return a figure of an image and those that look like it, with their distances."""
    figure, row = plt.subplots(1, len(found) + 1, figsize=(WIDTH_INCHES, 2.5), layout="constrained")
    title = f"{Path(name).name}\nasked for"
    draw_image(row[0], rendering.read_dataset(store.read(name)), title=title)
    for hit, axes in zip(found.itertuples(), row[1:], strict=True):
        title = f"{hit.imageName}\ndistance {hit.distance:.1f}"
        draw_image(axes, rendering.read_dataset(store.read(str(hit.key))), title=title)
    return _finished(figure)


def skewed(report: pd.DataFrame, count: int) -> list[str]:
    """Return names of loaded files to read: half of the time one of the same tenth of them."""
    names = [Path(path).name for path in report["path"][report["key"] != ""]]
    random = np.random.default_rng(1)
    often = random.permutation(len(names))[: max(1, len(names) // 10)]
    which = np.where(
        random.random(count) < 0.5,
        random.choice(often, count),
        random.integers(len(names), size=count),
    )
    return [names[number] for number in which]


def read_through(cache: DicomStore, names: Sequence[str]) -> pd.DataFrame:
    """Read files through a cache; return for each whether it was a hit, and the time in ms."""
    rows = []
    for name in names:
        hits, start = cache.hits, time.perf_counter()
        cache.read(name)
        rows.append({"hit": cache.hits > hits, "ms": (time.perf_counter() - start) * 1000})
    return pd.DataFrame(rows)


def cache_figure(reads: pd.DataFrame, title: str) -> Figure:
    """Return a figure of a cache at work: its hit ratio as it fills, and what reads took."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH_INCHES, 3.4), layout="constrained")
    left.plot(reads["hit"].rolling(100, min_periods=20).mean(), color=BLUE)
    left.set(xlabel="reads", ylabel="hits among the last 100 reads", ylim=(0, 1))
    kinds = [reads.loc[reads["hit"], "ms"], reads.loc[~reads["hit"], "ms"]]
    names = ["hit", "miss, refilled"]
    middle = {"color": BLUE, "linewidth": 2}
    right.boxplot(kinds, tick_labels=names, showfliers=False, widths=0.4, medianprops=middle)
    right.set(ylabel="ms a read", yscale="log")
    right.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    right.yaxis.set_major_formatter("{x:g}")
    right.yaxis.set_minor_formatter(NullFormatter())
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    return _finished(figure)


def latency_by_size(times: pd.DataFrame) -> Figure:
    """Return a figure of times (ms, one column a way to read) against file size (bytes, index)."""
    figure, axes = plt.subplots(figsize=(WIDTH_INCHES, 3.8), layout="constrained")
    most = np.ceil(times.iloc[:, 0].max() * 10) / 10
    title = f"{times.columns[0]}: at most {most:.1f} ms in files of any of these sizes"
    styles = zip(times.columns, (BLUE, "#8a929b"), ("o-", "s--"), strict=False)
    for name, color, style in styles:
        axes.plot(times.index / 2**20, times[name], style, color=color, label=name)
    axes.set(xscale="log", yscale="log", xlabel="file size, MiB", ylabel="ms", title=title)
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
