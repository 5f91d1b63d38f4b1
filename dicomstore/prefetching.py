"""Fetches what is cold from the source in the background, before somebody reads it."""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from dicomstore.blobs.chunks import Chunks
from dicomstore.blobs.manifest import STORAGE_MEMBERS, Document, Manifest, parse_document
from dicomstore.blobs.versions import Versions
from dicomstore.catalogue.index import Catalogue
from dicomstore.errors import DamagedError, DicomRedisError, MissingChunkError
from dicomstore.keys import shown_path
from dicomstore.naming import Naming
from dicomstore.tier import Tier

#: So much is fetched at a time (bytes): a read never waits for more than that.
PIECE_BYTES = 4 * 1024 * 1024
#: How often it looks whether reads are over (s).
PATIENCE_S = 0.005


class Prefetch:
    """Files that are being fetched in the background.

    Attributes
    ----------
    files : int
        How many were asked for.
    fetched : int
        Bytes that came from the source so far.
    failures : dict of str to str
        By key, why a file could not be fetched.
    """

    def __init__(self, keys: Sequence[str]) -> None:
        self.files = len(keys)
        self.fetched = 0
        self.failures: dict[str, str] = {}
        self._done = threading.Event()

    def __repr__(self) -> str:
        state = "done" if self.is_done else "at work"
        return f"Prefetch(files={self.files}, fetched={self.fetched}, {state})"

    @property
    def is_done(self) -> bool:
        """Whether all files are in Redis, or could not be fetched."""
        return self._done.is_set()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it is done, or for `timeout` seconds; return whether it is done."""
        return self._done.wait(timeout)

    def end(self) -> None:
        """Let those who wait go on."""
        self._done.set()


class Prefetcher:
    """One thread that fetches files; it waits while somebody reads from the source.

    Parameters
    ----------
    chunks : Chunks
    versions : Versions
    tier : Tier
    bytes_per_s : float
        It fetches no more than that.
    """

    def __init__(self, chunks: Chunks, versions: Versions, tier: Tier, bytes_per_s: float) -> None:
        self._chunks = chunks
        self._versions = versions
        self._tier = tier
        self._bytes_per_s = bytes_per_s
        self._forget()

    def __getstate__(self) -> dict[str, object]:
        mine = ("_chunks", "_versions", "_tier", "_bytes_per_s")
        return {name: self.__dict__[name] for name in mine}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._forget()

    def _forget(self) -> None:
        self._waiting: queue.SimpleQueue[tuple[Prefetch, Callable[[], Sequence[str]]] | None]
        self._waiting = queue.SimpleQueue()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._process = os.getpid()

    def start(self, prefetch: Prefetch, keys: Callable[[], Sequence[str]]) -> None:
        """Fetch files in the background; `keys` is called there."""
        if self._process != os.getpid():  # a fork has no such thread
            self._forget()
        self._waiting.put((prefetch, keys))
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="prefetch", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Stop; what has not been fetched yet stays cold."""
        if self._thread is None or self._process != os.getpid():
            return
        self._stopping.set()
        self._waiting.put(None)
        self._thread.join()
        self._forget()

    def _work(self) -> None:
        while (work := self._waiting.get()) is not None:
            prefetch, keys = work
            try:
                wanted = keys()
                prefetch.files = len(wanted)
                for key in wanted:
                    if self._stopping.is_set():
                        break
                    self._fetch(key, prefetch)
            except DicomRedisError as error:  # a search, or the server
                prefetch.failures[""] = str(error)
            finally:
                prefetch.end()

    def _fetch(self, key: str, prefetch: Prefetch) -> None:
        try:
            document = self._document(key)
            if document is None:
                self._take(partial(self._load, key), prefetch)
            else:
                self._heat(document, prefetch)
        except (MissingChunkError, DamagedError) as error:
            prefetch.failures[key] = str(error)

    def _document(self, key: str) -> Document | None:
        members = self._versions.members(key, STORAGE_MEMBERS)
        return None if members is None else parse_document(key, members)

    def _load(self, key: str) -> int:
        """Load a file whose document is gone; return its size in bytes."""
        document = self._document(key) if self._tier.load_evicted(key) else None
        if document is None:
            raise MissingChunkError(f"{shown_path(key)} is gone, and the source cannot help.")
        return document.manifest.size

    def _heat(self, document: Document, prefetch: Prefetch) -> None:
        """Fetch the chunks of a file that are not in Redis."""
        manifest = document.manifest
        gone = self._chunks.gone(manifest)
        step = max(1, PIECE_BYTES // manifest.chunk_size)
        for first in range(0, len(gone), step):
            crcs = {number: document.crc[number] for number in gone[first : first + step]}
            self._take(partial(self._mend, manifest, crcs), prefetch)

    def _mend(self, manifest: Manifest, crcs: Mapping[int, int]) -> int:
        return sum(map(len, self._tier.mend(manifest, crcs).values()))

    def _take(self, fetch: Callable[[], int], prefetch: Prefetch) -> None:
        """Call `fetch`, which returns a number of bytes, when no read waits; keep the bandwidth."""
        while self._tier.is_fetching and not self._stopping.wait(PATIENCE_S):
            pass
        if self._stopping.is_set():
            return
        started = time.monotonic()
        size = fetch()
        prefetch.fetched += size
        self._stopping.wait(max(0.0, size / self._bytes_per_s - (time.monotonic() - started)))


class Around:
    """Has the rest of a series or study fetched when one of its instances was not in Redis.

    Parameters
    ----------
    naming : Naming
    catalogue : Catalogue
    prefetcher : Prefetcher
    what : {"series", "study"}
    """

    def __init__(
        self, naming: Naming, catalogue: Catalogue, prefetcher: Prefetcher, what: str
    ) -> None:
        self._naming = naming
        self._catalogue = catalogue
        self._prefetcher = prefetcher
        self._field = f"{what}InstanceUID"
        self._latest = ""

    def missed(self, key: str) -> None:
        """Note that the file at `key` was not in Redis."""
        _, members = self._naming.members(key, (self._field,))
        uid = members.get(self._field)
        if uid and uid != self._latest:  # its other instances are on their way already
            self._latest = uid
            conditions = {self._field: uid}
            self._prefetcher.start(Prefetch([]), lambda: self._catalogue.keys_of(**conditions))
