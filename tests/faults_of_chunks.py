"""Chunks and documents that are damaged, noticed and mended."""

from __future__ import annotations

import contextlib
import functools
import json
import random
import tempfile
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from faults_shared import (
    assert_whole,
    store_of,
)
from samples import dicom

from dicomstore import connect
from dicomstore.errors import DamagedError, MissingChunkError
from dicomstore.server.embedded import RedisServer

# --- damage ---------------------------------------------------------------------------------------

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


# --- damage that is mended ------------------------------------------------------------------------

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
            if random.random() < 0.25 and (chunk := client.get(key)):
                damaged = random.choice(list(CHUNK_DAMAGE.values()))(chunk)
                client.unlink(key) if damaged is None else client.set(key, damaged)
                count += 1
    return count


def write_images(folder, count):
    """Write files of different images; return the bytes of each by its name."""
    images = {f"{n}": dicom(Rows=n + 1, pixels=random.randbytes(20_000)) for n in range(count)}
    for path, image in images.items():
        (folder / path).write_bytes(image)
    return images


def mended_damage(rounds):
    """Chunks damaged and deleted, mended by `load(repair=True)` while others read."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        server = stack.enter_context(RedisServer())
        clients = [stack.enter_context(connect(server.url)) for _ in range(3)]
        pool = stack.enter_context(ThreadPoolExecutor(2))
        images = write_images(folder, 6)
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
        images = write_images(folder, 3)
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
