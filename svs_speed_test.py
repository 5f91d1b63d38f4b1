"""How fast does a whole-slide image come back out of Redis?

Loads slides in chunks, retrieves each over a number of connections, and compares it with the file.
"""

from __future__ import annotations

import argparse
import contextlib
import filecmp
import json
import os
import secrets
import shutil
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil
from blake3 import blake3

from dicomstore import DicomStore
from dicomstore.blobs.manifest import BATCH_BYTES, DEFAULT_CHUNK_SIZE
from dicomstore.blobs.memory import fresh_buffer
from dicomstore.blobs.wire import ChunkStream, complete
from dicomstore.errors import DicomRedisError, NotStoredError
from dicomstore.imaging import slide
from dicomstore.keys import document_key
from dicomstore.server.connection import Client, Server, connect

PROJECT = Path(__file__).resolve().parent
SLIDES_FOLDER = PROJECT / "data" / "svs"
#: The slides that are measured lie in a folder of their own, so that nothing of the user's is
#: touched; those that are kept lie in a second one.
FOLDER, KEPT_FOLDER = "svs_speed_test", "svs_speed_test_kept"
GRID_FILE = PROJECT / "images" / "svs_speed_grid.png"
KB = 1024
MB = 1024 * 1024
DEFAULT_CONNECTIONS = 8
DEFAULT_SAMPLE_MB = 200
DEFAULT_TIMEOUT_S = 60.0
COMPARE_BYTES = 8 * MB
GRID_CHUNKS_KB = (30, 64, DEFAULT_CHUNK_SIZE / KB, 1024, 4096)
GRID_CONNECTIONS = (1, 2, 4, 8, 16, 64, 256, 1000)


@dataclass
class Retrieval:
    """One slide, retrieved once or several times; times in ms, medians where repeated."""

    key: str
    size: int
    dimensions: list[int]
    level_count: int
    load_ms: float
    runs_ms: list[float] = field(default_factory=list)
    exec_ms: float = 0.0
    connect_ms: float = 0.0
    compare_ms: float = 0.0
    blake3_ms: float = 0.0
    passed: bool = False

    @property
    def mib_per_s(self) -> float:
        return self.size / MB / (self.exec_ms / 1000)


def find_slides(paths: Sequence[str], sample_mb: int) -> list[Path]:
    """Return the slides below `paths`, else below data/svs/, else a made one.

    Raises
    ------
    FileNotFoundError, ValueError, OSError
        If a path does not exist, is no slide, or there is no room for the made one.
    """
    found = []
    for name in paths or [os.fspath(SLIDES_FOLDER)]:
        path = Path(name)
        if not path.exists():
            raise FileNotFoundError(f"There is no file or folder {path}.")
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        slides_here = [file for file in files if file.is_file() and slide.searchable(file)]
        if paths and not slides_here:
            raise ValueError(f"{path} is no slide that OpenSlide opens, and holds none.")
        found += slides_here
    return found or [make_sample(sample_mb)]


def make_sample(size_mb: int) -> Path:
    """Make a slide of about `size_mb` (1024 x 1024 bytes each) below data/svs/."""
    from demo.slide import write_sample_slide

    size = size_mb * MB
    available = psutil.virtual_memory().available
    if 3 * size > available:
        raise OSError(
            f"A slide of {size_mb} MB needs about {3 * size_mb} MB of memory (file cache, Redis, "
            f"retrieved bytes) and {available // MB} MB are free: ask for less with --sample_size."
        )
    print(
        f"No slide below {_shown(SLIDES_FOLDER)}: making one of {size_mb} MB ...", file=sys.stderr
    )
    return write_sample_slide(SLIDES_FOLDER / f"sample_{size_mb}MB.svs", size=size)


def retrieve(
    store: DicomStore, name: str, *, connections: int, timeout: float, into: Path | None
) -> tuple[memoryview | None, float, float]:
    """Retrieve a slide, into fresh memory or into the file `into`, which appears whole or not.

    From a cluster, which knows no connections of ours, it comes in pipelines from all nodes.

    Returns
    -------
    memoryview or None, float, float
        The bytes, the time from the JSON.GET to the last byte, and of that the time to connect; in
        ms.
    """
    client = Server(store.client).wire_client()
    scratch = into and into.with_name(f".{into.name}-{secrets.token_hex(6)}")

    async def transfer() -> tuple[memoryview | None, float, float]:
        started = time.perf_counter()
        manifest = store.manifest(name)
        buffer = None if scratch else fresh_buffer(manifest.size)
        before = time.perf_counter()
        assert client is not None
        async with ChunkStream(client, connections=connections, timeout=timeout) as stream:
            connected = time.perf_counter()
            if scratch:
                with scratch.open("xb") as file:
                    await stream.copy(manifest.chunks(), file.write)
            else:
                await stream.fetch(manifest.chunks(), buffer)
            finished = time.perf_counter()
        return buffer, (finished - started) * 1000, (connected - before) * 1000

    def in_pipelines() -> tuple[memoryview | None, float, float]:
        started = time.perf_counter()
        size = store.manifest(name).size
        if scratch:
            with scratch.open("xb") as file, store.open(name) as stored:
                shutil.copyfileobj(stored, file, COMPARE_BYTES)
            return None, (time.perf_counter() - started) * 1000, 0.0
        view = store.read(name, into=fresh_buffer(size))
        return view, (time.perf_counter() - started) * 1000, 0.0

    try:
        result = in_pipelines() if client is None else complete(transfer())
        if into and scratch:
            scratch.replace(into)
        return result
    finally:
        if scratch:
            scratch.unlink(missing_ok=True)


def same_bytes(file: Path, retrieved: memoryview) -> bool:
    """Whether `retrieved` is what is in `file`, byte for byte."""
    position = 0
    with file.open("rb") as original:
        while piece := original.read(COMPARE_BYTES):
            if piece != bytes(retrieved[position : position + len(piece)]):
                return False
            position += len(piece)
    return position == len(retrieved)


def refuse_overwriting(files: Sequence[Path], output: Path) -> None:
    """Raise ValueError if a slide would be retrieved into its own place, or two into one."""
    for file in files:
        target = output / file.name
        if target.exists() and target.samefile(file):
            raise ValueError(f"--output {output} would overwrite {file}: name a different folder.")
    if len({file.name for file in files}) < len(files):
        raise ValueError(f"Two slides of the same name cannot be retrieved into {output}.")


@contextlib.contextmanager
def loaded(store: DicomStore, file: Path, *, keep: bool) -> Iterator[tuple[str, float]]:
    """Load a slide for the ``with`` block; give its key and how long it took in ms.

    It lies in a folder of its own. What was in Redis before stays there.
    """
    folder = KEPT_FOLDER if keep else FOLDER
    key = document_key(f"{folder}/{file.name}")
    started = time.perf_counter()
    try:
        row = store.load(file, under=folder, replace=True).iloc[0]
        if row["status"] == "skipped":
            raise ValueError(f"{file} was not loaded: {row['reason']}.")
        yield key, (time.perf_counter() - started) * 1000
    finally:
        if not keep:
            with contextlib.suppress(NotStoredError):
                store.delete(key)


def clean_up(store: DicomStore) -> None:
    """Delete what a test that broke off has left."""
    for key in store.find(under=FOLDER)["key"]:
        with contextlib.suppress(NotStoredError):
            store.delete(key)
    store.sweep(under=FOLDER)


def measure(
    store: DicomStore,
    file: Path,
    *,
    connections: int,
    repeat: int = 1,
    timeout: float = DEFAULT_TIMEOUT_S,
    keep: bool = False,
    output: Path | None = None,
) -> Retrieval:
    """Load `file`, retrieve it `repeat` times, and compare every retrieved byte."""
    with loaded(store, file, keep=keep) as (key, load_ms):
        facts = slide.searchable(file) or {}
        levels, dimensions = facts["levelCount"], facts["dimensions"]
        result = Retrieval(key, file.stat().st_size, dimensions, levels, load_ms, passed=True)
        connect_times, compare_times, blake3_times = [], [], []
        for _ in range(repeat):
            target = None if output is None else output / file.name
            retrieved, exec_ms, connect_ms = retrieve(
                store, key, connections=connections, timeout=timeout, into=target
            )
            result.runs_ms.append(exec_ms)
            connect_times.append(connect_ms)
            started = time.perf_counter()
            if retrieved is None:
                assert target is not None
                result.passed &= filecmp.cmp(file, target, shallow=False)
            else:
                result.passed &= same_bytes(file, retrieved)
            compared = time.perf_counter()
            result.passed &= store.blake3(key) == _digest(target or retrieved)
            compare_times.append((compared - started) * 1000)
            blake3_times.append((time.perf_counter() - compared) * 1000)
            del retrieved
    result.exec_ms = statistics.median(result.runs_ms)
    result.connect_ms = statistics.median(connect_times)
    result.compare_ms = statistics.median(compare_times)
    result.blake3_ms = statistics.median(blake3_times)
    return result


def _digest(data: Path | memoryview | None) -> str:
    assert data is not None
    if isinstance(data, Path):
        return blake3().update_mmap(data).hexdigest()
    return blake3(data).hexdigest()


def peak_memory() -> int:
    """Return the most memory that this process had at a time, in bytes."""
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    # In KiB on Linux, in bytes on macOS.
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * KB


def report(result: Retrieval) -> None:
    """Print one slide's result: the published lines first, then what they leave out."""
    print(f"\nKey: {result.key}")
    print(f"Exec time: {result.exec_ms:.2f} ms")
    print(f"Bytes Retrieved: {result.size}")
    print(f"File integrity check:  {'Pass' if result.passed else 'Fail'}")
    width, height = result.dimensions
    print(f"Dimensions: {width} x {height}, {result.level_count} levels")
    if len(result.runs_ms) > 1:
        low, high = min(result.runs_ms), max(result.runs_ms)
        print(f"Exec time is the median of {len(result.runs_ms)}: {low:.2f} to {high:.2f} ms")
    print(f"Throughput: {result.mib_per_s:.0f} MB/s")
    print(f"Connect time: {result.connect_ms:.2f} ms (part of the exec time)")
    print(f"Load time: {result.load_ms:.2f} ms")
    print(f"Compare time: {result.compare_ms:.2f} ms, BLAKE3 time: {result.blake3_ms:.2f} ms")


def measure_grid(
    store_of: dict[float, DicomStore], file: Path, *, repeat: int, timeout: float
) -> dict[tuple[float, int], float]:
    """Return MB/s by (chunk size in KB, connections), the median of `repeat` retrievals."""
    speeds: dict[tuple[float, int], float] = {}
    for chunk_kb, store in store_of.items():
        with loaded(store, file, keep=False) as (key, _):
            for connections in GRID_CONNECTIONS:
                times = [
                    retrieve(store, key, connections=connections, timeout=timeout, into=None)[1]
                    for _ in range(repeat)
                ]
                size = file.stat().st_size / MB
                speeds[chunk_kb, connections] = size / (statistics.median(times) / 1000)
                print(
                    f"{chunk_kb:8.6g} KB chunks, {connections:4} connections: "
                    f"{speeds[chunk_kb, connections]:6.0f} MB/s",
                    flush=True,
                )
    return speeds


def draw_grid(speeds: dict[tuple[float, int], float], title: str, target: Path) -> None:
    """Draw a heat map of the speeds, the best cell marked."""
    import matplotlib.pyplot as plt
    import numpy as np
    from matplotlib.patches import Rectangle

    chunks = sorted({chunk for chunk, _ in speeds})
    counts = sorted({count for _, count in speeds})
    table = np.array([[speeds[chunk, count] for count in counts] for chunk in chunks])
    figure, axes = plt.subplots(figsize=(9, 4.5), layout="constrained")
    drawn = axes.imshow(table, cmap="viridis", aspect="auto")
    best = np.unravel_index(table.argmax(), table.shape)
    for (row, column), speed in np.ndenumerate(table):
        dark = speed < (table.min() + table.max()) / 2
        weight = "bold" if (row, column) == best else "normal"
        color = "white" if dark else "black"
        axes.text(column, row, f"{speed:.0f}", weight=weight, color=color, ha="center", va="center")
    corner = (best[1] - 0.5, best[0] - 0.5)
    axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor="red", linewidth=3))
    axes.set_xticks(range(len(counts)), [str(count) for count in counts])
    axes.set_yticks(range(len(chunks)), [f"{chunk:.6g}" for chunk in chunks])
    axes.set(xlabel="connections", ylabel="chunk size, KB", title=title)
    figure.colorbar(drawn, label="MB/s")
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=120)
    plt.close(figure)


def _store(client: Client, chunk_kb: float) -> DicomStore:
    chunk_size = round(chunk_kb * KB)
    return DicomStore(client, chunk_size=chunk_size, progress=False, thumbnails=False)


def grid(arguments: argparse.Namespace, files: Sequence[Path]) -> None:
    """Measure all cells of the grid on the first of `files` and draw them."""
    file = files[0]
    client = connect(arguments.url)
    stores = {kb: _store(client, kb) for kb in GRID_CHUNKS_KB}
    clean_up(next(iter(stores.values())))
    speeds = measure_grid(stores, file, repeat=arguments.repeat, timeout=arguments.timeout)
    (chunk_kb, connections), speed = max(speeds.items(), key=lambda item: item[1])
    size = file.stat().st_size / MB
    title = f"{size:.0f} MB come fastest in chunks of {chunk_kb:.6g} KB over {connections}"
    draw_grid(speeds, f"{title} connection{'s' if connections > 1 else ''}", GRID_FILE)
    print(f"\nBest: --chunk_size {chunk_kb:.6g} --connections {connections}, {speed:.0f} MB/s")
    print(f"Heat map: {_shown(GRID_FILE)}")


def speed_test(arguments: argparse.Namespace, files: Sequence[Path]) -> bool:
    """Measure every slide and print the results; return whether all passed."""
    store = _store(connect(arguments.url), arguments.chunk_size)
    clean_up(store)
    results = []
    if not arguments.json:
        print(
            f"\n*** File Retrieval Test - {arguments.chunk_size:.6g} KB Chunks, "
            f"{arguments.connections} Client Connections ***"
        )
        for file in files:
            print(f"{file.name} Size: {file.stat().st_size / MB:.2f} MB")
        print(f"Files loaded: {len(files)}", flush=True)
    for file in files:
        result = measure(
            store, file, connections=arguments.connections, repeat=arguments.repeat,
            timeout=arguments.timeout, keep=arguments.keep, output=arguments.output,
        )  # fmt: skip
        results.append(result)
        if not arguments.json:
            report(result)
    total_ms = sum(result.exec_ms for result in results)
    peak_mb = peak_memory() / MB
    if arguments.json:
        shared = {
            "chunk_size_kb": arguments.chunk_size,
            "connections": arguments.connections,
            "total_ms": total_ms,
            "peak_memory_mb": peak_mb,
        }
        print(json.dumps({**shared, "files": [asdict(result) for result in results]}, indent=2))
    else:
        print(f"\nTotal time: {total_ms:.2f} ms")
        print(f"Peak memory: {peak_mb:.0f} MB")
    return all(result.passed for result in results)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="""\
KB and MB are 1024 and 1024 * 1024 bytes. 'Exec time' is the retrieval alone: from the request for
the document to the last byte in memory, with the time to connect; 'Pass' means that every byte and
the BLAKE3 were compared.

examples:
  the slides below data/svs/, or a made one:
    python svs_speed_test.py
  as published:
    python svs_speed_test.py --chunk_size 30 --connections 1000
  a slide of 1.6 GB, the median of five retrievals:
    python svs_speed_test.py --sample_size 1600 --repeat 5
  retrieve to disk, in little memory:
    python svs_speed_test.py slide.svs --output restored
  which chunk size, and how many connections?
    python svs_speed_test.py --grid
  another Redis than $REDIS_URL:
    python svs_speed_test.py --url redis://:password@host:6379
""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "paths", nargs="*", help="slides, or folders of slides (default: data/svs/)"
    )
    parser.add_argument(
        "--chunk_size", type=_positive(float), default=DEFAULT_CHUNK_SIZE / KB, metavar="KB",
        help="KB a chunk (default: %(default).6g, which fits Redis's allocator)",
    )  # fmt: skip
    parser.add_argument(
        "--connections", type=_positive(int), default=DEFAULT_CONNECTIONS, metavar="N",
        help="client connections, all of them at work (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--sample_size", type=_positive(int), default=DEFAULT_SAMPLE_MB, metavar="MB",
        help="size of the slide that is made where there is none (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--repeat", type=_positive(int), default=1, metavar="N",
        help="retrieve each slide N times and give the median (default: 1)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    parser.add_argument(
        "--output", type=Path, metavar="DIR",
        help="retrieve into files in this folder and keep them",
    )  # fmt: skip
    parser.add_argument("--keep", action="store_true", help="leave the slides in Redis")
    parser.add_argument(
        "--url", help="the Redis to use (default: $REDIS_URL, else the embedded one)"
    )
    parser.add_argument(
        "--timeout", type=_positive(float), default=DEFAULT_TIMEOUT_S, metavar="S",
        help="seconds without a byte that are an error (default: %(default)g)",
    )  # fmt: skip
    parser.add_argument(
        "--grid", action="store_true",
        help="measure chunk sizes x connections and draw images/svs_speed_grid.png",
    )  # fmt: skip
    arguments = parser.parse_args(argv)
    if not 1 <= round(arguments.chunk_size * KB) <= BATCH_BYTES:
        parser.error(f"--chunk_size can be up to {BATCH_BYTES // KB} KB")
    return arguments


def _positive(kind: type) -> type:
    def convert(text: str) -> float:
        number = kind(text)
        if not 0 < number < 1e12:
            raise ValueError
        return float(number) if kind is float else int(number)

    convert.__name__ = f"positive {'number' if kind is float else 'whole number'}"
    return convert  # type: ignore[return-value]


def _shown(path: Path) -> str:
    return os.fspath(path.relative_to(PROJECT) if path.is_relative_to(PROJECT) else path)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return 0, 1 for a failure, or 2 for bad input."""
    arguments = parse(argv)
    try:
        files = find_slides(arguments.paths, arguments.sample_size)
        if arguments.output:
            refuse_overwriting(files, arguments.output)
            arguments.output.mkdir(parents=True, exist_ok=True)
        if arguments.grid:
            grid(arguments, files)
            return 0
        return 0 if speed_test(arguments, files) else 1
    except KeyboardInterrupt:
        print("\nStopped; nothing of it was left in Redis.", file=sys.stderr)
        return 130
    except (FileNotFoundError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2 if not isinstance(error, DicomRedisError) else 1
    except (DicomRedisError, OSError) as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
