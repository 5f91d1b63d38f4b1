"""A series of 300 slices out of Redis, beside the same files in the page cache; and late frames.

A made-up CT is read file by file, all at once, and as one array; of an instance of 400 frames the
last one is fetched. What a method returns is kept until it has ended. Run it with `make
bench-series`.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pydicom
from pydicom.uid import SecondaryCaptureImageStorage, generate_uid
from reporting import extent, machine, milliseconds, ratios, timed

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

from demo.ct import write_sample_ct  # noqa: E402 - run in place, not installed
from dicomstore import DicomStore, connect  # noqa: E402
from dicomstore.server.embedded import RedisServer  # noqa: E402

SLICES, FRAMES = 300, 400
TABLE = PROJECT / "benchmarks" / "series.md"
READS, MANY = "`read` of each of 300 files", "`read_many` of them"
FILES = "the 300 files, read from the page cache"
VOLUME = "`volume` of the series"
PYDICOM = "pydicom and numpy, from the page cache"
FRAME, MGET = "`frame_bytes` of the last of 400 frames", "the same chunks by a bare MGET"
#: Ours, and the method that it is compared with.
PAIRS = ((MANY, READS), (MANY, FILES), (VOLUME, PYDICOM), (VOLUME, FILES), (FRAME, MGET))


def write_frames(path: Path) -> None:
    """Write an instance of 400 frames of 512 KiB, uncompressed."""
    dataset = pydicom.Dataset()
    dataset.SOPClassUID, dataset.SOPInstanceUID = SecondaryCaptureImageStorage, generate_uid()
    dataset.set_pixel_data(np.zeros((512, 512), np.uint16), "MONOCHROME2", 16)
    dataset.NumberOfFrames = FRAMES
    frames = np.random.default_rng(1).integers(0, 4096, (FRAMES, 512, 512), np.uint16)
    dataset.PixelData = frames.tobytes()
    dataset.save_as(path, enforce_file_format=True)


def stacked(files: list[Path]) -> Any:
    """Return the slices as one array in Hounsfield units, in order of their position."""
    slices = [pydicom.dcmread(file) for file in files]
    slices.sort(key=lambda each: each.ImagePositionPatient[2])
    first = slices[0]
    array = np.stack([each.pixel_array for each in slices]).astype(np.int16)
    array *= np.int16(first.RescaleSlope)
    array += np.int16(first.RescaleIntercept)
    return array


def measure(folder: Path, rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each method, round by round."""
    series = write_sample_ct(folder / "ct", slices=SLICES)
    files = sorted(path for path in series.rglob("*") if path.is_file())
    multi = folder / "frames.dcm"
    write_frames(multi)
    with RedisServer() as server, connect(server.url) as client:
        store = DicomStore(client, thumbnails=False, progress=False)
        store.load(series, under="ct")
        store.load(multi)
        keys = list(store.find(under="ct")["key"])
        manifest = store.manifest(multi.name)
        touched = manifest.chunk_keys(range(manifest.count - 3, manifest.count))
        methods: dict[str, Callable[[], Any]] = {
            READS: lambda: [store.read(key) for key in keys],
            MANY: lambda: store.read_many(keys),
            FILES: lambda: [file.read_bytes() for file in files],
            VOLUME: lambda: store.volume(keys),
            PYDICOM: lambda: stacked(files),
            FRAME: lambda: store.frame_bytes(multi.name, FRAMES - 1),
            MGET: lambda: client.execute_command("MGET", *touched),
        }
        if not np.array_equal(methods[VOLUME]().array, methods[PYDICOM]()):
            raise AssertionError("The volume differs from what pydicom and numpy make.")
        seconds: dict[str, list[float]] = {name: [] for name in methods}
        for number in range(rounds + 1):
            for name, method in methods.items():
                # A short call many times: the first one finds the processor's caches empty.
                calls = [timed(method) for _ in range(20 if name in (FRAME, MGET) else 1)]
                if number:  # the first round fills caches
                    seconds[name].append(statistics.median(calls))
            print(f"round {number} of {rounds}", flush=True)
    return seconds


def table(seconds: dict[str, list[float]]) -> str:
    """Return the results as Markdown."""
    lines = [
        f"{SLICES} slices of 512 x 512, 16 bits; {len(seconds[READS])} interleaved rounds; "
        f"{machine()} What a method returns is kept until it has ended, so each takes fresh "
        "memory for it.",
        "",
        "| method | median, ms | lowest to highest |",
        "|---|---:|---:|",
    ]
    for name, times in seconds.items():
        low, median, high = extent(times)
        lines.append(f"| {name} | {median:.1f} | {low:.1f} to {high:.1f} |")
    lines += ["", *ratios(seconds, PAIRS)]
    fresh = [milliseconds(lambda: np.empty(150 * 2**20, np.uint8).fill(1)) for _ in range(5)]
    lines += [
        "",
        f"To fill 150 MiB of fresh memory with one value takes {statistics.median(fresh):.0f} ms "
        f"on this machine ({min(fresh):.0f} to {max(fresh):.0f}). `volume` makes "
        f"{SLICES / statistics.median(seconds[VOLUME]):,.0f} slices a second.",
    ]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9, help="counted rounds (default: 9)")
    arguments = parser.parse_args(argv)
    if arguments.rounds < 1:
        print("--rounds is at least 1.", file=sys.stderr)
        return 2
    with TemporaryDirectory() as folder:
        TABLE.write_text(table(measure(Path(folder), arguments.rounds)))
    print(f"\n{TABLE.read_text()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
