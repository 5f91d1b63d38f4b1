"""A search and a small read while slides stream: how long they take beside a full-speed transfer.

For chunks of several sizes, one process receives or sends a slide again and again, while this one
searches and reads. Run it with `make bench-mixed`.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.synchronize import Event
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import psutil
import pydicom
from blake3 import blake3
from reporting import machine

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

from demo.slide import write_sample_slide  # noqa: E402 - the project is run in place
from dicomstore import DicomStore, connect  # noqa: E402
from dicomstore.blobs.manifest import DEFAULT_CHUNK_SIZE, Manifest, plan_tail  # noqa: E402
from dicomstore.blobs.memory import fresh_buffer  # noqa: E402
from dicomstore.blobs.wire import (  # noqa: E402
    REQUEST_BYTES,
    REQUESTS,
    ChunkStream,
    complete,
    crc32,
)
from dicomstore.server.embedded import RedisServer  # noqa: E402

KIB, MIB = 1024, 1024 * 1024
#: The last is the largest value that Redis takes: the slide is three of them.
CHUNK_SIZES = (30 * KIB, DEFAULT_CHUNK_SIZE, MIB, 4 * MIB, 16 * MIB, 512 * MIB)
#: For comparison, at the default chunk size.
MORE = {"requests": 16}
SMALL = "CT_small.dcm"
SEARCH = (
    "FT.SEARCH", "file:idx", "@patientSex:{M}",
    "RETURN", "2", "imageName", "studyDate", "DIALECT", "2",
)  # fmt: skip
PAUSE_S = 0.002  # between two questions
TABLE = PROJECT / "benchmarks" / "mixed.md"


def manifest(size: int, chunk_size: int) -> Manifest:
    tail = plan_tail(size, chunk_size)
    return Manifest("file:mixed.svs", "0" * 12, size, chunk_size, tail)


def stream(
    url: str, file: Path, chunk_size: int, way: str, options: dict[str, int],
    started: Event, stop: Event, speeds: Any,
) -> None:  # fmt: skip
    """In a process of its own: move the slide again and again, and tell the MiB/s of each time."""
    client: Any = connect(url)
    size = file.stat().st_size
    chunks = manifest(size, chunk_size).chunks()
    buffer = fresh_buffer(size)
    crcs: list[int] = []
    with file.open("rb", buffering=0) as source:

        def reading() -> Callable[[list[memoryview]], int]:
            source.seek(0)
            crcs.clear()
            digest = blake3()

            def read(views: list[memoryview]) -> int:
                for view in views:
                    source.readinto(view)
                    digest.update(view)
                    crcs.append(crc32(view))
                return sum(map(len, views))

            return read

        async def move(direction: str) -> None:
            async with ChunkStream(client, **options) as wire:
                if direction == "in":
                    await wire.send(chunks, reading())
                else:
                    await wire.fetch(chunks, buffer, crcs=crcs)

        complete(move("in"))
        complete(move("out"))
        started.set()
        while not stop.is_set():
            begin = time.perf_counter()
            complete(move(way))
            speeds.put(size / MIB / (time.perf_counter() - begin))


@contextlib.contextmanager
def streaming(
    url: str, file: Path, chunk_size: int, way: str, options: dict[str, int]
) -> Iterator[list[float]]:
    """Stream for the ``with`` block; its speeds (MiB/s) are in the list afterwards."""
    context = multiprocessing.get_context("spawn")
    started, stop, speeds = context.Event(), context.Event(), context.Queue()
    found: list[float] = []
    process = context.Process(
        target=stream, args=(url, file, chunk_size, way, options, started, stop, speeds)
    )
    process.start()
    try:
        while not started.wait(1):
            if not process.is_alive():
                raise RuntimeError("The process that streams has ended.")
        yield found
    finally:
        stop.set()
        process.join()
        while not speeds.empty():
            found.append(speeds.get())
        keys = manifest(file.stat().st_size, chunk_size).chunk_keys()
        with connect(url) as client:
            for at in range(0, len(keys), 1000):
                client.unlink(*keys[at : at + 1000])


def ask(store: DicomStore, seconds: float) -> dict[str, list[float]]:
    """Return how long searches and small reads take (ms), asked one after the other."""
    client: Any = store.client
    questions: dict[str, Callable[[], object]] = {
        "search": lambda: client.execute_command(*SEARCH),
        "read": lambda: store.read(SMALL),
    }
    times: dict[str, list[float]] = {name: [] for name in questions}
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for name, question in questions.items():
            begin = time.perf_counter()
            question()
            times[name].append((time.perf_counter() - begin) * 1000)
            time.sleep(PAUSE_S)
    return times


def row(label: str, times: dict[str, list[float]], speeds: list[float]) -> str:
    cells = [
        " / ".join(f"{value:.2f}" for value in np.percentile(found, (50, 99, 99.9)))
        for found in times.values()
    ]
    speed = f"{statistics.median(speeds):.0f}" if speeds else ""
    return f"| {label} | {' | '.join(cells)} | {speed} |"


def measure(
    url: str, file: Path, chunk_sizes: list[int], seconds: float, options: dict[str, int]
) -> Iterator[str]:
    """Yield the rows of the table."""
    with connect(url) as client, DicomStore(client, progress=False) as store:
        store.load(Path(pydicom.__file__).parent / "data" / "test_files")
        ask(store, 1)
        yield row("no stream", ask(store, seconds), [])
        for chunk_size in chunk_sizes:
            for way in ("out", "in"):
                with streaming(url, file, chunk_size, way, options) as speeds:
                    times = ask(store, seconds)
                yield row(f"{chunk_size / KIB:.6g} KB, {way}", times, speeds)
        for way in ("out", "in"):
            with streaming(url, file, DEFAULT_CHUNK_SIZE, way, options | MORE) as speeds:
                times = ask(store, seconds)
            label = f"{DEFAULT_CHUNK_SIZE / KIB:.6g} KB, {way}, {MORE['requests']} requests"
            yield row(label, times, speeds)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=1600, help="MB of the slide (default: 1600)")
    parser.add_argument("--seconds", type=float, default=20, help="for each row (default: 20)")
    parser.add_argument(
        "--chunk_sizes", type=int, nargs="+", metavar="BYTES",
        help="measure only these, and keep no table",
    )  # fmt: skip
    parser.add_argument("--requests", type=int, default=REQUESTS, help="under way at a time")
    parser.add_argument("--request_bytes", type=int, default=REQUEST_BYTES, help="of one request")
    arguments = parser.parse_args(argv)
    needed, free = 6 * arguments.size * 10**6, psutil.virtual_memory().available
    if needed > free:
        print(f"{needed // 10**6} MB of memory are needed, {free // 10**6} are free: "
              "ask for less with --size.", file=sys.stderr)  # fmt: skip
        return 1
    options = {"requests": arguments.requests, "request_bytes": arguments.request_bytes}
    lines = [
        f"While a slide of {arguments.size} MB goes out (received, each chunk checked) or in (read "
        "from the page cache, hashed, sent) again and again in one process, a second one asks a "
        f"question every {PAUSE_S * 1000:g} ms: FT.SEARCH, or `read` of a file of 39 kB. At most "
        f"{arguments.requests} requests are under way, each of {arguments.request_bytes // KIB} KB "
        f"or of one chunk. {machine()}",
        "",
        "| chunks, way | search, ms: p50 / p99 / p99.9 | read, ms: p50 / p99 / p99.9 | MiB/s |",
        "|---|---:|---:|---:|",
    ]
    print("\n".join(lines))
    with TemporaryDirectory() as folder, RedisServer() as server:
        file = write_sample_slide(Path(folder) / "slide.svs", size=arguments.size * 10**6)
        sizes = arguments.chunk_sizes or list(CHUNK_SIZES)
        for line in measure(server.url, file, sizes, arguments.seconds, options):
            print(line, flush=True)
            lines.append(line)
    if not arguments.chunk_sizes:
        TABLE.write_text("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
