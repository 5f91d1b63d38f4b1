"""What one touches of a stored file against the whole of it: latency as the file grows.

A header, a frame, a tile and 64 KiB at random, of files of growing size: out of Redis in part, out
of Redis after reading the whole file, from the local disk, and from an SQLite blob (incremental
I/O). All in turn, several times over; the table gives medians and the spread, and what the largest
file costs in bytes and round trips. Run it with `make bench-partial`.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import mmap
import shutil
import sqlite3
import statistics
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import psutil
import pydicom
import tifffile
import tiffslide
from pydicom.pixels import pixel_array
from reporting import machine, milliseconds

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

from demo.cine import write_sample_cine  # noqa: E402
from demo.slide import TILE, write_sample_slide  # noqa: E402
from dicomstore import DicomStore, connect  # noqa: E402
from dicomstore.blobs.reader import ChunkReader  # noqa: E402 - not installed, but run in place
from dicomstore.server.embedded import RedisServer  # noqa: E402

MIB = 1024 * 1024
SIZES_MIB = (50, 200, 600, 1536)
#: SQLite and the page caches aside, the largest slide lies in Redis twice, and once in a buffer.
MEMORY_FACTOR = 4
SMALL_CHUNK = 30 * 1024
WHOLE_ROUNDS = 2  # of what takes seconds
READ_BYTES = 64 * 1024
READS = 20
TABLE = PROJECT / "benchmarks" / "partial.md"
FIGURE = PROJECT / "images" / "partial_reads.png"

US, WHOLE = "Redis, in part (this project)", "Redis, the whole file first"
DISK, BLOB = "local file, page cache", "SQLite blob, incremental"
#: Colour, marker and line: any one of them tells the ways apart.
STYLES = {
    US: ("#0b4fa8", "o", "-"),
    WHOLE: ("#c4561c", "s", "--"),
    DISK: ("#6b7280", "^", ":"),
    BLOB: ("#2f9e77", "D", "-."),
}


# --- what is read --------------------------------------------------------------------------------


def header(file: Any) -> object:
    return pydicom.dcmread(file, stop_before_pixels=True).NumberOfFrames


def frame(file: Any) -> object:
    count = int(pydicom.dcmread(file, stop_before_pixels=True).NumberOfFrames)
    file.seek(0)
    return pixel_array(file, index=count // 2).sum()


def tifffile_tile(file: Any) -> object:
    with tifffile.TiffFile(file) as tiff:
        page: Any = tiff.pages[0]
        number = len(page.dataoffsets) // 2
        tiff.filehandle.seek(page.dataoffsets[number])
        data = tiff.filehandle.read(page.databytecounts[number])
        return page.decode(data, number, jpegtables=page.jpegtables)[0].sum()


def tiffslide_tile(file: Any) -> object:
    with tiffslide.TiffSlide(file) as slide:
        x, y = (side // 2 // TILE * TILE for side in slide.dimensions)
        return np.asarray(slide.read_region((x, y), 0, (TILE, TILE))).sum()


def random_reads(file: Any) -> object:
    size = file.seek(0, io.SEEK_END)
    digest = hashlib.sha256()
    for position in np.random.default_rng(READS).integers(0, size - READ_BYTES, READS):
        file.seek(int(position))
        digest.update(file.read(READ_BYTES))
    return digest.digest()


class Task(NamedTuple):
    """Something to read, of the slide or of the multi-frame instance."""

    label: str
    read: Callable[[Any], object]
    of_slide: bool


TASKS = (
    Task("header of an instance", header, False),
    Task("one frame of 512 KiB", frame, False),
    Task("one tile, tifffile", tifffile_tile, True),
    Task("one tile, tiffslide", tiffslide_tile, True),
    Task(f"{READS} random reads of 64 KiB", random_reads, True),
)


# --- from where ----------------------------------------------------------------------------------


class Raw(io.RawIOBase):
    """What has read, seek and tell, as a file of Python's."""

    name = "raw"  # pydicom asks for it

    def __init__(self, inner: sqlite3.Blob | mmap.mmap) -> None:
        self._inner = inner

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._inner.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        self._inner.seek(offset, whence)  # type: ignore[arg-type]
        return self._inner.tell()

    def tell(self) -> int:
        return self._inner.tell()


class Stored:
    """One file in all four places."""

    def __init__(self, store: DicomStore, path: Path) -> None:
        self.store, self.path = store, path
        store.load(path)
        self.size = path.stat().st_size
        self.memory = mmap.mmap(-1, self.size)
        self.database = path.with_suffix(".sqlite")
        with contextlib.closing(sqlite3.connect(self.database)) as connection:
            # By default, SQLite takes no value of more than 10^9 bytes.
            self.has_blob = self.size <= connection.getlimit(sqlite3.SQLITE_LIMIT_LENGTH)
            if self.has_blob:
                with connection:
                    connection.execute("CREATE TABLE file (bytes BLOB)")
                    connection.execute("INSERT INTO file VALUES (zeroblob(?))", (self.size,))
                blob = connection.blobopen("file", "bytes", 1)
                with connection, path.open("rb") as file, blob:
                    while piece := file.read(MIB):
                        blob.write(piece)

    def remove(self) -> None:
        self.store.delete(self.path.name)
        del self.memory
        self.path.unlink()
        self.database.unlink()

    @contextlib.contextmanager
    def blob(self) -> Iterator[Any]:
        # tiffslide reads in a thread of its own.
        opened = sqlite3.connect(self.database, check_same_thread=False)
        with contextlib.closing(opened) as connection:
            yield io.BufferedReader(Raw(connection.blobopen("file", "bytes", 1, readonly=True)))

    @contextlib.contextmanager
    def whole(self) -> Iterator[Any]:
        self.store.read(self.path.name, into=self.memory)
        self.memory.seek(0)
        yield io.BufferedReader(Raw(self.memory))

    def ways(self) -> dict[str, Callable[[], Any]]:
        """Return how to open the file in each place that has it."""
        ways: dict[str, Callable[[], Any]] = {
            US: lambda: self.store.open(self.path.name),
            WHOLE: self.whole,
            DISK: lambda: self.path.open("rb"),
        }
        return ways | ({BLOB: self.blob} if self.has_blob else {})


# --- measuring -----------------------------------------------------------------------------------

Times = dict[tuple[str, str], list[float]]  # ms by task and way


def measure(stored: Stored, tasks: list[Task], rounds: int) -> Times:
    """Take every task from every place in turn; they must all see the same."""
    times: Times = {(task.label, way): [] for task in tasks for way in stored.ways()}
    for number in range(rounds + 1):
        for task in tasks:
            seen = set()
            for way, opened in stored.ways().items():
                if way == WHOLE and number > WHOLE_ROUNDS:
                    continue

                def take(task: Task = task, opened: Callable[[], Any] = opened) -> None:
                    with opened() as file:
                        seen.add(task.read(file))  # noqa: B023 - called at once

                taken = milliseconds(take)
                if number:  # the first round fills caches and imports
                    times[task.label, way].append(taken)
            if len(seen) != 1:
                raise SystemExit(f"{task.label} is not the same from everywhere.")
    return times


class Null:
    """A file that forgets what is written."""

    def write(self, piece: bytes) -> int:
        return len(piece)


def costs(small: DicomStore, slide: Stored, cine: Stored, rounds: int) -> list[str]:
    """Return the rows of the table of what the largest files cost."""
    rows = []
    for task in TASKS[:4]:
        source = slide if task.of_slide else cine
        with source.store.open(source.path.name) as file:
            task.read(file)
        rows.append(_row(task.label, file))
    name = slide.path.name
    small.load(slide.path, under="small")
    for task in TASKS[2:4]:
        with small.open(f"small/{name}") as file:
            task.read(file)
        rows.append(_row(f"{task.label}, chunks of 30 KB", file))
    opening: dict[str, list[float]] = {name: [], f"small/{name}": []}
    for _ in range(50):
        for stored, taken in opening.items():
            taken.append(milliseconds(partial(small.open, stored)))
    count = small.manifest(f"small/{name}").count
    small.delete(f"small/{name}")
    large_ms, small_ms = map(statistics.median, opening.values())
    more = small_ms - large_ms
    rows.append(f"| opening {count} chunks of 30 KB instead of 256 KB | {more:+.2f} ms |")
    whole_ways: dict[str, Callable[[Any], object]] = {
        "`shutil.copyfileobj`": lambda file: shutil.copyfileobj(file, Null()),
        "`hashlib.file_digest`": lambda file: hashlib.file_digest(file, "sha256"),
    }
    on_disk = "`hashlib.file_digest`, of the local file"
    ratios: dict[str, list[float]] = {label: [] for label in [*whole_ways, on_disk]}
    for _ in range(rounds):
        whole = milliseconds(lambda: slide.store.read(name, into=slide.memory))
        for label, way in whole_ways.items():
            with slide.store.open(name) as file:
                ratios[label].append(milliseconds(partial(way, file)) / whole)
        with slide.path.open("rb") as disk:
            ratios[on_disk].append(
                milliseconds(lambda: hashlib.file_digest(disk, "sha256")) / whole
            )
    for label, found in ratios.items():
        rows.append(
            f"| {label}, over `store.read` into a buffer | × {statistics.median(found):.2f} "
            f"({min(found):.2f} to {max(found):.2f}) |"
        )
    return rows


def _row(label: str, file: ChunkReader) -> str:
    fetched = f"{file.bytes_fetched} B ({file.bytes_fetched / file.size:.3%})"
    return f"| {label} | {fetched}, {file.round_trips} round trips |"


# --- reporting -----------------------------------------------------------------------------------


def table(results: dict[int, Times], held: list[str], rounds: int) -> str:
    """Return the results as Markdown."""
    lines = [
        f"{rounds} interleaved rounds ({WHOLE_ROUNDS} of the whole file); {machine()} "
        "Medians in ms, with the lowest and the highest; every time includes opening the file. "
        "SQLite takes no blob of more than 10^9 bytes.",
        "",
        "| what | from | " + " | ".join(f"{size} MiB" for size in results) + " |",
        "|---|---|" + "---:|" * len(results),
    ]
    for task in TASKS:
        for way in STYLES:
            cells = [_cell(times.get((task.label, way))) for times in results.values()]
            lines.append(f"| {task.label} | {way} | " + " | ".join(cells) + " |")
    lines += ["", f"| at {max(results)} MiB | cost |", "|---|---:|", *held]
    return "\n".join(lines) + "\n"


def _cell(times: list[float] | None) -> str:
    if not times:
        return "–"
    return f"{statistics.median(times):.1f} ({min(times):.1f} to {max(times):.1f})"


def draw(report: str) -> None:
    """Draw latency against file size, a panel a task, as `report` (the table) has it."""
    rows = [line.strip("| ").split(" | ") for line in report.splitlines() if line.startswith("| ")]
    sizes = [int(cell.split()[0]) for cell in rows[0][2:]]
    medians = {
        (row[0], row[1]): [float(cell.split()[0]) for cell in row[2:] if cell != "–"]
        for row in rows[1:]
        if len(row) == len(rows[0])
    }
    figure, panels = plt.subplots(
        1, len(TASKS), figsize=(13, 4.2), sharey=True, layout="constrained", facecolor="white"
    )
    for axes, task in zip(panels, TASKS, strict=True):
        for way, (colour, marker, line) in STYLES.items():
            found = medians[task.label, way]  # SQLite lacks the largest
            axes.plot(sizes[: len(found)], found, line, color=colour, marker=marker, label=way)
        axes.set(title=task.label, xlabel="file, MiB", xscale="log", yscale="log")
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].yaxis.set_major_formatter("{x:g}")
    panels[0].set_ylabel("open to result, ms")
    steady = [time for task in TASKS[:2] for time in medians[task.label, US]]
    figure.suptitle(
        f"From {sizes[0]} to {sizes[-1]} MiB, a header or a frame takes {min(steady):.1f} to "
        f"{max(steady):.1f} ms; a tile takes longer where the slide's list of tiles is longer"
    )
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(STYLES), frameon=False)
    figure.savefig(FIGURE, dpi=120)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=SIZES_MIB, help="MiB of the files, ascending"
    )
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds (default: 5)")
    parser.add_argument("--draw", action="store_true", help="only draw the kept table again")
    arguments = parser.parse_args(argv)
    if arguments.draw:
        draw(TABLE.read_text())
        return 0
    free = psutil.virtual_memory().available // MIB
    sizes = [size for size in arguments.sizes if MEMORY_FACTOR * size <= free]
    if len(sizes) < len(arguments.sizes):
        print(f"{free} MiB of memory are free: only {sizes} MiB are measured.", file=sys.stderr)
    if not sizes:
        return 1
    results: dict[int, Times] = {}
    with TemporaryDirectory() as folder, RedisServer() as server:
        client = connect(server.url)
        store = DicomStore(client, progress=False)
        small = DicomStore(client, chunk_size=SMALL_CHUNK, progress=False)
        for size in sizes:
            print(f"{size} MiB ...", flush=True)
            path = Path(folder) / "cine.dcm"
            cine = Stored(store, write_sample_cine(path, frames=2 * size))
            tasks = [task for task in TASKS if not task.of_slide]
            results[size] = measure(cine, tasks, arguments.rounds)
            path = Path(folder) / "slide.svs"
            slide = Stored(store, write_sample_slide(path, size=size * MIB))
            tasks = [task for task in TASKS if task.of_slide]
            results[size] |= measure(slide, tasks, arguments.rounds)
            if size == sizes[-1]:
                held = costs(small, slide, cine, arguments.rounds)
            cine.remove()
            slide.remove()
        client.close()
    TABLE.write_text(table(results, held, arguments.rounds))
    draw(TABLE.read_text())
    print(f"\n{TABLE.read_text()}\nFigure: {FIGURE.relative_to(PROJECT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
