"""DICOMweb as a viewer asks for it: from this project and from Orthanc, by one client.

Searches among many studies, a series' metadata, frames with up to 32 clients, the server's memory,
and OHIF's time to the first image. Run it with `make bench-web`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import ohif
import psutil
import pydicom
from peers import ORTHANC, OURS, PLUGIN, PROJECT, Client, Peer, orthanc, ours, send
from reporting import machine
from search import documents

from demo import ct
from demo.cine import SIDE, UID, write_sample_cine
from dicomstore import DicomStore, connect
from dicomstore.blobs.wire import crc32
from dicomstore.server.embedded import RedisServer
from dicomstore.web.app import PREFIX

KIB, MIB = 1024, 1024 * 1024
TABLE = PROJECT / "benchmarks" / "dicomweb.md"
SLICES, CLIENTS = 300, (1, 8, 32)
FRAMES, LARGE = 400, 3072  # of 512 KiB: 200 MiB, 1.5 GiB
NEEDED = 6 * KIB * MIB
#: A page of OHIF's study list.
LIST = "/studies?limit=101&offset=0&fuzzymatching=false&includefield=00081030,00080060,00080090"
SYLLABLES = ("BER", "LIN", "MAR", "SON", "KO", "VA", "DE", "RICH", "TA", "MEY", "OL", "SEN")
JSON = "application/dicom+json"
FRAME = 'multipart/related; type="application/octet-stream"; transfer-syntax="*"'
FILE = 'multipart/related; type="application/dicom"; transfer-syntax="*"'

Times = dict[str, list[float]]


def address(study: str, series: str, instance: str = "") -> str:
    path = f"{PREFIX}/studies/{study}/series/{series}"
    return f"{path}/instances/{instance}" if instance else path


# --- searches ------------------------------------------------------------------------------------


def fill(store: DicomStore, studies: int) -> None:
    """Store documents of studies of 100 instances, each with the metadata of a CT's slice."""
    with TemporaryDirectory() as folder:
        store.load(ct.write_sample_ct(folder, slices=1, side=16))
    (key,) = store.find()["key"]
    version = store.manifest(key.removeprefix("file:")).version
    client: Any = store.client
    text = client.get(f"chunk:{key}:{version}:json")
    names = random.Random("names")
    made = documents(0, 100 * studies, thumbnails=False, series_each=10)
    for _ in range(studies):
        name = "^".join("".join(names.choices(SYLLABLES, k=3)) for _ in range(2))
        with client.pipeline(transaction=False) as pipe:
            for key, document in (next(made) for _ in range(100)):
                members = {**json.loads(document), "patientName": name}
                members["attachments"] = {"json": crc32(text)}
                pipe.execute_command("JSON.SET", key, "$", json.dumps(members))
                pipe.set(f"chunk:{key}:{members['version']}:json", text)
            pipe.execute()


async def searches(studies: int, rounds: int) -> Times:
    """Return how long searches for studies take (ms)."""
    times: Times = defaultdict(list)
    chosen = random.Random("searches")
    with RedisServer() as redis, connect(redis.url) as client:
        store = DicomStore(client, progress=False)
        fill(store, studies)
        changed = "file:archive/00000/000000/IM000000.dcm"
        questions: dict[str, Callable[[], str]] = {
            "first page of the list": lambda: LIST,
            "first page, after a document has changed": lambda: LIST,
            "part of a name, a different one each time": lambda: (
                f"{LIST}&PatientName=*{''.join(chosen.choices(SYLLABLES, k=2)).lower()}*"
            ),
            "four weeks, different ones each time": lambda: (
                LIST + "&StudyDate={0}{1:02}01-{0}{1:02}28".format(
                    chosen.randrange(2016, 2025), chosen.randrange(1, 13)
                )
            ),
        }  # fmt: skip
        with ours(redis.url) as peer:
            browser = Client(peer.port)
            for number in range(rounds + 1):
                for name, question in questions.items():
                    if name.endswith("changed"):
                        json_client: Any = client
                        json_client.execute_command("JSON.SET", changed, "$.rows", number)
                    begin = time.perf_counter()
                    await browser.get(PREFIX + question(), JSON)
                    if number:
                        times[name].append((time.perf_counter() - begin) * 1000)
            browser.close()
    return times


# --- metadata and frames -------------------------------------------------------------------------


async def timed(client: Client, path: str, accept: str) -> tuple[float, bytes]:
    """Return how long an answer takes (ms), and the answer."""
    begin = time.perf_counter()
    body = await client.get(path, accept)
    return (time.perf_counter() - begin) * 1000, body


async def metadata(peers: Sequence[Peer], rounds: int) -> Times:
    """Return how long the metadata of the CT takes (ms)."""
    times: Times = defaultdict(list)
    clients = {peer.name: Client(peer.port) for peer in peers}
    for number in range(rounds + 1):
        for name, client in clients.items():
            path = address(ct.STUDY, ct.SERIES) + "/metadata"
            taken, body = await timed(client, path, JSON)
            if not number and len(json.loads(body)) != SLICES:
                raise RuntimeError(f"{name} does not tell all metadata.")
            if number:
                times[name].append(taken)
    return times


def write_small_ct(folder: Path) -> list[str]:
    """Write a CT of 128 KiB a slice under UIDs of its own; return its instances' addresses."""
    ct.write_sample_ct(folder, slices=SLICES, side=256)
    shared = ct.UID_ROOT[:-2]  # of all its UIDs
    root = shared[:-1] + "8"
    for path in folder.iterdir():
        path.write_bytes(path.read_bytes().replace(shared.encode(), root.encode()))
    study, series = (uid.replace(shared, root) for uid in (ct.STUDY, ct.SERIES))
    uids = [pydicom.dcmread(path).SOPInstanceUID for path in folder.iterdir()]
    return [address(study, series, uid) for uid in uids]


def write_copies(folder: Path, count: int) -> list[str]:
    """Write copies of an instance of 512 KiB a frame under their own UIDs, and return these."""
    uids = [UID[:-1] + str(number) for number in range(count)]
    folder.mkdir()
    content = write_sample_cine(folder / "cine", frames=FRAMES).read_bytes()
    for uid in uids:
        head = content[:4096].replace(UID.encode(), uid.encode())
        (folder / f"{uid}.dcm").write_bytes(head + content[4096:])
    (folder / "cine").unlink()
    return uids


async def large_frames(peers: Sequence[Peer], uids: Sequence[str]) -> dict[str, Times]:
    """Return how long frames of multi-frame instances take (ms): the first asked for, and more."""
    first: Times = defaultdict(list)
    later: Times = defaultdict(list)  # medians
    clients = {peer.name: Client(peer.port) for peer in peers}
    for uid in uids:
        path = address(uid, uid, uid) + "/frames/"
        numbers = random.Random(uid).sample(range(1, FRAMES + 1), 4)
        answers = {}
        for name, client in clients.items():
            found = [await timed(client, f"{path}{number}", FRAME) for number in numbers]
            first[name].append(found[0][0])
            later[name].append(statistics.median(taken for taken, _ in found[1:]))
            answers[name] = {content(body) for _, body in found}
            if {len(one) for one in answers[name]} != {2 * SIDE * SIDE}:
                raise RuntimeError(f"{name} does not send whole frames.")
        if any(one != answers[OURS] for one in answers.values()):
            raise RuntimeError("The frames differ.")
    return {"first": first, "later": later}


def content(multipart: bytes) -> bytes:
    """Return what the only part of an answer holds."""
    boundary, _, rest = multipart.partition(b"\r\n")
    return rest.partition(b"\r\n\r\n")[2].partition(b"\r\n" + boundary)[0]


async def at_once(port: int, paths: Sequence[str], clients: int, seconds: float) -> Sequence[float]:
    """Return how long each frame took (ms) that `clients` asked for, one after the other each."""
    found: list[float] = []
    end = time.perf_counter() + seconds

    async def ask(number: int) -> None:
        client, chosen = Client(port), random.Random(number)
        while time.perf_counter() < end:
            taken, body = await timed(client, chosen.choice(paths), FRAME)
            if len(body) < 128 * KIB:
                raise RuntimeError("An answer has less than a frame.")
            found.append(taken)
        client.close()

    await asyncio.gather(*map(ask, range(clients)))
    return found


async def many_frames(
    peers: Sequence[Peer], instances: Sequence[str], rounds: int, seconds: float
) -> dict[int, dict[str, Times]]:
    """Return by number of clients the frames a second, and the median and p99 (ms)."""
    found: dict[int, dict[str, Times]] = {
        clients: {what: defaultdict(list) for what in ("rate", "p50", "p99")} for clients in CLIENTS
    }
    paths = [f"{instance}/frames/1" for instance in instances]
    for number in range(rounds + 1):
        for clients in CLIENTS:
            for peer in peers:
                # The first time warms up.
                times = await at_once(peer.port, paths, clients, seconds if number else 0.5)
                if number:
                    p50, p99 = map(float, np.percentile(times, (50, 99)))
                    values = {"rate": len(times) / seconds, "p50": p50, "p99": p99}
                    for what, value in values.items():
                        found[clients][what][peer.name].append(value)
    return found


# --- memory --------------------------------------------------------------------------------------


async def memory(frames: int, seconds: float) -> list[str]:
    """Return rows of the memory that our server takes while a large instance is read by many."""
    rows = []
    with TemporaryDirectory() as folder, RedisServer() as redis, connect(redis.url) as client:
        DicomStore(client, progress=False).load(
            write_sample_cine(Path(folder) / "1", frames=frames)
        )
        instance = address(UID, UID, UID)
        numbers = random.Random("memory")
        ways: dict[str, tuple[Callable[[], str], str]] = {
            "its frames": (lambda: f"{instance}/frames/{numbers.randint(1, frames)}", FRAME),
            "all of it, streamed": (lambda: instance, FILE),
        }
        for way, (path, accept) in ways.items():
            with ours(redis.url) as peer:
                before = peak(peer)
                clients = [Client(peer.port) for _ in range(CLIENTS[-1])]
                async with asyncio.TaskGroup() as group:
                    for one in clients:
                        group.create_task(read_on(one, path, accept, seconds))
                rate = sum(one.received for one in clients) / MIB / seconds
                rows.append(f"| {way} | {before:.0f} | {peak(peer):.0f} | {rate:.0f} |")
                for one in clients:
                    one.close()
                await asyncio.sleep(0.1)  # else the server is ended before they have left
    return rows


async def read_on(client: Client, path: Callable[[], str], accept: str, seconds: float) -> None:
    """Ask again and again, and leave in the middle of an answer."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            while True:
                await client.get(path(), accept, is_kept=False)


def peak(peer: Peer) -> float:
    """Return the most memory that a process has had (MiB)."""
    status = Path(f"/proc/{peer.pid}/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / KIB


# --- results -------------------------------------------------------------------------------------


def spread(values: Sequence[float]) -> str:
    digits = 0 if min(values) >= 100 else 2 if max(values) < 10 else 1
    low, median, high = min(values), statistics.median(values), max(values)
    return f"{median:,.{digits}f} ({low:,.{digits}f} to {high:,.{digits}f})"


def row(label: str, times: Times, *, is_rate: bool = False) -> str:
    """Return a row of both peers, and how many times as fast we are, round by round."""
    if ORTHANC not in times:
        return f"| {label} | {spread(times[OURS])} | | |"
    pairs = zip(times[OURS], times[ORTHANC], strict=True)
    found = [us / them if is_rate else them / us for us, them in pairs]
    return f"| {label} | {spread(times[OURS])} | {spread(times[ORTHANC])} | {spread(found)} |"


async def beside(program: str | None, rounds: int, seconds: float) -> AsyncIterator[str]:
    """Yield the rows of what both peers are asked."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory()))
        ct.write_sample_ct(folder / "ct", slices=SLICES)
        small = write_small_ct(folder / "small")
        large = write_copies(folder / "large", rounds)
        redis = stack.enter_context(RedisServer())
        client = stack.enter_context(connect(redis.url))
        store = DicomStore(client, progress=False)
        store.load(folder)
        peers = [stack.enter_context(ours(redis.url))]
        if program is not None:
            theirs = Path(stack.enter_context(TemporaryDirectory()))
            peers.append(stack.enter_context(orthanc(theirs, program)))
            send(peers[-1], folder)
        yield row(
            f"metadata of a CT, {SLICES} slices of 512 x 512, ms", await metadata(peers, rounds)
        )
        for which, times in (await large_frames(peers, large)).items():
            yield row(f"{which} frame of 512 KiB in an instance of 200 MiB, ms", times)
        for clients, found in (await many_frames(peers, small, rounds, seconds)).items():
            label = f"frames of 128 KiB, {clients} client{'s' * (clients > 1)}"
            yield row(f"{label}, a second", found["rate"], is_rate=True)
            yield row(f"{label}, p50, ms", found["p50"])
            yield row(f"{label}, p99, ms", found["p99"])
        if (why := ohif.lacking()) is not None:
            print(why, file=sys.stderr)
            return
        opened = await ohif.first_image(peers, store, ct.STUDY, max(2, rounds // 2))
        yield row("OHIF, from opening the CT to its first image, ms", opened["image"])
        yield row("OHIF, the CT's metadata, ms", opened["metadata"])


async def results(arguments: argparse.Namespace, program: str | None) -> AsyncIterator[str]:
    """Yield the lines of the tables."""
    rounds, seconds = arguments.rounds, arguments.seconds
    yield "| | this project | Orthanc | times as fast, round by round |"
    yield "|---|---:|---:|---:|"
    async for line in beside(program, rounds, seconds):
        yield line
    yield ""
    instances = 100 * arguments.studies
    yield f"| {instances:,} instances in {arguments.studies:,} studies | p50 / p95, ms |"
    yield "|---|---:|"
    for name, times in (await searches(arguments.studies, 10 * rounds)).items():
        p50, p95 = np.percentile(times, (50, 95))
        yield f"| {name} | {p50:.1f} / {p95:.1f} |"
    yield ""
    yield (
        f"| the server's memory while {CLIENTS[-1]} clients read an instance of 1.5 GiB | "
        "at the start, MiB | most, MiB | sent, MiB/s |"
    )
    yield "|---|---:|---:|---:|"
    for line in await memory(LARGE, 3 * seconds):
        yield line


async def written(heading: str, lines: AsyncIterator[str]) -> None:
    """Print lines as they come, and keep them as the table."""
    found = [heading, ""]
    print(heading, "", sep="\n", flush=True)
    async for line in lines:
        print(line, flush=True)
        found.append(line)
    TABLE.write_text("\n".join(found) + "\n")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds (default: 5)")
    parser.add_argument("--seconds", type=float, default=3, help="of each load (default: 3)")
    parser.add_argument("--studies", type=int, default=2000, help="to search (default: 2000)")
    arguments = parser.parse_args(argv)
    if arguments.rounds < 1 or arguments.studies < 1 or arguments.seconds <= 0:
        print("--rounds and --studies are at least 1, --seconds more than 0.", file=sys.stderr)
        return 2
    if (free := psutil.virtual_memory().available) < NEEDED:
        print(f"{NEEDED // MIB} MiB of memory are needed, {free // MIB} are free.", file=sys.stderr)
        return 1
    program = shutil.which("Orthanc", path=f"{os.environ['PATH']}:/usr/sbin")
    if program is None or not PLUGIN.exists():
        program = None
        print("Orthanc is not installed (apt-get install orthanc orthanc-dicomweb): only this "
              "project is measured.", file=sys.stderr)  # fmt: skip
    heading = (
        f"{arguments.rounds} interleaved rounds; medians, with the lowest and the highest. "
        f"{machine()} {versions(program)} Both have the same files and are asked by the same "
        "client, over connections that are kept."
    )
    asyncio.run(written(heading, results(arguments, program)))
    return 0


def versions(program: str | None) -> str:
    if program is None:
        return ""
    said = subprocess.run([program, "--version"], capture_output=True, text=True, check=True)
    number = said.stdout.split()[1]
    return f"Orthanc {number} as Debian has it, with its DICOMweb plug-in."


if __name__ == "__main__":
    sys.exit(main())
