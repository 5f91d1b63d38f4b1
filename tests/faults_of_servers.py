"""Servers and disks that fail."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import signal
import socket
import tempfile
import threading
from collections import Counter
from pathlib import Path

import redis
from faults_shared import (
    SHORT_LEASE_MS,
    assert_whole,
    lease_of,
    store_of,
    versions_of,
    workers,
)
from samples import dicom

from dicomstore import connect
from dicomstore.errors import ServerError
from dicomstore.server.embedded import RedisServer


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
