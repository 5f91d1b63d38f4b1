"""A tier in front of a source: what a miss fetches and takes, and what outlives eviction.

Every part runs on an embedded server of its own, with a memory limit where something is to be
evicted. Run it with `make bench-tier`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import fsspec
import pydicom
import redis
from reporting import machine, milliseconds
from search import documents

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

from demo import archive  # noqa: E402 - run in place, not installed
from demo.ct import write_sample_ct  # noqa: E402
from demo.slide import write_sample_slide  # noqa: E402
from dicomstore import DicomStore, connect  # noqa: E402
from dicomstore.errors import ServerError  # noqa: E402
from dicomstore.server.embedded import RedisServer  # noqa: E402

MIB = 1024 * 1024
TABLE = PROJECT / "benchmarks" / "tier.md"
REGION = 64 * 1024
READERS = 16
POLICIES = ("volatile-lru", "volatile-ttl", "volatile-lfu", "allkeys-lru", "noeviction")
TIMES_OVER = 10
ROOM = 100 * MIB
PATIENTS, STUDIES = 30, 10  # the trace of examples/hot_tier.ipynb, and its memory
LITTLE = "256mb"

#: A process of its own that misses at once, and says how long that took (ms).
FRESH = """
import sys, time
sys.path.insert(0, sys.argv[1])
from dicomstore import DicomStore, connect
with connect(sys.argv[2]) as client, DicomStore(client, source=sys.argv[3]) as tier:
    client.ping()
    start = time.perf_counter()
    content = tier.read(sys.argv[4])
    print((time.perf_counter() - start) * 1000)
"""


class CountingDisk(archive.SlowDisk):
    """A local disk that notes what is read from it: ``counting-disk://0/folder``."""

    protocol = "counting-disk"
    cachable = False
    noted: ClassVar[list[tuple[int, float]]] = []

    def cat_ranges(
        self, paths: Sequence[str], starts: Sequence[int], ends: Sequence[int], **_: Any
    ) -> list[bytes]:
        start = time.perf_counter()
        pieces = super().cat_ranges(paths, starts, ends)
        self.noted.append((sum(map(len, pieces)), time.perf_counter() - start))
        return pieces


fsspec.register_implementation(CountingDisk.protocol, CountingDisk, clobber=True)


def spread(times: Sequence[float], digits: int = 1) -> str:
    low, median, high = min(times), statistics.median(times), max(times)
    return f"{median:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def tier_of(client: redis.Redis, folder: str | Path, **options: Any) -> DicomStore:
    return DicomStore(client, **{"source": folder, "progress": False, **options})


def one_chunk(size: int, rounds: int) -> Iterator[tuple[str, str]]:
    """Lose a chunk of a slide, and read a region there."""
    with TemporaryDirectory() as folder, RedisServer() as server, connect(server.url) as client:
        write_sample_slide(Path(folder) / "slide.svs", size=size)
        tier = tier_of(client, f"counting-disk://0{folder}", thumbnails=False)
        tier.load(folder)
        manifest = tier.manifest("slide.svs")
        CountingDisk.noted.clear()
        hot, missed, extra = [], [], []

        def region(at: int) -> None:
            with tier.open("slide.svs") as file:
                file.seek(at)
                file.read(REGION)

        for number in range(100, 100 + rounds):
            at = manifest.offset(number) + 1000
            hot.append(milliseconds(lambda at=at: region(at)))  # type: ignore[misc]
            client.delete(manifest.chunk_key(number))
            missed.append(milliseconds(lambda at=at: region(at)))  # type: ignore[misc]
            extra.append(missed[-1] - CountingDisk.noted[-1][1] * 1000)
        most = max(count for count, _ in CountingDisk.noted)
        name = f"slide of {size / MIB:.0f} MiB"
        yield f"{name}: bytes fetched for one lost chunk of {manifest.chunk_size:,}", f"{most:,}"
        yield f"{name}: region of 64 KiB, hot, ms", spread(hot)
        yield f"{name}: the same with its chunk lost, ms", spread(missed)
        without = statistics.median(e / h for e, h in zip(extra, hot, strict=True))
        yield f"{name}: lost, without the source's own time, over hot", f"× {without:.2f}"


def first_miss(rounds: int) -> Iterator[tuple[str, str]]:
    """Read a file of 500 KB that is not in Redis, as the first thing that a process does."""
    with TemporaryDirectory() as folder, RedisServer() as server, connect(server.url) as client:
        write_sample_ct(folder, slices=1, side=500)
        (file,) = Path(folder).iterdir()
        tier = tier_of(client, folder)
        tier.load(folder)
        times: dict[str, list[float]] = {"chunks": [], "chunks and document": []}
        for _ in range(rounds):
            for lost in times:
                client.delete(*tier.manifest(file.name).chunk_keys())
                if lost != "chunks":
                    client.delete(f"file:{file.name}")
                command = [sys.executable, "-c", FRESH, str(PROJECT), server.url, folder, file.name]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                times[lost].append(float(done.stdout))
        for lost, taken in times.items():
            size = f"{file.stat().st_size / 1000:.0f} kB"
            yield f"first miss of a fresh process, {size}, {lost} gone, ms", spread(taken)


def one_gap() -> Iterator[tuple[str, str]]:
    """Let many readers meet the same gap."""
    with TemporaryDirectory() as folder, RedisServer() as server, connect(server.url) as client:
        write_sample_ct(folder, slices=1)
        (file,) = Path(folder).iterdir()
        content = file.read_bytes()
        tier = tier_of(client, f"counting-disk://0{folder}")
        tier.load(folder)
        keys = tier.manifest(file.name).chunk_keys()
        client.delete(*keys)
        CountingDisk.noted.clear()
        with ThreadPoolExecutor(READERS) as pool:
            right = sum(one == content for one in pool.map(tier.read, [file.name] * READERS))
        fetched = sum(count for count, _ in CountingDisk.noted)
        yield (
            f"{READERS} readers of one gap in one process: right bytes; bytes fetched, of "
            f"{len(content):,}",
            f"{right} of {READERS}; {fetched:,}",
        )
        client.delete(*keys)
        command = [sys.executable, "-c", FRESH, str(PROJECT), server.url, folder, file.name]
        readers = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for _ in range(READERS)]
        well = sum(reader.wait() == 0 for reader in readers)
        sound = tier.verify()["status"].eq("ok").all() and tier.sweep().empty
        yield (
            f"{READERS} processes at one gap: read; afterwards",
            f"{well} of {READERS}; {'whole, nothing left over' if sound else 'NOT WHOLE'}",
        )


def cold_load(rounds: int) -> Iterator[tuple[str, str]]:
    """Load 2,000 files with and without their bytes."""
    with TemporaryDirectory() as folder:
        archive.write_archive(folder, patients=50, studies=10, side=384)
        for thumbnails in (False, True):
            seconds: dict[bool, list[float]] = {True: [], False: []}
            for _ in range(rounds):
                for pixels, taken in seconds.items():
                    with RedisServer() as server, connect(server.url) as client:
                        tier = tier_of(client, folder, thumbnails=thumbnails)
                        work = lambda t=tier, p=pixels: t.load(folder, pixels=p)  # noqa: E731
                        taken.append(milliseconds(work) / 1000)
            how = "with" if thumbnails else "without"
            yield f"2,000 files of 297 kB, {how} thumbnails: full load, s", spread(seconds[True], 2)
            yield f"2,000 files of 297 kB, {how} thumbnails: cold, s", spread(seconds[False], 2)
            ratio = [full / cold for full, cold in zip(seconds[True], seconds[False], strict=True)]
            yield "... how many times as fast, round by round", spread(ratio, 2)


def findable(policy: str, count: int) -> tuple[str, str]:
    """Return how many documents are found after pixels went ten times over, and what was refused.

    Chunks have a time to live of one to two hours, documents have none.
    """
    with RedisServer() as server, connect(server.url) as client:
        store = DicomStore(client, progress=False)
        store.find(limit=1)  # makes the index
        keys = []
        for first in range(0, count, 1000):
            with client.pipeline(transaction=False) as pipe:
                for key, text in documents(first, min(first + 1000, count), thumbnails=False):
                    pipe.execute_command("JSON.SET", key, "$", text)
                    keys.append(key)
                pipe.execute()
        room = client.info("memory")["used_memory"] + ROOM
        client.config_set("maxmemory", room)
        client.config_set("maxmemory-policy", policy)
        chunk, refused, sent = os.urandom(50_000), 0, 0
        for number in range(TIMES_OVER * ROOM // len(chunk)):
            ttl = random.Random(number).randrange(3600, 7200)
            try:
                client.set(f"chunk:{keys[number % count]}:{number:012x}:0", chunk, ex=ttl)
                sent += 1
            except redis.OutOfMemoryError:
                refused += 1
        found = client.ft("file:idx").search("*", query_params=None).total
        return f"{found:,} of {count:,}", f"{refused:,} of {sent + refused:,}"


def trace(folder: Path, policy: str, *, prefetch: bool) -> tuple[float, int]:
    """Return the hit ratio of the notebook's trace, and how many reads the server refused."""
    limits = [f"maxmemory {LITTLE}", f"maxmemory-policy {policy}"]
    hits = reads = refused = 0
    with (
        RedisServer(config=limits) as server,
        connect(server.url) as client,
        tier_of(client, folder, ttl=3600, thumbnails=False) as tier,
    ):
        tier.load(folder, pixels=False)
        known = set()
        for patient, files in archive.worklist(patients=PATIENTS, studies=STUDIES):
            if prefetch and patient not in known:
                tier.prefetch_priors(patient, last=archive.LAST).wait()
                known.add(patient)
            for name in files:
                misses, reads = tier.misses, reads + 1
                try:
                    tier.read(name)
                    hits += tier.misses == misses
                except ServerError:
                    refused += 1
    return 100 * hits / reads, refused


def eviction(count: int) -> list[str]:
    """Return a table of the policies."""
    lines = [
        f"Documents without a time to live and chunks with one. First {count:,} documents and "
        f"{TIMES_OVER} times as many bytes of chunks as there is room for; then the trace of "
        f"`examples/hot_tier.ipynb`, 160 reads in {LITTLE} of memory.",
        "",
        "| `maxmemory-policy` | documents found | chunks refused (OOM) | trace: hits | with "
        "prefetch | reads refused |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    with TemporaryDirectory() as folder:
        archive.write_archive(folder, patients=PATIENTS, studies=STUDIES)
        for policy in POLICIES:
            found, refused = findable(policy, count)
            plain, no = trace(Path(folder), policy, prefetch=False)
            ahead, also_no = trace(Path(folder), policy, prefetch=True)
            lines.append(
                f"| `{policy}` | {found} | {refused} | {plain:.0f}% | {ahead:.0f}% | "
                f"{no + also_no} of 320 |"
            )
            print(lines[-1], flush=True)
    return lines


def shared(files: Mapping[str, Path]) -> Iterator[tuple[str, str]]:
    """Say how much of the documents are attributes that all of a series have alike."""
    for what, folder in files.items():
        with RedisServer() as server, connect(server.url) as client:
            store = DicomStore(client, progress=False)
            store.load(folder)
            series = defaultdict(list)
            for key in client.scan_iter("file:*", count=1000, _type="ReJSON-RL"):
                one = json.loads(client.execute_command("JSON.GET", key))
                series[one.get("seriesInstanceUID")].append(one)
            sizes, lean = [], []
            for uid, members in series.items():
                alike = set()
                if uid and len(members) > 1:
                    heads = [one.get("header", {}) for one in members]
                    alike = {k for k, v in heads[0].items() if all(h.get(k) == v for h in heads)}
                for number, one in enumerate(members):
                    sizes.append(_memory(client, one))
                    kept = {k: v for k, v in one.get("header", {}).items() if k not in alike}
                    lean.append(_memory(client, one | {"header": kept} if number else one))
            saved = 1 - sum(lean) / sum(sizes)
            yield (
                f"{what}: {len(sizes)} documents in {len(series)} series, mean bytes; with what a "
                "series shares kept once",
                f"{sum(sizes) / len(sizes):,.0f}; {sum(lean) / len(sizes):,.0f} (-{saved:.0%})",
            )


def _memory(client: redis.Redis, members: Mapping[str, Any]) -> int:
    client.execute_command("JSON.SET", "scratch", "$", json.dumps(members))
    return int(client.execute_command("JSON.DEBUG", "MEMORY", "scratch"))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9, help="rounds (default: 9)")
    parser.add_argument("--slide", type=int, default=1536, help="MiB of the slide")
    parser.add_argument("--documents", type=int, default=100_000, help="how many are to stay")
    arguments = parser.parse_args(argv)
    lines = [
        f"Up to {arguments.rounds} rounds; {machine()} Medians, with the lowest and the highest.",
        "",
        "| what | measured |",
        "|---|---:|",
    ]

    def say(rows: Iterator[tuple[str, str]]) -> None:
        for what, value in rows:
            lines.append(f"| {what} | {value} |")
            print(lines[-1], flush=True)

    say(first_miss(arguments.rounds))
    say(one_gap())
    say(one_chunk(arguments.slide * MIB, arguments.rounds))
    say(cold_load(max(1, arguments.rounds // 3)))
    with TemporaryDirectory() as folder:
        made = write_sample_ct(folder, slices=300, side=64)
        real = Path(pydicom.__file__).parent / "data"
        say(shared({"the made-up CT": made, "pydicom's files": real}))
    lines += ["", *eviction(arguments.documents)]
    TABLE.write_text("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
