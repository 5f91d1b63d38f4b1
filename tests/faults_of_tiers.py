"""Redis, its connections and its clients that end at any moment, in front of a source."""

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

from blake3 import blake3
from faults_of_chunks import damage_some
from faults_of_servers import cutting_proxy
from faults_shared import (
    SHORT_LEASE_MS,
    assert_whole,
    lease_of,
    store_of,
    versions_of,
    workers,
)

from dicomstore import connect
from dicomstore.errors import MissingChunkError, NotStoredError, ServerError
from dicomstore.server.embedded import RedisServer

IMAGES = {f"{number}.dcm": versions_of(number, 4) for number in range(4)}


def tiers(rounds):
    """`kill -9` of Redis and of tiers, cut connections, while chunks and source files change."""
    said = Counter()
    with contextlib.ExitStack() as stack:
        folder, data = (Path(stack.enter_context(tempfile.TemporaryDirectory())) for _ in range(2))
        stack.enter_context(lease_of(SHORT_LEASE_MS))
        for name in IMAGES:
            change(folder, name)
        for turn in range(rounds):
            ending = ("Redis killed", "tier killed", "connections cut")[turn % 3]
            with RedisServer(folder=data) as server, connect(server.url) as client:
                store_of(client).load(folder, replace=True)
                said += at_work(server, client, folder, ending)
            with RedisServer(folder=data) as server, connect(server.url) as client:
                tier = store_of(client, source=folder)
                for name, images in IMAGES.items():
                    assert tier.read(name) in images, f"{name} after {ending}"
                time.sleep(SHORT_LEASE_MS / 1000)  # the leases of what was killed end
                assert_whole(client)
            said[ending] += 1
    assert all(said[kind] for kind in ("read", "read by parts", "loaded")), said
    shown = ", ".join(f"{kind} {number:,}" for kind, number in sorted(said.items()))
    return f"each read one version whole, and the one that the document names, or refused ({shown})"


def change(folder, name):
    """Give a file of the source other bytes, in one step."""
    (folder / ".new").write_bytes(random.choice(IMAGES[name]))
    (folder / ".new").replace(folder / name)


def at_work(server, client, folder, ending):
    """Let tiers work in a process of their own till `ending`; return what they say of it."""
    with contextlib.ExitStack() as stack:
        url = server.url
        if ending == "connections cut":
            allowance = random.randrange(100_000, 3_000_000)
            port = stack.enter_context(cutting_proxy(server.port, allowance))
            url = url.replace(f":{server.port}", f":{port}")
        here, there = workers().Pipe(duplex=False)
        worker = workers().Process(target=keep_working, args=(url, folder, there), daemon=True)
        worker.start()
        there.close()
        said, listening = Counter(), threading.Thread(target=lambda: said.update(answers_of(here)))
        listening.start()
        until = time.monotonic() + random.uniform(0.5, 1.5)
        while time.monotonic() < until or (ending == "connections cut" and worker.is_alive()):
            lose_some(client, folder)
            time.sleep(0.01)
        if ending == "Redis killed":
            os.kill(client.info("server")["process_id"], signal.SIGKILL)
        elif ending == "tier killed":
            worker.kill()
        worker.join()
        listening.join()
    wrong = [outcome for outcome in said if outcome.startswith("wrong")]
    assert not wrong, wrong[:3]
    return said


def answers_of(pipe):
    """Yield what a process says until it has ended, or is killed."""
    with contextlib.suppress(EOFError):
        while True:
            yield pipe.recv()


def lose_some(client, folder):
    """Damage or delete chunks and a document, and change a file of the source."""
    tier = store_of(client, source=folder)
    for name in random.sample(sorted(IMAGES), 2):
        with contextlib.suppress(MissingChunkError):
            damage_some(client, [tier.manifest(name)])
    if random.random() < 0.3:
        client.delete(f"file:{random.choice(sorted(IMAGES))}")
    if random.random() < 0.3:
        change(folder, random.choice(sorted(IMAGES)))


def keep_working(url, folder, answers):
    """Read through tiers and load, in threads, until Redis is gone; say what came of each."""
    lock = threading.Lock()

    def say(outcome):
        with lock:
            answers.send(outcome)

    def work(job):
        with contextlib.suppress(ServerError), connect(url) as client:
            tier = store_of(client, source=folder)
            while True:
                try:
                    say(job(tier, folder, random.choice(sorted(IMAGES))))
                except MissingChunkError:
                    say("refused")
                except ServerError:
                    raise
                except Exception as error:
                    say(f"wrong: {job.__name__}: {type(error).__name__}: {error}")

    with lease_of(SHORT_LEASE_MS), ThreadPoolExecutor(4) as pool:
        list(pool.map(work, [read, read, read_by_parts, load]))


def read(tier, folder, name):
    content = tier.read(name)
    return "read" if content in IMAGES[name] else f"wrong: {name} is of no version"


def read_by_parts(tier, folder, name):
    """Read through one reader: its bytes are those of the version that it was opened for."""
    manifest = tier.manifest(name)
    try:
        digest = tier.blake3(name)
    except NotStoredError:  # its document is gone, and only reading brings it back
        return "refused"
    with tier.open(name, cache_bytes=1000) as file:
        content = b"".join(iter(lambda: file.read(700), b""))
    if content not in IMAGES[name]:
        return f"wrong: {name} is of no version"
    is_same = tier.manifest(name) == manifest
    if is_same and blake3(content).hexdigest() != digest:
        return f"wrong: {name} is of a different version than its document"
    return "read by parts"


def load(tier, folder, name):
    tier.load(folder / name, replace=True, repair=random.random() < 0.5)
    return "loaded"
