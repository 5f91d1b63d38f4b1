"""Loaders and servers that are killed, loaders that race, memory that runs out."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from faults_shared import (
    CHUNK_SIZES,
    SHORT_LEASE_MS,
    assert_whole,
    lease_of,
    store_of,
    unreferenced,
    versions_of,
    workers,
)
from samples import dicom
from tqdm import tqdm

from dicomstore import connect
from dicomstore.errors import DicomRedisError
from dicomstore.server.embedded import RedisServer

# --- killed loaders -------------------------------------------------------------------------------


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


# --- a killed server ------------------------------------------------------------------------------


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


# --- races ----------------------------------------------------------------------------------------


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


# --- eviction -------------------------------------------------------------------------------------


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
