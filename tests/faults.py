"""What the store has to survive, each fault as a function of how often it is done.

`make faults` runs them at length and writes the report; tests/test_faults.py runs them briefly.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import io
import json
import multiprocessing
import multiprocessing.forkserver as forkserver
import os
import platform
import random
import resource
import signal
import socket
import string
import struct
import sys
import tempfile
import threading
import time
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pydicom
import redis
from pydicom.uid import DeflatedExplicitVRLittleEndian
from samples import PREAMBLE, dicom, element
from tqdm import tqdm

from dicomstore import DicomStore, connect
from dicomstore.blobs import versions
from dicomstore.errors import DamagedError, DicomRedisError, MissingChunkError, ServerError
from dicomstore.server.embedded import RedisServer

REPORT = Path(__file__).parent.parent / "benchmarks" / "faults.md"
PYDICOM_FILES = Path(pydicom.__file__).parent / "data" / "test_files"
SHORT_LEASE_MS = 300
CHUNK_SIZES = (700, 1000, 4096)
#: What one hostile file may cost.
SECONDS, MEBIBYTES = 2, 300
ITEM, SEQUENCE = b"\xfe\xff\x00\xe0", 0x00081140


@functools.cache
def workers():
    """Starts processes that inherit no thread, connection or pipe, and need not import again."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["faults"])
    before = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    forkserver.ensure_running()
    os.environ["PYTHONPATH"] = before
    return context


@contextlib.contextmanager
def lease_of(milliseconds):
    before, versions.LEASE_MS = versions.LEASE_MS, milliseconds
    try:
        yield
    finally:
        versions.LEASE_MS = before


def store_of(client, chunk_size=1000, **options):
    # Without thumbnails: decoding has a part of its own, mutated files.
    return DicomStore(client, chunk_size=chunk_size, progress=False, thumbnails=False, **options)


def unreferenced(client):
    """The keys below chunk: that belong to no document's version."""
    named = set()
    for key in client.scan_iter("file:*", count=10_000):
        document = json.loads(client.execute_command("JSON.GET", key))
        version = f"chunk:{os.fsdecode(key)}:{document['version']}"
        named |= {*document["chunks"], *(f"{version}:{name}" for name in document["attachments"])}
    return {os.fsdecode(key) for key in client.scan_iter("chunk:*", count=10_000)} - named


def assert_whole(client):
    """Every file is whole and, after a sweep, no byte is without a document. Returns the swept."""
    swept = int(store_of(client).sweep()["size"].sum())
    report = store_of(client).verify()
    assert report["status"].eq("ok").all(), report.to_string()
    left = unreferenced(client)
    assert not left, f"without a document: {sorted(left)[:5]}"
    return swept


def versions_of(number, count=2):
    return [dicom(Rows=n + 1, pixels=bytes([n, number]) * 12_000) for n in range(count)]


# --- killed loaders ------------------------------------------------------------------------------


def load_for_ever(url, folders, chunk_size, ready):
    tqdm.set_lock(threading.RLock())  # tqdm's own is a semaphore that a killed process leaves
    with lease_of(SHORT_LEASE_MS):
        store = store_of(connect(url), chunk_size)
        store.find()
        ready.send(True)
        while True:
            for folder in folders:
                store.load(folder)


def killed_loaders(kills):
    """`kill -9` of loaders at random moments, while others load the same names and are read."""
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        server = stack.enter_context(RedisServer())
        client = stack.enter_context(connect(server.url))
        stack.enter_context(lease_of(SHORT_LEASE_MS))
        images = {f"{number}.dcm": versions_of(number) for number in range(3)}
        folders = [scratch / "a", scratch / "b"]
        for turn, folder in enumerate(folders):
            folder.mkdir()
            for name, versions in images.items():
                (folder / name).write_bytes(versions[turn])
        store_of(client).load(folders[0])
        stop, reads, wrong = threading.Event(), Counter(), []

        def read():
            with connect(server.url) as own:
                store = store_of(own)
                while not stop.is_set():
                    for name, versions in images.items():
                        try:
                            reads[versions.index(store.read(name))] += 1
                        except Exception as error:
                            wrong.append(error)

        def start():
            order = random.sample(folders, 2)
            here, there = workers().Pipe()
            arguments = (server.url, order, random.choice(CHUNK_SIZES), there)
            loader = workers().Process(target=load_for_ever, args=arguments, daemon=True)
            loader.start()
            there.close()
            assert here.recv()
            here.close()
            return loader

        reader = threading.Thread(target=read)
        reader.start()
        loaders, swept = [start(), start()], 0
        try:
            for number in range(kills):
                time.sleep(random.uniform(0, 0.1))
                victim = loaders.pop(0)
                assert victim.exitcode is None, "a loader ended by itself"
                victim.kill()
                victim.join()
                loaders.append(start())
                if number % 50 == 49:
                    swept += int(store_of(client).sweep()["size"].sum())
        finally:
            for loader in loaders:
                loader.kill()
                loader.join()
            stop.set()
            reader.join()
        assert not wrong, wrong[:3]
        time.sleep(SHORT_LEASE_MS / 1000)  # what the killed had sent arrives, their leases end
        swept += assert_whole(client)
        assert reads[0] and reads[1], "nothing was replaced"
        return (
            f"{sum(reads.values()):,} reads: {reads[0]:,} the one version, {reads[1]:,} the other, "
            f"no error; {swept:,} bytes swept, none unreferenced after it"
        )


# --- a killed server -----------------------------------------------------------------------------


def killed_server(kills):
    """`kill -9` of the server with its append-only file on, and a restart from that."""
    acknowledged, files = {}, 0
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(kills):
            with RedisServer(folder=folder) as server, connect(server.url) as client:
                store = store_of(client)
                process = client.info("server")["process_id"]
                timer = threading.Timer(
                    random.uniform(0.02, 0.3), os.kill, (process, signal.SIGKILL)
                )
                timer.start()
                with contextlib.suppress(DicomRedisError):
                    for number in range(10_000):
                        path = f"{number % 20}"
                        image = dicom(Rows=turn + 1, InstanceNumber=number, pixels=bytes(20_000))
                        pending = path, image
                        store.put(path, image)
                        acknowledged[path] = image
                        files += 1
                timer.join()
            with RedisServer(folder=folder) as server, connect(server.url) as client:
                store = store_of(client)
                for path, image in acknowledged.items():
                    found = store.read(path)
                    # The one that was under way may have arrived without its answer.
                    assert found == image or (path, found) == pending, path
                    acknowledged[path] = found
                assert set(store.find(columns=())["path"]) >= set(acknowledged)
                assert len(store.find(columns=())) == len(store.verify())
                client.delete(*unreferenced(client) or ["chunk:none"])
    return f"{files:,} acknowledged files, every one whole after each restart; the index complete"


# --- damage --------------------------------------------------------------------------------------

DOCUMENT_EDITS = {
    "size": lambda value: value + random.choice([-1, 1, 1000]),
    "chunkSize": lambda value: random.choice([value + 1, value - 1, 0, 2 * value]),
    "version": lambda value: random.choice(["", "0123456789ab", value[::-1] + "0"]),
    "tail": lambda value: random.choice([[], [1], [*value, 5], "x"]),
    "crc": lambda value: [value[0] ^ 1, *value[1:]],
    "chunks": lambda value: random.choice([value[:-1], value[::-1], ["file:0", *value[1:]]]),
    "blake3": lambda value: random.choice(["0" * 64, value[:-1], value[::-1]]),
    "imageName": lambda value: value + "x",
}


def damage(count):
    """Chunks altered, deleted, shortened, lengthened, swapped; storage fields edited."""
    kinds = Counter()
    with RedisServer() as server, connect(server.url) as client:
        store = store_of(client)
        images = {f"{n}": dicom(Rows=n + 1, pixels=random.randbytes(9000)) for n in range(6)}
        for path, image in images.items():
            store.put(path, image)
        for _ in range(count):
            path, other = random.sample(sorted(images), 2)
            manifest = store.manifest(path)
            key = random.choice(manifest.chunk_keys())
            foreign = random.choice(store.manifest(other).chunk_keys())
            value = client.get(key)
            kind = random.choice(
                ["flip", "delete", "truncate", "lengthen", "swap", "type", *DOCUMENT_EDITS]
            )
            undo = [functools.partial(_restore_key, client, key, value)]
            named = [key]
            if kind == "flip":
                at = random.randrange(len(value))
                client.setrange(key, at, bytes([value[at] ^ (1 << random.randrange(8))]))
            elif kind == "delete":
                client.unlink(key)
            elif kind == "truncate":
                client.set(key, value[: random.randrange(len(value))])
            elif kind == "lengthen":
                client.append(key, random.randbytes(random.randrange(1, 100)))
            elif kind == "type":
                client.unlink(key)
                client.rpush(key, value)
            elif kind == "swap":
                swapped = client.get(foreign)
                if swapped == value:  # equal bytes are no damage
                    continue
                client.set(key, swapped)
                client.set(foreign, value)
                undo.append(functools.partial(_restore_key, client, foreign, swapped))
            else:
                document = client.execute_command("JSON.GET", manifest.key)
                old = json.loads(document)[kind]
                new = DOCUMENT_EDITS[kind](old)
                if new == old:
                    continue
                edit = json.dumps(new)
                client.execute_command("JSON.SET", manifest.key, f"$.{kind}", edit)
                undo = [functools.partial(
                    client.execute_command, "JSON.SET", manifest.key, "$", document)]  # fmt: skip
                named = [manifest.key]
            _assert_noticed(store, images, path, kind, named, other if kind == "swap" else None)
            for step in undo:
                step()
            kinds[kind] += 1
        assert store.verify()["status"].eq("ok").all()
    shown = ", ".join(f"{kind} {number}" for kind, number in sorted(kinds.items()))
    return (
        f"every one noticed and named, the other files unaffected ({shown}); an edited document "
        "that read and open need not look at, by verify and restore"
    )


def _restore_key(client, key, value):
    client.unlink(key)
    client.set(key, value)


def _assert_noticed(store, images, path, kind, named, also):
    def opened():
        with store.open(path) as file:
            return file.read()

    ways = {
        "read": lambda: store_of(store.client).read(path),
        "read again": lambda: store.read(path),
        "open": opened,
    }
    for way, read in ways.items():
        try:
            assert read() == images[path], f"{way} gave wrong bytes after {kind}"
            # A file that was read before is read by what is remembered, checked by version and CRC.
            untouched = {
                "read": {"blake3"},
                "read again": set(DOCUMENT_EDITS),
                "open": {"blake3", "chunks", "imageName"},
            }
            assert kind in untouched[way], f"{way} did not notice {kind}"
        except (DamagedError, MissingChunkError) as error:
            assert any(name in str(error) for name in named), (way, kind, str(error))
    report = store.verify().set_index("path")
    affected = {path, also} - {None}
    assert set(report.index[report["status"] != "ok"]) == affected, (kind, report.to_string())
    assert any(name in report["reason"][path] for name in named), report["reason"][path]
    for other in set(images) - affected:
        assert store.read(other) == images[other]


# --- damage that is mended -----------------------------------------------------------------------

CHUNK_DAMAGE = {
    "flip": lambda chunk: chunk[:-1] + bytes([chunk[-1] ^ 1]),
    "truncate": lambda chunk: chunk[: len(chunk) // 2],
    "lengthen": lambda chunk: chunk + b"x",
    "delete": lambda chunk: None,
}


def damage_some(client, manifests):
    """Damage or delete about one chunk in four; return how many."""
    count = 0
    for manifest in manifests:
        for key in manifest.chunk_keys():
            if random.random() < 0.25:
                damaged = random.choice(list(CHUNK_DAMAGE.values()))(client.get(key))
                client.unlink(key) if damaged is None else client.set(key, damaged)
                count += 1
    return count


def mended_damage(rounds):
    """Chunks damaged and deleted, mended by `load(repair=True)` while others read."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        server = stack.enter_context(RedisServer())
        clients = [stack.enter_context(connect(server.url)) for _ in range(3)]
        pool = stack.enter_context(ThreadPoolExecutor(2))
        images = {f"{n}": dicom(Rows=n + 1, pixels=random.randbytes(20_000)) for n in range(6)}
        for path, image in images.items():
            (folder / path).write_bytes(image)
        store = store_of(clients[0])
        store.load(folder)
        manifests = [store.manifest(path) for path in images]
        damaged, reads = 0, Counter()

        def read(client, repairing):
            own, found = store_of(client), Counter()
            while not repairing.is_set():
                for path, image in images.items():
                    try:
                        assert own.read(path) == image, path
                        found["whole"] += 1
                    except (DamagedError, MissingChunkError):
                        found["refused"] += 1
            return found

        for _ in range(rounds):
            damaged += damage_some(clients[0], manifests)
            repairing = threading.Event()
            readers = [pool.submit(read, client, repairing) for client in clients[1:]]
            try:
                statuses = set(store.load(folder, repair=True)["status"])
            finally:
                repairing.set()
            assert statuses <= {"repaired", "unchanged"}, statuses
            for reader in readers:
                reads += reader.result()
            assert [store.manifest(path) for path in images] == manifests
            assert_whole(clients[0])
        return (
            f"{damaged:,} chunks put right in the version that they belong to, nothing else sent; "
            f"meanwhile {reads['whole']:,} whole reads and {reads['refused']:,} clear errors"
        )


def refills(rounds):
    """Chunks damaged and deleted, fetched from the source by eight readers at once."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        server = stack.enter_context(RedisServer())
        clients = [stack.enter_context(connect(server.url)) for _ in range(8)]
        pool = stack.enter_context(ThreadPoolExecutor(8))
        images = {f"{n}": dicom(Rows=n + 1, pixels=random.randbytes(20_000)) for n in range(3)}
        for path, image in images.items():
            (folder / path).write_bytes(image)
        tiers = [store_of(client, source=folder) for client in clients]
        tiers[0].load(folder)
        manifests = [tiers[0].manifest(path) for path in images]
        damaged = 0

        def read(tier, by_parts):
            for path in random.sample(sorted(images), len(images)):
                if by_parts:
                    with tier.open(path) as file:
                        assert file.read() == images[path], path
                else:
                    assert tier.read(path) == images[path], path

        for _ in range(rounds):
            damaged += damage_some(clients[0], manifests)
            list(pool.map(read, tiers, [True, False] * 4))
            assert [tiers[0].manifest(path) for path in images] == manifests
            assert_whole(clients[0])
        hits, misses = (sum(getattr(tier, name) for tier in tiers) for name in ("hits", "misses"))
        assert hits + misses == rounds * 4 * len(images)
        return (
            f"{damaged:,} chunks fetched again, every read right ({hits:,} hits, {misses:,} misses)"
        )


# --- races ---------------------------------------------------------------------------------------


def racing_loaders(rounds):
    """A, B and A again on one name at once, in different chunk sizes; swept and read meanwhile."""
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(RedisServer())
        stack.enter_context(lease_of(SHORT_LEASE_MS))
        clients = [stack.enter_context(connect(server.url)) for _ in range(5)]
        pool = stack.enter_context(ThreadPoolExecutor(5))
        a, b = versions_of(1)
        stores = [store_of(c, size) for c, size in zip(clients, CHUNK_SIZES, strict=False)]
        reads = 0
        store_of(clients[4]).put("x", a)

        def read(loading):
            store, count = store_of(clients[4]), 0
            while not all(load.done() for load in loading):
                assert store.read("x") in (a, b)
                count += 1
            return count

        for _ in range(rounds):
            loads = [
                pool.submit(store.put, "x", image)
                for store, image in zip(stores, (a, b, a), strict=True)
            ]
            sweep = pool.submit(store_of(clients[3]).sweep)
            reads += read(loads)
            for load in loads:
                load.result()
            sweep.result()
            assert store_of(clients[4]).read("x") in (a, b)
        swept = assert_whole(clients[4])
        return f"{reads:,} reads, each one version whole; {swept} bytes left for the last sweep"


# --- eviction ------------------------------------------------------------------------------------


def eviction(files):
    """More files than memory, read by four at once, with a source and without."""
    said = []
    for policy in ("allkeys-lru", "volatile-ttl"):
        with contextlib.ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            server = stack.enter_context(RedisServer())
            client = stack.enter_context(connect(server.url))
            images = {
                f"{n}.dcm": dicom(Rows=n + 1, pixels=os.urandom(60_000)) for n in range(files)
            }
            for name, image in images.items():
                (folder / name).write_bytes(image)
            store_of(client).find()
            room = client.info("memory")["used_memory"] + files * 60_000 // 2
            client.config_set("maxmemory-policy", policy)
            client.config_set("maxmemory", room)
            ttl = 1000 if policy == "volatile-ttl" else None
            store_of(client, 16_000, ttl=ttl).load(folder)

            def read(source, url=server.url, names=tuple(images), images=images, ttl=ttl):
                outcomes = Counter()
                with connect(url) as own:
                    cache = store_of(own, 16_000, source=source, ttl=ttl)
                    for name in random.sample(names, len(names)):
                        try:
                            assert cache.read(name) == images[name], name
                        except DicomRedisError as error:
                            outcomes[type(error).__name__] += 1
                    outcomes.update(hits=cache.hits, misses=cache.misses)
                return outcomes

            for source in (None, folder):
                with ThreadPoolExecutor(4) as pool:
                    found = sum(pool.map(read, [source] * 4), Counter())
                errors = {name for name in found if name.endswith("Error")}
                if source is None:
                    assert errors and errors <= {"MissingChunkError", "NotStoredError"}, found
                else:
                    assert errors <= {"MissingChunkError", "ServerError"}, found
                shown = ", ".join(f"{name} {number}" for name, number in sorted(found.items()))
                said.append(f"{policy} with{'' if source else 'out'} source: {shown}")
            assert client.info("stats")["evicted_keys"] > 0
    return "right bytes or a clear error; " + "; ".join(said)


# --- mutated files -------------------------------------------------------------------------------


def nested(depth, *, undefined):
    content = b""
    for _ in range(depth):
        length = 0xFFFFFFFF if undefined else len(content)
        end = b"\xfe\xff\x0d\xe0" + bytes(4) if undefined else b""
        item = ITEM + struct.pack("<I", length) + content + end
        length = 0xFFFFFFFF if undefined else len(item)
        end = b"\xfe\xff\xdd\xe0" + bytes(4) if undefined else b""
        content = element(SEQUENCE, "SQ", item + end, length=length)
    return content


def deflated(start, piece=b"", times=0):
    """A file in deflated syntax (PS3.5 A.5) whose data set is `start` and `times` the `piece`."""
    compress = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    plain = dicom(syntax=DeflatedExplicitVRLittleEndian)
    with io.BytesIO(plain) as file:
        pydicom.filereader.read_preamble(file, True)
        pydicom.filereader._read_file_meta_info(file)
        head = plain[: file.tell()]
    pieces = [compress.compress(start), *(compress.compress(piece) for _ in range(times))]
    return head + b"".join(pieces) + compress.flush()


def heavy_files(bomb):
    """Files that are large or deep in what they say; those in deflated syntax of `bomb` MiB."""
    sop = element(0x00080016, "UI", b"1.2.840.10008.5.1.4.1.1.2\0")
    for undefined in (False, True):
        yield "nested", PREAMBLE + sop + nested(1000, undefined=undefined)
        yield "nested in deflated", deflated(sop + nested(1000, undefined=undefined))
    for vr, value in (("LO", b"ab"), ("SQ", b""), ("DS", b"1\\2 "), ("UN", b"")):
        many = b"".join(
            element((0x0009 + 2 * (n // 50_000) << 16) + 0x10 + n % 50_000, vr, value)
            for n in range(100_000)
        )
        yield "many elements", PREAMBLE + sop + many
        yield "many elements in deflated", deflated(sop + many)
    item = ITEM + bytes(4)
    yield "many items", PREAMBLE + sop + element(SEQUENCE, "SQ", item * 100_000)
    mebibyte = 1 << 20
    for name, start, piece in (
        ("a bomb of zeros", b"", bytes(mebibyte)),
        ("a bomb of text", element(0x00081140, "UT", b"", length=mebibyte << 8), b"x" * mebibyte),
        (
            "a bomb of items",
            element(SEQUENCE, "SQ", b"", length=0xFFFFFFFF),
            item * (mebibyte >> 3),
        ),
        ("a bomb of elements", b"", element(0x00100010, "PN", b"ab") * (mebibyte // 10)),
    ):
        yield name, deflated(sop + start, piece, bomb)


def mutations(count, seed):
    """`count` mutated files, as (kind, bytes): the heavy ones first, once, then random ones."""
    numbers = random.Random(seed)
    yield from heavy_files(1024 if count > 1000 else 32)
    bases = [file.read_bytes() for file in sorted(PYDICOM_FILES.glob("*.dcm"))]
    bases = [base for base in bases if len(base) < 60_000]
    cuts = [(base, at) for base in bases for at in range(100, len(base), 100)]
    while True:
        base = bytearray(numbers.choice(bases))
        kind = numbers.choice(["bit flips", "cut", "length", "header bit flips"])
        if kind == "cut":
            base, at = numbers.choice(cuts)
            yield kind, base[:at]
            continue
        reach = len(base) if kind == "bit flips" else min(len(base), 2500)
        if kind == "length":
            at = numbers.randrange(132, reach - 4)
            base[at : at + 4] = b"\xff\xff\xff\xff"
        else:
            for _ in range(numbers.randrange(1, 20)):
                base[numbers.randrange(reach)] ^= 1 << numbers.randrange(8)
        yield kind, bytes(base)


def processor_time():
    """Seconds that this process and its workers, living and ended, have taken so far."""
    living = 0.0
    for worker in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            living += sum(worker.cpu_times()[:2])
    return time.process_time() + living + sum(os.times()[2:4])


def store_mutations(url, folder, count, seed, answer):
    """Load mutated files one by one, in a process of its own, and say what became of them."""
    outcomes, slowest, peak = Counter(), (0.0, ""), (0, "")
    file = Path(folder) / f"mutated{seed}"
    with connect(url) as client:
        store = DicomStore(client, progress=False)
        store.put("a", dicom())  # starts a worker
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for number, (kind, image) in zip(range(count), mutations(count, seed), strict=False):
            file.write_bytes(image)
            signal.alarm(60)
            started = processor_time()
            row = store.load(file, replace=True).iloc[0]
            slowest = max(slowest, (processor_time() - started, kind))
            outcomes["without its pixels"] += "too much" in row["reason"]
            grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident
            if grown >> 10 > peak[0]:
                peak = grown >> 10, kind
            if row["status"] == "skipped":
                good = bool(row["reason"])
            else:
                good = not row["reason"].startswith("stored, but")
                good = good and store.read(file.name) == image
            if not good or slowest[0] > SECONDS or peak[0] > MEBIBYTES:
                answer.send((f"file {number} ({kind}): {row.to_dict()}, {slowest} s, {peak} MiB",))
                return
            outcomes["stored" if row["status"] != "skipped" else "skipped"] += 1
    answer.send((None, outcomes, slowest, peak))


def mutated_files(count):
    """Files with flipped bits, cut short, of endless lengths, of great depth, bombs."""
    with (
        tempfile.TemporaryDirectory() as folder,
        RedisServer() as server,
    ):
        here, there = workers().Pipe()
        seed = random.randrange(10**6)
        arguments = (server.url, folder, count, seed, there)
        worker = workers().Process(target=store_mutations, args=arguments, daemon=True)
        worker.start()
        there.close()
        try:
            problem, *found = here.recv()
        except EOFError:
            raise AssertionError(f"the loader died (seed {seed})") from None
        finally:
            worker.join()
        assert problem is None, f"seed {seed}: {problem}"
    outcomes, slowest, peak = found
    return (
        f"{outcomes['stored']:,} stored verbatim, of which {outcomes['without its pixels']:,} "
        f"without their pixels, {outcomes['skipped']:,} skipped with a reason; "
        f"at most {slowest[0]:.2f} s of processor time ({slowest[1]}) and {peak[0]} MiB ({peak[1]})"
    )


# --- hostile queries -----------------------------------------------------------------------------

SYNTAX = [
    "194} | @patientSex:{M", "*", "19*", "$p0", "{194}", "@patientID:{194}", "-194", "a,b",
    "%194%", "w'*'", "=>[KNN 1 @v $v]", "$.x", "(194)", "a|b", "~a", "[1 2]", "[-inf +inf]",
    "a:b;c", "=>{$weight:2}", "ismissing(@patientID)", "@*:{x}", "\\", "\\\\", "\\*", "a\\ b", "|",
    "\n", "\t", "\x01", "\x7f", "\x80", "\xa0", "\u2028", "\ufeff", "\ufffd", "\U0001f9e0",
    "日本", "é" * 5000, "Ünïcødé", "e\u0301", "\u202egnp", "İ", "ß", "x" * 10_000, "\\" * 5000,
    "1.2.840.10008.5.1.4.1.1.2", "nan", "inf", "null", "None", "true", "PARAMS", "DIALECT 1",
]  # fmt: skip


def hostile_values(count):
    """Equality conditions on values made of syntax, of every printable character, of Unicode."""
    pairs = [a + b for a in string.printable for b in string.printable if (a + b).strip()]
    numbers = random.Random(count)
    values = list(dict.fromkeys([*SYNTAX, *numbers.sample(pairs, min(len(pairs), count))]))
    while len(values) < count:
        length = numbers.randrange(1, 12)
        text = "".join(chr(numbers.choice([numbers.randrange(1, 0x250), 0x1F600, 0x4E2D, 92, 42]))
                       for _ in range(length))  # fmt: skip
        if text not in values:
            values.append(text)
    with RedisServer() as server, connect(server.url) as client:
        store = store_of(client)
        store.find()
        for number, value in enumerate(values):
            document = json.dumps({"patientID": value, "imageName": f"{number}"})
            client.execute_command("JSON.SET", f"file:{number}", "$", document)
        for number, value in enumerate(values):
            found = list(store.find(patientID=value, columns=())["path"])
            assert found == [f"{number}"], (value[:50], found[:5])
        assert len(store.find(patientID="not there")) == 0
    return f"{len(values):,} values, each found in its own document and in no other"


# --- servers and disks that fail -----------------------------------------------------------------


def failing_servers(rounds):
    """Out of memory, gone, stopped for a while, cut in the middle of a load."""
    old, new = versions_of(7)
    counts = Counter()
    with (
        RedisServer(config=["maxmemory-policy noeviction"]) as server,
        connect(server.url) as client,
    ):
        store = store_of(client)
        store.put("x", old)
        large = dicom(Rows=3, pixels=os.urandom(4_000_000))
        for _ in range(rounds):
            room = client.info("memory")["used_memory"] + random.randrange(3_000_000)
            client.config_set("maxmemory", room)
            try:
                store.put("x", large)
                raise AssertionError("there was room after all")
            except ServerError as error:
                assert "maxmemory" in str(error), str(error)
            client.config_set("maxmemory", 0)
            assert store.read("x") == old
            counts["out of memory"] += 1
        assert assert_whole(client) == 0

        with lease_of(SHORT_LEASE_MS):
            for turn in range(rounds):
                image = (new, old)[turn % 2]
                before = store.read("x")
                with cutting_proxy(server.port, random.randrange(300, 60_000)) as port:
                    url = server.url.replace(f":{server.port}", f":{port}")
                    try:
                        with connect(url) as through:
                            store_of(through).put("x", image)
                    except ServerError as error:
                        assert "\n" not in str(error) and server.password not in str(error)
                        counts["cut"] += 1
                assert store.read("x") in (before, image)
                assert_whole(client)

        process = client.info("server")["process_id"]
        before = store.read("x")
        with redis.Redis.from_url(server.url, socket_timeout=0.2, retry=None) as impatient:
            slow = store_of(impatient)
            slow.read("x")
            os.kill(process, signal.SIGSTOP)
            try:
                for action in (lambda: slow.read("x"), lambda: slow.put("x", large), slow.verify,
                               slow.sweep, slow.find, lambda: slow.delete("x")):  # fmt: skip
                    with contextlib.suppress(ServerError):
                        action()
                        raise AssertionError("a stopped server answered")
                    counts["stopped"] += 1
            finally:
                os.kill(process, signal.SIGCONT)
        # What a stopped server was told it does when it goes on: here, the delete's WATCH at most.
        assert store.read("x") == before
        client.close()
        server.stop()
        for action in (lambda: store.read("x"), lambda: store.put("x", old), store.verify):
            with contextlib.suppress(ServerError):
                action()
                raise AssertionError("a server that is gone answered")
            counts["refused"] += 1
    shown = ", ".join(f"{kind} {number}" for kind, number in counts.items())
    return f"a clear error each time, the file as before or as new, nothing left over ({shown})"


@contextlib.contextmanager
def cutting_proxy(port, allowance):
    """A port that leads to the server's, and cuts after so many bytes, and then at once."""
    left = [allowance]
    with socket.create_server(("127.0.0.1", 0)) as door:

        def carry(source, target):
            with contextlib.suppress(OSError):
                while left[0] > 0 and (data := source.recv(min(4096, left[0]))):
                    left[0] -= len(data)
                    target.sendall(data)
            for end in (source, target):
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

        def serve():
            with contextlib.suppress(OSError):
                while True:
                    near, _ = door.accept()
                    far = socket.create_connection(("127.0.0.1", port))
                    ends.extend([near, far])
                    for pair in ((near, far), (far, near)):
                        carrier = threading.Thread(target=carry, args=pair)
                        carriers.append(carrier)
                        carrier.start()

        ends, carriers = [], []
        server = threading.Thread(target=serve)
        server.start()
        try:
            yield door.getsockname()[1]
        finally:
            door.shutdown(socket.SHUT_RDWR)
            server.join()
            for end in ends:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
            for carrier in carriers:
                carrier.join()
            for end in ends:
                end.close()


def restore_on_full_disk(url, folder, answer):
    with connect(url) as client:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        report = store_of(client).restore(folder, overwrite=True)
        answer.send(report[["path", "status", "reason"]].to_numpy().tolist())


def full_disk(rounds):
    """No room left for a file that is restored: its write fails after 20,000 bytes."""
    small, large = dicom(), dicom(pixels=bytes(50_000))
    with RedisServer() as server, connect(server.url) as client:
        store_of(client).put("large", large)
        store_of(client).put("small", small)
        for _ in range(rounds):
            with tempfile.TemporaryDirectory() as folder:
                (Path(folder) / "large").write_bytes(b"what was there before")
                here, there = workers().Pipe()
                worker = workers().Process(
                    target=restore_on_full_disk, args=(server.url, folder, there), daemon=True
                )
                worker.start()
                there.close()
                rows = here.recv()
                worker.join()
                assert rows[0][:2] == ["large", "skipped"] and "too large" in rows[0][2], rows
                assert rows[1] == ["small", "restored", ""], rows
                assert (Path(folder) / "large").read_bytes() == b"what was there before"
                assert sorted(os.listdir(folder)) == ["large", "small"]
    return "the row says so, the file that was there stays, the others are restored"


# --- the rows ------------------------------------------------------------------------------------

#: Each fault, how often in the test suite, and how often in the long run.
FAULTS = {
    killed_loaders: (12, 500),
    killed_server: (2, 50),
    damage: (60, 2000),
    mended_damage: (4, 200),
    refills: (6, 300),
    racing_loaders: (8, 500),
    eviction: (40, 200),
    mutated_files: (150, 10_000),
    hostile_values: (300, 5000),
    failing_servers: (2, 50),
    full_disk: (1, 10),
}


def main(names):
    """Run the faults of these names, all by default; write the report if it was all."""
    rows, failed = [], False
    for fault, (_, count) in FAULTS.items():
        if names and fault.__name__ not in names:
            continue
        started = time.monotonic()
        try:
            found = fault(count)
        except Exception as error:
            found, failed = f"**failed**: {type(error).__name__}: {error}", True
        seconds = time.monotonic() - started
        rows.append(f"| {fault.__doc__} | {count:,} | {found} | {seconds:.0f} |")
        print(rows[-1], flush=True)
    if not names:
        with RedisServer() as server, connect(server.url) as client:
            redis_version = store_of(client).server()["Redis"]
        REPORT.parent.mkdir(exist_ok=True)
        REPORT.write_text(
            f"# Faults\n\n`make faults` on {datetime.date.today()}: "
            f"{os.cpu_count()} cores, {platform.system()} {platform.machine()}, "
            f"Python {platform.python_version()}, Redis {redis_version}.\n\n"
            "| fault | times | what came of it | s |\n|---|--:|---|--:|\n"
            + "".join(f"{row}\n" for row in rows)
        )
    return int(failed)


if __name__ == "__main__":
    import faults  # under its own name, by which the workers know it

    sys.exit(faults.main(sys.argv[1:]))
