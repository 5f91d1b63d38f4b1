"""Loading real DICOM files, beside one process that sends a SET for each 5 KB chunk.

All files of pydicom and pydicom-data go into an empty server by each method in turn, several
times over. Run it with `make bench-load`.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import io
import json
import sqlite3
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pydicom
import redis
from pydicom.errors import InvalidDicomError
from reporting import extent, machine, ratios

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

from demo.ct import write_sample_ct  # noqa: E402 - run in place, not installed
from dicomstore import DicomStore, connect  # noqa: E402
from dicomstore.imaging import describing, header  # noqa: E402
from dicomstore.server.embedded import RedisServer  # noqa: E402

MIB = 1024 * 1024
CHUNK = 5 * 1024
TABLE = PROJECT / "benchmarks" / "load.md"
PUBLISHED = "published method: four fields"
ALIKE = "one process: these documents"
PLAIN = "this project, without thumbnails"
WHOLE = "this project, with thumbnails"
FIRST = ", first load of a process"
AGAIN = "this project, all stored already"
SMALL = 2000
SQLITE = f"{SMALL:,} files of 39 kB: a folder, SQLite and SHA-256, one process"
SMALL_PLAIN = f"{SMALL:,} files of 39 kB: this project, without thumbnails"
#: Ours, and the method that it is compared with.
PAIRS = (
    (PLAIN, PUBLISHED),
    (PLAIN, ALIKE),
    (WHOLE, PUBLISHED),
    (WHOLE, ALIKE),
    (PLAIN + FIRST, PUBLISHED),
    (WHOLE + FIRST, PUBLISHED),
    (SMALL_PLAIN, SQLITE),
)


def folders() -> list[Path]:
    """Return the folders of real files: pydicom's own, and those of the package pydicom-data."""
    found = importlib.util.find_spec("data_store")
    if found is None or found.origin is None:
        raise ModuleNotFoundError("pydicom-data is missing: pip install -r requirements.txt")
    return [Path(pydicom.__file__).parent / "data", Path(found.origin).parent / "data"]


def real_files() -> list[Path]:
    """Return all files of those folders."""
    found = [file for folder in folders() for file in sorted(folder.rglob("*"))]
    return [file for file in found if file.is_file()]


def published(url: str) -> int:
    """Load as the published method does, with all files that it can read."""
    client = redis.Redis.from_url(url)
    count = 0
    for file in real_files():
        try:
            dataset = pydicom.dcmread(file)
        except InvalidDicomError:
            continue
        fields = ("ProtocolName", "PatientSex", "StudyDate", "Manufacturer")
        members: dict[str, Any] = {name: str(dataset.get(name, "")) for name in fields}
        members["chunks"] = _chunks(client, file)
        client.json().set(f"image:{file}", "$", members)
        count += 1
    client.close()
    return count


def alike(url: str) -> int:
    """Store what this project stores, digest included, one chunk and one file after the other."""
    client = redis.Redis.from_url(url)
    count = 0
    for file in real_files():
        with file.open("rb") as opened:
            members = header.searchable(opened)
        if members is None:
            continue
        members["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
        members["chunks"] = _chunks(client, file)
        client.execute_command("JSON.SET", f"image:{file}", "$", json.dumps(members))
        count += 1
    client.close()
    return count


def _chunks(client: redis.Redis, file: Path) -> list[str]:
    """Store the chunks of a file; return their keys."""
    content = file.read_bytes()
    keys = []
    for start in range(0, len(content), CHUNK):
        keys.append(f"piece:{file}:{start // CHUNK}")
        client.set(keys[-1], content[start : start + CHUNK])
    return keys


def loaded(store: DicomStore) -> int:
    reports = [store.load(folder, under=f"{n}") for n, folder in enumerate(folders())]
    return sum(int((report["status"] != "skipped").sum()) for report in reports)


def small_files(folder: Path) -> Path:
    """Write 2,000 slices of 39 kB below `folder`."""
    return write_sample_ct(folder, slices=SMALL, side=136)


def sqlite_folder(source: Path, target: Path) -> int:
    """Keep files in a folder, and what is searched in SQLite, with SHA-256; one process."""
    database = sqlite3.connect(target / "index.db")
    names = ("ProtocolName", "PatientID", "StudyDate", "Modality", "SeriesInstanceUID")
    database.execute(f"CREATE TABLE image (path, digest, {', '.join(names)})")
    files = sorted(file for file in source.rglob("*") if file.is_file())
    for number, file in enumerate(files):
        content = file.read_bytes()
        dataset = pydicom.dcmread(io.BytesIO(content), stop_before_pixels=True)
        (target / f"{number}.dcm").write_bytes(content)
        row = [str(dataset.get(name, "")) for name in names]
        digest = hashlib.sha256(content).hexdigest()
        database.execute(
            "INSERT INTO image VALUES (?, ?, ?, ?, ?, ?, ?)", [file.name, digest, *row]
        )
    database.commit()
    database.close()
    return len(files)


def fresh() -> None:
    """End the worker processes, as if this process had loaded nothing yet."""
    describing.end_idle_workers()


def measure(small: Path, rounds: int) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Return the seconds of each method and how many files it loads."""
    seconds: dict[str, list[float]] = {}
    counts: dict[str, int] = {}

    def timed(name: str, work: Callable[[], int]) -> None:
        start = time.perf_counter()
        counts[name] = work()
        seconds.setdefault(name, []).append(time.perf_counter() - start)

    for number in range(rounds):
        for name, peer in ((PUBLISHED, published), (ALIKE, alike)):
            with RedisServer() as server:
                timed(name, lambda peer=peer, url=server.url: peer(url))  # type: ignore[misc]
        for name, descriptors in ((PLAIN, False), (WHOLE, True)):
            fresh()
            for suffix in (FIRST, ""):
                with RedisServer() as server, connect(server.url) as client:
                    store = DicomStore(client, progress=False, thumbnails=descriptors)
                    timed(name + suffix, lambda store=store: loaded(store))  # type: ignore[misc]
                    if descriptors and not suffix:
                        timed(AGAIN, lambda store=store: loaded(store))  # type: ignore[misc]
        with TemporaryDirectory() as target:
            timed(SQLITE, lambda target=target: sqlite_folder(small, Path(target)))  # type: ignore[misc]
        with RedisServer() as server, connect(server.url) as client:
            store = DicomStore(client, progress=False, thumbnails=False)
            timed(SMALL_PLAIN, lambda store=store: len(store.load(small)))  # type: ignore[misc]
        print(f"round {number + 1} of {rounds}", flush=True)
    return seconds, counts


def table(seconds: dict[str, list[float]], counts: dict[str, int]) -> str:
    """Return the results as Markdown."""
    files = real_files()
    size = sum(file.stat().st_size for file in files) / MIB
    rounds = len(seconds[PUBLISHED])
    lines = [
        f"{len(files)} files of {size:.0f} MiB, {rounds} interleaved rounds; {machine()} "
        "The published method is that of the demonstration redis-dicom of 2023: it reads four "
        "fields of a file and sends one SET for each 5 KB chunk. The second method does the same "
        "with this project's documents. A *thumbnail* is what `similar` compares.",
        "",
        "| method | files stored | median, ms | lowest to highest |",
        "|---|---:|---:|---:|",
    ]
    for name, times in seconds.items():
        low, median, high = extent(times)
        lines.append(f"| {name} | {counts[name]} | {median:.0f} | {low:.0f} to {high:.0f} |")
    lines += ["", *ratios(seconds, PAIRS)]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9, help="rounds (default: 9)")
    arguments = parser.parse_args(argv)
    if arguments.rounds < 1:
        print("--rounds is at least 1.", file=sys.stderr)
        return 2
    with TemporaryDirectory() as folder:
        TABLE.write_text(table(*measure(small_files(Path(folder)), arguments.rounds)))
    print(f"\n{TABLE.read_text()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
