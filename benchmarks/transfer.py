"""A slide in and out of Redis: this project beside its peers and its physical limit, in one run.

Every method is measured in turn, several times over, on one server; the table gives medians, the
spread, and the ratio to the published method, round by round. Run it with `make bench`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import matplotlib.pyplot as plt
import psutil
import redis
import redis.asyncio
from reporting import machine, ratios, timed

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

import svs_speed_test as speed  # noqa: E402 - the project is not installed, but run in place
from demo.slide import write_sample_slide  # noqa: E402
from dicomstore import DicomStore, connect  # noqa: E402
from dicomstore.blobs.manifest import DEFAULT_CHUNK_SIZE, Manifest  # noqa: E402
from dicomstore.blobs.memory import fresh_buffer  # noqa: E402
from dicomstore.blobs.wire import ChunkStream, complete  # noqa: E402
from dicomstore.server.embedded import BUILD_FOLDER, RedisServer  # noqa: E402

MIB = 1024 * 1024
PUBLISHED = "published: GET per 30 KB chunk, 1000 connections"
DEFAULT = "this project, default settings"
PUBLISHED_CHUNK = 30 * 1024
PUBLISHED_CONNECTIONS = 1000
BATCH = 8 * MIB
#: What redis-benchmark picks its chunks from: more than a processor's cache holds.
C_CLIENT_BYTES = 256 * MIB
TABLE = PROJECT / "benchmarks" / "transfer.md"
FIGURE = PROJECT / "images" / "transfer.png"
BLUE, GREY = "#2a6fbb", "#b9c2cc"

Method = Callable[[], float]


class Bench:
    """One slide in one server, in chunks of two sizes, and the ways to move it."""

    def __init__(self, server: RedisServer, file: Path) -> None:
        self.url, self.port, self.password = server.url, server.port, server.password
        self.file, self.size = file, file.stat().st_size
        self.client: Any = connect(server.url)
        self.stores = {
            size: DicomStore(self.client, chunk_size=size, progress=False, thumbnails=False)
            for size in (PUBLISHED_CHUNK, DEFAULT_CHUNK_SIZE)
        }
        for size, store in self.stores.items():
            store.load(file, under=str(size))
        self.touched = bytearray(self.size)

    def name(self, chunk_size: int) -> str:
        return f"{chunk_size}/{self.file.name}"

    def manifest(self, chunk_size: int) -> Manifest:
        return self.stores[chunk_size].manifest(self.name(chunk_size))

    # --- out ---

    def published(self) -> float:
        """One GET per chunk, in as many tasks as connections, joined in the end."""

        async def retrieve(client: Any) -> bytes:
            document = json.loads(
                await client.execute_command("JSON.GET", f"file:{self.name(PUBLISHED_CHUNK)}")
            )
            keys = document["chunks"]
            chunks = [b""] * len(keys)

            async def task(first: int) -> None:
                for number in range(first, len(keys), PUBLISHED_CONNECTIONS):
                    chunks[number] = await client.get(keys[number])

            await asyncio.gather(*(task(first) for first in range(PUBLISHED_CONNECTIONS)))
            return b"".join(chunks)

        return self.with_tasks(retrieve)

    def with_tasks(self, work: Callable[[Any], Coroutine[Any, Any, object]]) -> float:
        """Time `work` with an asyncio client of the published number of connections."""

        async def whole() -> None:
            client = redis.asyncio.Redis.from_url(
                self.url, max_connections=PUBLISHED_CONNECTIONS, socket_read_size=65536
            )
            await work(client)
            await client.aclose()

        return timed(lambda: asyncio.run(whole()))

    def redis_py(self) -> float:
        """MGET in batches of 8 MiB over one connection."""
        manifest = self.manifest(DEFAULT_CHUNK_SIZE)
        step = BATCH // manifest.chunk_size

        def retrieve() -> bytes:
            keys = manifest.chunk_keys()
            batches = [keys[at : at + step] for at in range(0, len(keys), step)]
            return b"".join(chunk for batch in batches for chunk in self.client.mget(batch))

        return timed(retrieve)

    def ours(self, chunk_size: int, connections: int) -> Method:
        """From the document to the last byte in fresh memory, with connecting."""

        def retrieve() -> float:
            _, exec_ms, _ = speed.retrieve(
                self.stores[chunk_size],
                self.name(chunk_size),
                connections=connections,
                timeout=60,
                into=None,
            )
            return exec_ms / 1000

        return retrieve

    def transfer_only(self) -> float:
        """The same without connecting, into memory that was in use before."""

        async def transfer() -> float:
            chunks = self.manifest(DEFAULT_CHUNK_SIZE).chunks()
            async with ChunkStream(self.client) as stream:
                start = time.perf_counter()
                await stream.fetch(chunks, self.touched)
                return time.perf_counter() - start

        return complete(transfer())

    def read_checked(self, *, checked: bool) -> Method:
        """`store.read` of 200 MiB with its CRC-32, or the same transfer without."""
        manifest = self.manifest(DEFAULT_CHUNK_SIZE)
        chunks = manifest.chunks()[: 200 * MIB // manifest.chunk_size]
        reply = self.client.execute_command("JSON.GET", manifest.key, f"$.crc[0:{len(chunks)}]")
        crcs = json.loads(reply) if checked else None
        view = memoryview(self.touched)[: sum(length for _, length in chunks)]

        def retrieve() -> float:
            async def transfer() -> None:
                async with ChunkStream(self.client) as stream:
                    await stream.fetch(chunks, view, crcs=crcs)

            return timed(lambda: complete(transfer()))

        return retrieve

    def c_client(self, chunk_size: int) -> Method:
        """redis-benchmark: as many GETs of a chunk as the slide has chunks, pipelined."""
        manifest = self.manifest(chunk_size)
        program = str(BUILD_FOLDER / "redis-benchmark")
        command = [program, "-p", str(self.port), "-a", self.password]
        options = ["-c", "8", "-P", "4", "-n", str(manifest.count), "--csv"]
        keys = "__rand_int__"

        def retrieve() -> float:
            several = ["-r", str(C_CLIENT_BYTES // chunk_size)]
            result = subprocess.run(
                [*command, *options, *several, "GET", f"c:{chunk_size}:{keys}"],
                capture_output=True, text=True, check=True,
            )  # fmt: skip
            requests = float(result.stdout.splitlines()[-1].split(",")[1].strip('"'))
            return manifest.count / requests

        return retrieve

    def for_the_c_client(self) -> None:
        """Store chunks under names that redis-benchmark can make."""
        with self.file.open("rb") as file:
            for size in self.stores:
                file.seek(0)
                with self.client.pipeline(transaction=False) as pipe:
                    for number in range(C_CLIENT_BYTES // size):
                        pipe.set(f"c:{size}:{number:012}", file.read(size))
                        if number % (BATCH // size) == 0:
                            pipe.execute()
                    pipe.execute()

    def page_cache(self) -> float:
        """Reading the local file, which the kernel has in memory, into fresh memory."""

        def read() -> None:
            buffer = fresh_buffer(self.size)
            with self.file.open("rb", buffering=0) as file:
                at = 0
                while count := file.readinto(buffer[at : at + BATCH]):
                    at += count

        return timed(read)

    # --- in ---

    def published_load(self) -> float:
        """One SET per chunk, in as many tasks as connections."""

        async def load(client: Any) -> None:
            with self.file.open("rb") as file:

                async def task() -> None:
                    while chunk := file.read(PUBLISHED_CHUNK):
                        at = file.tell() - len(chunk)
                        await client.set(f"in:{at}", chunk)

                await asyncio.gather(*(task() for _ in range(PUBLISHED_CONNECTIONS)))

        seconds = self.with_tasks(load)
        keys = [f"in:{at}" for at in range(0, self.size, PUBLISHED_CHUNK)]
        for at in range(0, len(keys), 1000):
            self.client.unlink(*keys[at : at + 1000])
        return seconds

    def our_load(self, chunk_size: int) -> Method:
        """`store.load`: with BLAKE3, CRC-32, lease, document and index."""

        def load() -> float:
            store = self.stores[chunk_size]
            seconds = timed(lambda: store.load(self.file, under="in"))
            store.delete(f"in/{self.file.name}")
            return seconds

        return load

    def verify(self) -> float:
        """`store.verify`: every chunk's CRC-32 and the file's BLAKE3."""
        store = self.stores[DEFAULT_CHUNK_SIZE]
        manifest = self.manifest(DEFAULT_CHUNK_SIZE)
        return timed(lambda: store.verify([manifest.key]))


def measure(bench: Bench, rounds: int) -> dict[str, list[float]]:
    """Return the seconds of every method, round by round."""
    methods: dict[str, Method] = {
        PUBLISHED: bench.published,
        "this project, 30 KB, 1000 connections": bench.ours(PUBLISHED_CHUNK, 1000),
        DEFAULT: bench.ours(DEFAULT_CHUNK_SIZE, 8),
        "redis-py: MGET of 8 MiB, 256 KB chunks": bench.redis_py,
        "this project, transfer only": bench.transfer_only,
        "this project, verify": bench.verify,
        "C client, 256 KB chunks": bench.c_client(DEFAULT_CHUNK_SIZE),
        "C client, 30 KB chunks": bench.c_client(PUBLISHED_CHUNK),
        "local file from the page cache": bench.page_cache,
        "200 MiB with CRC-32": bench.read_checked(checked=True),
        "200 MiB without": bench.read_checked(checked=False),
        "published load: SET per 30 KB chunk": bench.published_load,
        "this project's load, 30 KB": bench.our_load(PUBLISHED_CHUNK),
        "this project's load, default settings": bench.our_load(DEFAULT_CHUNK_SIZE),
    }
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for number in range(rounds + 1):
        for name, method in methods.items():
            taken = method()
            if number:  # the first round touches the memory of server and kernel
                seconds[name].append(taken)
                print(f"round {number}: {taken * 1000:8.0f} ms  {name}", flush=True)
    return seconds


#: Ours, and the method that it is compared with.
PAIRS = (
    ("this project, 30 KB, 1000 connections", PUBLISHED),
    (DEFAULT, PUBLISHED),
    ("this project, transfer only", "C client, 256 KB chunks"),
    ("this project, verify", "this project, transfer only"),
    ("this project's load, 30 KB", "published load: SET per 30 KB chunk"),
    ("200 MiB with CRC-32", "200 MiB without"),
)


def table(seconds: dict[str, list[float]], size: int, rounds: int) -> str:
    """Return the results as Markdown."""
    lines = [
        f"A slide of {size / MIB:.0f} MiB, {rounds} interleaved rounds; {machine()} "
        "The published method is that of the demonstration redis-dicom of 2023: Python's asyncio "
        "client sends one GET, or one SET, for each chunk of 30 KB, over 1000 connections.",
        "",
        "| method | median, ms | lowest to highest | MiB/s |",
        "|---|---:|---:|---:|",
    ]
    for name, times in seconds.items():
        low, median, high = min(times), statistics.median(times), max(times)
        moved = 200 * MIB if name.startswith("200 MiB") else size
        lines.append(
            f"| {name} | {median * 1000:.0f} | {low * 1000:.0f} to {high * 1000:.0f} | "
            f"{moved / MIB / median:.0f} |"
        )
    lines += ["", *ratios(seconds, PAIRS)]
    return "\n".join(lines) + "\n"


def draw(report: str) -> None:
    """Draw the speeds of all that moves the whole slide, as `report` (the table) has them."""
    rows = [line.strip("| ").split(" | ") for line in report.splitlines() if line.startswith("| ")]
    speeds = {row[0]: float(row[3]) for row in rows if len(row) == 4 and row[3].isdigit()}
    ratio = next(float(row[1]) for row in rows if row[0] == f"{DEFAULT}, to {PUBLISHED}")
    whole = {name: speed for name, speed in speeds.items() if not name.startswith("200 MiB")}
    colors = [BLUE if "this project" in name else GREY for name in whole]
    figure, axes = plt.subplots(figsize=(9, 4.8), layout="constrained")
    axes.bar_label(axes.barh(list(whole), list(whole.values()), color=colors), padding=3)
    axes.invert_yaxis()
    axes.set(xlabel="MiB/s")
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.1)
    # Above the whole figure: the names of the methods leave the axes too little room for it.
    figure.suptitle(f"A slide comes back {ratio:.1f} times as fast as by the published method")
    figure.savefig(FIGURE, dpi=120)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=1600, help="MB of the slide (default: 1600)")
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds (default: 5)")
    parser.add_argument("--slide", type=Path, help="a slide to use instead of a made one")
    parser.add_argument("--draw", action="store_true", help="only draw the kept table again")
    arguments = parser.parse_args(argv)
    if arguments.draw:
        draw(TABLE.read_text())
        return 0
    needed, free = 8 * arguments.size * 10**6, psutil.virtual_memory().available
    if needed > free:
        print(f"{needed // 10**6} MB of memory are needed, {free // 10**6} are free: "
              "ask for less with --size.", file=sys.stderr)  # fmt: skip
        return 1
    with TemporaryDirectory() as folder, RedisServer() as server:
        slide = arguments.slide or write_sample_slide(
            Path(folder) / "slide.svs", size=arguments.size * 10**6
        )
        bench = Bench(server, slide)
        bench.for_the_c_client()
        seconds = measure(bench, arguments.rounds)
        TABLE.write_text(table(seconds, bench.size, arguments.rounds))
        draw(TABLE.read_text())
    print(f"\n{TABLE.read_text()}\nFigure: {FIGURE.relative_to(PROJECT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
