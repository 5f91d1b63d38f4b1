"""Writers and readers at work on a cluster, whatever befalls it."""

import random
import threading
import time

from samples import dicom

from dicomstore import DicomStore
from dicomstore.errors import MissingChunkError, NotStoredError
from dicomstore.server.connection import Server, connect


class Threads:
    """Threads that are at work for the length of a ``with`` block, until `_over` is set."""

    def __init__(self, jobs):
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._do, args=job) for job in jobs]

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self._over.set()
        for thread in self._threads:
            thread.join()


class Work(Threads):
    """Writers and a reader at work through servers of their own until told to stop."""

    def __init__(self, url, keys, *, patience=30.0):
        self.written = {key: 0 for key in keys}
        self.acknowledged = {key: [] for key in keys}
        self.failures, self.reads = [], 0
        jobs = [(self._write, keys[turn::2]) for turn in range(2)] + [(self._read, keys)]
        super().__init__([(url, patience, *job) for job in jobs])

    def _do(self, url, patience, job, keys):
        try:
            with connect(url) as client:
                server = Server(client, patience=patience)
                while not self._over.is_set():
                    job(server, keys)
        except Exception as error:
            self.failures.append(error)

    def _write(self, server, keys):
        """Count each key up by a transaction, with a pair of strings that must always agree."""
        for key in keys:
            number = self.written[key] + 1
            server.commands([("SET", f"{{{key}}}:{n}:{number}", str(number)) for n in range(3)])
            server.transaction(
                [key], lambda pipe, key=key, number=number: self._to(pipe, key, number)
            )
            self.written[key] = number
            self.acknowledged[key].append((time.monotonic(), number))

    @staticmethod
    def _to(pipe, key, number):
        """Set the number, unless a lost connection hid that it is set: a body has to look."""
        if int(pipe.get(key) or 0) != number:
            pipe.multi()
            pipe.set(key, number)

    def _read(self, server, keys):
        """What a key counts to has its three strings, whatever is moving."""
        key = random.choice(keys)
        number = int(server.command("GET", key) or 0)
        if number:
            parts = server.commands([("GET", f"{{{key}}}:{n}:{number}") for n in range(3)])
            assert parts == [str(number).encode()] * 3
        self.reads += 1


class StoreWork(Threads):
    """Stores of their own that put, replace and read files until told to stop.

    `replaced` counts only one of the two that replace; `refused` counts the reads of lost files.
    """

    def __init__(self, url, *, shared=("a", "b")):
        self.url, self.shared = url, shared
        self.loaded, self.failures, self.reads = [], [], 0
        self.replaced = self.refused = 0
        super().__init__([(self._replace, 0), (self._replace, 1), (self._add, 2), (self._read, 3)])

    def __enter__(self):
        with connect(self.url) as client, self.store(client) as store:
            for name in self.shared:
                store.put(name, self.image(name, 0))
        return super().__enter__()

    @staticmethod
    def store(client):
        return DicomStore(client, chunk_size=1000, progress=False)

    @staticmethod
    def image(name, number):
        return dicom(SOPInstanceUID=f"1.2.{ord(name[0])}", Rows=number + 1, pixels=bytes(9000))

    def _do(self, job, turn):
        try:
            with connect(self.url) as client, self.store(client) as store:
                number = 0
                while not self._over.is_set():
                    number += 1
                    job(store, turn, number)
        except Exception as error:
            self.failures.append(error)

    def _replace(self, store, turn, number):
        name = self.shared[(turn + number) % len(self.shared)]
        store.put(name, self.image(name, number % 2), replace=True)
        self.replaced += turn == 0

    def _add(self, store, turn, number):
        store.put(f"own/{number}", self.image("own", number))
        self.loaded.append((time.monotonic(), number))

    def _read(self, store, turn, number):
        try:
            name = self.shared[number % len(self.shared)]
            assert store.read(name) in [self.image(name, version) for version in (0, 1)]
            if self.loaded:
                _, loaded = self.loaded[-1]
                with store.open(f"own/{loaded}") as file:
                    assert file.read() == self.image("own", loaded)
        except (MissingChunkError, NotStoredError):  # lost with a primary, or else a fault
            self.refused += 1
        self.reads += 1
