"""DICOM files in Redis: one JSON document a file, its bytes as string chunks, one search index.

>>> from dicom_helpers import connect, DicomStore
>>> store = DicomStore(connect())
>>> report = store.load("data/dicom")
>>> image = store.read("CT_small.dcm")
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import io
import itertools
import json
import math
import os
import re
import secrets
import sys
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np
import pandas as pd
import pydicom
import redis
from numpy.typing import NDArray
from redis.exceptions import NoPermissionError
from tqdm import tqdm

from dicomstore.blobs.manifest import (
    BATCH_BYTES,
    DEFAULT_CHUNK_SIZE,
    KEYS_PER_COMMAND,
    MANIFEST_MEMBERS,
    STORAGE_MEMBERS,
    Document,
    Manifest,
    parse_document,
    parse_manifest,
    plan_tail,
)
from dicomstore.blobs.reader import CACHE_BYTES, ChunkReader
from dicomstore.blobs.wire import ChunkStream, crc32, run, supports
from dicomstore.catalogue.query import (
    DATE_FIELDS,
    DESCRIPTOR,
    INDEX,
    SCHEMA,
    SEARCH_TIMEOUT_MS,
    TIMED_OUT,
    IndexInfo,
    Query,
    build_query,
    column,
    header_field,
    ordered,
    period_of,
    refuse_partial,
    refuse_unexpanded,
    text_column,
    values_of,
)
from dicomstore.catalogue.query import not_ as not_
from dicomstore.catalogue.query import words as words
from dicomstore.errors import (
    AmbiguousNameError,
    DamagedError,
    DifferentImageError,
    MissingChunkError,
    NotDicomError,
    NoThumbnailError,
    NotIndexedError,
    NotStoredError,
    SearchError,
    SearchTimeoutError,
    ServerError,
)
from dicomstore.imaging import header, thumbnail
from dicomstore.imaging.describing import Description, describe_all
from dicomstore.keys import (
    CHUNK_PREFIX,
    DOCUMENT_PREFIX,
    checked_path,
    document_key,
    path_of,
    shown_path,
)
from dicomstore.loading import CHANGED, Load, Progress, modified, read_whole, sha256_of, walk
from dicomstore.server.connection import (
    COORDINATED_ENGINE,
    OWN_REDIS,
    REDIS_ERRORS,
    SOCKET_TIMEOUT_S,
    Client,
)
from dicomstore.server.connection import (
    _binary_client as binary_client,
)
from dicomstore.server.connection import connect as connect

LEASE_MS = 5000
#: Chunks that expire do so this much later than their document. Longer than a lease, so that a load
#: that stalls before its commit cannot leave a document that outlives its chunks.
CHUNKS_OUTLIVE_MS = 60_000
#: How often a read or a load starts over when the file is replaced under it.
ATTEMPTS = 20
PARTIAL_HEADER = "its header could be read only in part"
UNDECODED = "its pixels take too long, or too much memory: similar does not find it"
LOAD_AGAIN = "Delete the file and load it again."
UNINDEXED = "stored, but no search finds it: a value does not fit the type of an indexed field"
SEARCH_PAGE = 10_000
SIMILAR_COLUMNS = ("imageName", "modality", "bodyPartExamined", "seriesDescription")
SWEEP_PAGE = 10_000
#: So many documents are looked up at a time, to see which files are stored already.
LOOK_UP = 32
#: What has to be known of a stored file before it is loaded again.
CURRENT_MEMBERS = (*STORAGE_MEMBERS, "sopInstanceUID", "rows", "headerPartial", DESCRIPTOR)
NO_COORDINATOR = (
    "The search engine of this Redis Cluster answers for one of its nodes alone: to search, use a "
    "cluster of Redis 8, or Redis Enterprise or Redis Cloud behind their single endpoint."
)
CHUNK_KEY = re.compile(rf"{CHUNK_PREFIX}({DOCUMENT_PREFIX}.+):([0-9a-f]{{12}}):(0|[1-9]\d*)", re.S)


Hit = tuple[str, Mapping[bytes, bytes]]


@contextlib.contextmanager
def _server_errors() -> Iterator[None]:
    """Turn errors of redis-py into a sentence without the command's arguments."""
    try:
        yield
    except REDIS_ERRORS as error:
        raise ServerError(
            f"Redis did not do its part: {_server_words(error)}. Nothing is stored by halves; "
            "try again when the server can be used."
        ) from None


def _engines(client: redis.Redis) -> dict[str, int]:
    """Return the versions of the server's engines by name, 21005 for 2.10.5."""
    modules = client.execute_command("HELLO")[b"modules"]
    return {module[b"name"].decode(): module[b"ver"] for module in modules}


def _server_words(error: BaseException) -> str:
    """Return a server's error text without the command: its arguments may be a patient's data."""
    return str(error).rpartition("of pipeline caused error: ")[2]


# --- the store -----------------------------------------------------------------------------------


class DicomStore:
    """DICOM files in one Redis.

    Parameters
    ----------
    client : redis.Redis
        Stays the caller's to close. A client that decodes responses is copied without that.
    chunk_size : int, optional
        Length of a chunk in bytes, 1 to 16 MiB.
    progress : bool, optional
        Whether long work shows a progress bar.
    descriptors : bool, optional
        Whether loading decodes a frame of every image for :meth:`similar`; without, it is faster.
    ttl : float, optional
        Makes the store a cache: what is loaded expires after so many seconds, the chunks a little
        after their document. Loaded again without `ttl`, a file stays for good.
    renew : bool, optional
        Whether reading a file that has less than half of `ttl` left gives it the whole again.
    source : path, optional
        The folder that the files are loaded from: a file that Redis has evicted, or of which it
        has evicted chunks, is loaded again from there when it is read.

    Attributes
    ----------
    hits, misses : int
        How many reads found the whole file in Redis, and how many had to load it from `source`.

    Raises
    ------
    ServerError
        If the client selects a database other than 0.
    """

    def __init__(
        self,
        client: Client,
        *,
        chunk_size: int = DEFAULT_CHUNK_SIZE,
        progress: bool = True,
        descriptors: bool = True,
        ttl: float | None = None,
        renew: bool = False,
        source: str | os.PathLike[str] | None = None,
    ) -> None:
        if not 1 <= chunk_size <= BATCH_BYTES:
            raise ValueError(f"chunk_size is {chunk_size}; it can be 1 to {BATCH_BYTES} bytes.")
        if ttl is not None and not 0.001 <= ttl < math.inf:
            raise ValueError(f"ttl is {ttl}; give seconds, or None for files that stay.")
        if renew and ttl is None:
            raise ValueError("renew=True needs a ttl: files without one do not expire.")
        self.chunk_size = chunk_size
        self.progress = progress
        self.descriptors = descriptors
        self.ttl = ttl
        self.renew = renew
        self.source = None if source is None else Path(source).resolve()
        self.hits = self.misses = 0
        self._client = binary_client(client)
        self._leases = _Leases(self._client)
        self._index_known = False
        self._index = IndexInfo({}, frozenset())

    def __repr__(self) -> str:
        return f"DicomStore(chunk_size={self.chunk_size}, ttl={self.ttl}, source={self.source})"

    # --- one server or a cluster ---

    def _node(self, key: str) -> redis.Redis:
        """Return a client of the server that holds `key`, for transactions."""
        # Not redis-py's cluster transactions: after a lost connection they send EXEC again without
        # WATCH.
        if isinstance(self._client, redis.RedisCluster):
            return self._client.get_redis_connection(self._client.get_node_from_key(key))
        return self._client

    @property
    def _searched(self) -> redis.Redis:
        """The server that searches: of a cluster one node, which asks the others."""
        if isinstance(self._client, redis.RedisCluster):
            return self._client.get_redis_connection(self._client.get_default_node())
        return self._client

    @functools.cached_property
    def _searchable(self) -> bool:
        """Whether searches are answered for all documents."""
        return (
            not isinstance(self._client, redis.RedisCluster)
            or _engines(self._searched).get("search", 0) >= COORDINATED_ENGINE
        )

    def _with_keys(self, command: str, keys: Sequence[str]) -> list[Any]:
        """Send a command that takes many keys; return its replies, from one round trip."""
        if isinstance(self._client, redis.Redis) and 0 < len(keys) <= KEYS_PER_COMMAND:
            return [self._client.execute_command(command, *keys)]
        with self._client.pipeline(transaction=False) as pipe:
            self._queue(pipe, command, keys)
            return pipe.execute()

    def _queue(self, pipe: Any, command: str, keys: Sequence[str]) -> None:
        """Put a command that takes many keys into a pipeline.

        In a cluster the keys lie on all nodes: one key a command, all nodes at the same time.
        """
        step = 1 if isinstance(self._client, redis.RedisCluster) else KEYS_PER_COMMAND
        for first in range(0, len(keys), step):
            pipe.execute_command(command, *keys[first : first + step])

    @property
    def client(self) -> Client:
        """The client that the store uses."""
        return self._client

    @_server_errors()
    def server(self) -> pd.Series[str]:
        """Return which server answers: its version, those of its engines, and whose it is."""
        engines = _engines(self._searched)

        def version(name: str) -> str:
            number = engines.get(name, 0)
            return f"{number // 10000}.{number // 100 % 100}.{number % 100}" if number else "none"

        return pd.Series(
            {
                "Redis": self._searched.execute_command("HELLO")[b"version"].decode(),
                "search engine": version("search"),
                "JSON engine": version("ReJSON"),
                "whose": "yours (REDIS_URL)" if os.environ.get("REDIS_URL") else "embedded",
            }
        )

    # --- writing ---

    @_server_errors()
    def load(
        self, source: str | os.PathLike[str], *, under: str = "", replace: bool = False
    ) -> pd.DataFrame:
        """Load a DICOM file, or every DICOM file below a folder.

        Linked files are loaded, linked folders are listed and not entered. A file that is stored
        already is sent again only if it differs or has lost a chunk, so that an interrupted load
        goes on where it stopped. While bytes are sent, other processes read headers and decode
        pixels, on all cores.

        Parameters
        ----------
        source : path
            A file, or a folder; a file's path in the store is relative to that folder.
        under : str, optional
            A folder in the store to put the files under, say ``"cd2"``.
        replace : bool, optional
            Whether another image (another SOP Instance UID) may take the place of a stored one.

        Returns
        -------
        pandas.DataFrame
            One row for every file: ``path``, ``key``, ``size`` (bytes), ``chunks``, ``status``
            (loaded, replaced, unchanged or skipped) and ``reason``.

        Raises
        ------
        FileNotFoundError
            If `source` does not exist.
        ServerError
            If the server cannot take the files; those loaded so far stay.
        WorkerError
            If no process can be started to decode pixels in.
        """
        source = Path(source)
        if not source.exists():
            raise FileNotFoundError(f"There is no file or folder {source}.")
        prefix = f"{checked_path(under.strip('/'))}/" if under else ""
        if self._searchable:
            self._ensure_index()
        found = [(source.name, source, "")] if source.is_file() else walk(source)
        loads = [Load(prefix + path, file, problem) for path, file, problem in found]
        self._load(loads, replace=replace, shown=self.progress)
        rows = [load.row for load in loads]
        unindexed = self._unindexed([row["key"] for row in rows if row["key"]])
        for row in rows:
            if row["key"] in unindexed:
                row["reason"] = UNINDEXED
        return pd.DataFrame(rows, columns=["path", "key", "size", "chunks", "status", "reason"])

    @_server_errors()
    def put(
        self,
        path: str,
        image: bytes | bytearray | memoryview | pydicom.Dataset,
        *,
        replace: bool = False,
    ) -> str:
        """Store one image from memory.

        Parameters
        ----------
        path : str
            Its path in the store.
        image : bytes-like or pydicom.Dataset
            A DICOM file's bytes, stored verbatim, or a data set, written as a DICOM file (PS3.10).
        replace : bool, optional
            Whether it may take the place of another image (another SOP Instance UID).

        Returns
        -------
        str
            The key of its document.

        Raises
        ------
        NotDicomError
            If the bytes are not DICOM or the data set cannot be written.
        DifferentImageError
            If the path holds another image and `replace` is not set.
        SearchError
            If the image is stored, but the index does not take its document.
        """
        checked_path(path)
        if isinstance(image, pydicom.Dataset):
            buffer = io.BytesIO()
            try:
                pydicom.dcmwrite(buffer, image, enforce_file_format=True)
            except (AttributeError, LookupError, TypeError, ValueError) as error:
                raise NotDicomError(
                    f"The data set for {path} cannot be written as a DICOM file "
                    f"({type(error).__name__}): it needs a SOPClassUID, a SOPInstanceUID and a "
                    "TransferSyntaxUID."
                ) from None
            image = buffer.getvalue()
        if self._searchable:
            self._ensure_index()
        load = Load(path, bytes(image), strict=True)
        self._load([load], replace=replace)
        if self._unindexed([load.key]):
            raise SearchError(f"{load.key} is {UNINDEXED}.")
        return load.key

    def _load(self, loads: Sequence[Load], *, replace: bool, shown: bool = False) -> None:
        """Store files, each said in its row."""
        progress = Progress(loads, shown=shown)
        described = describe_all(self._changed(loads, progress), len(loads), self.descriptors)
        with contextlib.closing(progress), contextlib.closing(described):
            for (load, current), description in described:
                with load.reporting():
                    if isinstance(description, OSError):
                        raise description
                    if load.row["status"] != "unchanged":
                        self._store(load, current, description, progress, replace=replace)
                    elif current is not None and description.thumbnail:
                        self._add_descriptor(load.key, current, description.thumbnail)
                progress.finished(load)

    def _changed(
        self, loads: Sequence[Load], progress: Progress
    ) -> Iterator[tuple[tuple[Load, _Current | None], Path | bytes]]:
        """Yield the files that are not stored as they are, with what is stored instead."""
        for first in range(0, len(loads), LOOK_UP):
            group = loads[first : first + LOOK_UP]
            with self._client.pipeline(transaction=False) as pipe:
                for load in group:
                    pipe.execute_command(*_get_members(load.key, CURRENT_MEMBERS))
                replies = pipe.execute(raise_on_error=False)
            for load, reply in zip(group, replies, strict=True):
                current, done = None, True
                with load.reporting():
                    if not load.row["reason"]:
                        members = _parse_members(load.key, CURRENT_MEMBERS, reply)
                        current = _Current.of(load.key, members)
                        done = self._is_done(load, current)
                if done:
                    progress.finished(load)
                else:
                    yield (load, current), load.content

    def _is_done(self, load: Load, current: _Current | None) -> bool:
        """Whether all of a file is stored; if only its descriptor is not, its row says so too."""
        document = current and current.document
        if current is None or document is None or not 0 < load.size() == document.manifest.size:
            return False
        with load.opened() as file:
            if not self._holds(current, load.row["size"], sha256_of(file)):
                return False
        reason = PARTIAL_HEADER if "headerPartial" in current.members else ""
        chunks = document.manifest.count
        load.row |= {"key": load.key, "chunks": chunks, "status": "unchanged", "reason": reason}
        has_pixels, described = "rows" in current.members, DESCRIPTOR in current.members
        return described or not has_pixels or not self.descriptors

    def _add_descriptor(self, key: str, current: _Current, seen: list[int]) -> None:
        """Give a document what it was stored without, unless it is replaced meanwhile."""
        with self._node(key).pipeline() as pipe, contextlib.suppress(redis.WatchError):
            pipe.watch(key)
            now = self._members(key, ("version",), pipe)
            if now is not None and now.get("version") == current.members["version"]:
                pipe.multi()
                pipe.execute_command("JSON.SET", key, f"$.{DESCRIPTOR}", json.dumps(seen))
                pipe.execute()

    def _store(
        self,
        load: Load,
        current: _Current | None,
        description: Description,
        progress: Progress,
        *,
        replace: bool,
    ) -> None:
        """Store one file."""
        members, key = description.members, load.key
        load.row["size"] = load.size()
        if load.row["size"] == 0:
            raise NotDicomError("an empty file")
        if members is None:
            raise NotDicomError("neither DICOM (no DICM, no SOP Class UID) nor a slide")
        if current is not None:
            _refuse_another_image(key, current, members, replace)
        if description.thumbnail:
            members[DESCRIPTOR] = description.thumbnail
        reasons = [PARTIAL_HEADER] if "headerPartial" in members else []
        reasons += [UNDECODED] if description.given_up and self.descriptors else []
        with load.opened() as file:
            if load.modified != description.modified:
                raise OSError(errno.EIO, CHANGED)
            self._send_and_commit(load, file, current, members, progress, replace)
        load.row["reason"] = "; ".join(reasons)

    def _send_and_commit(
        self,
        load: Load,
        file: BinaryIO,
        current: _Current | None,
        members: Mapping[str, Any],
        progress: Progress,
        replace: bool,
    ) -> None:
        """Store the bytes of `file` and their document."""
        key, size = load.key, load.row["size"]
        tail = plan_tail(size, self.chunk_size)
        for _ in range(ATTEMPTS):
            manifest = Manifest(key, secrets.token_hex(6), size, self.chunk_size, tail)
            try:
                with self._leases.held(manifest.lease):
                    sha256, crc = self._send(manifest, file, progress.sent)
                    if self.ttl is not None:
                        self._expire(manifest)
                    if modified(file) not in (None, load.modified):
                        raise OSError(errno.EIO, CHANGED)
                    document = {
                        "imageName": shown_path(load.path.rpartition("/")[2]),
                        "size": size,
                        "sha256": sha256,
                        "version": manifest.version,
                        "chunkSize": manifest.chunk_size,
                        "tail": tail,
                        "crc": crc,
                        "chunks": [manifest.chunk_key(n) for n in range(manifest.count)],
                        **members,
                    }
                    status = self._commit(manifest, document, replace)
            except BaseException as error:
                # What cannot be taken back now, `sweep` finds once the lease has run out.
                with contextlib.suppress(*REDIS_ERRORS):
                    self._abandon(manifest)
                if isinstance(error, REDIS_ERRORS):
                    raise ServerError(
                        f"{key} could not be stored: {_server_words(error)}"
                    ) from None
                raise
            if status is None and self._abandon(manifest):
                status = "loaded" if current is None else "replaced"
            if status is not None:
                load.row |= {"key": key, "chunks": manifest.count, "status": status}
                return
        raise ServerError(
            f"{key} could not be stored: its lease of {LEASE_MS} ms ran out {ATTEMPTS} times. The "
            "connection to Redis is too slow or stalls."
        )

    def _current(self, key: str, client: redis.Redis | None = None) -> _Current | None:
        """Return what is stored at `key` now, or None."""
        return _Current.of(key, self._members(key, CURRENT_MEMBERS, client))

    def _members(
        self, key: str, names: Sequence[str], client: redis.Redis | None = None
    ) -> dict[str, Any] | None:
        try:
            reply = (client or self._node(key)).execute_command(*_get_members(key, names))
        except redis.ResponseError as error:
            reply = error
        return _parse_members(key, names, reply)

    def _holds(self, current: _Current, size: int, sha256: str) -> bool:
        """Whether `current` is this very content, cut alike, with every chunk there.

        If so, it is made to last as long as what this store loads.
        """
        document = current.document
        if document is None or document.sha256 != sha256 or document.manifest.size != size:
            return False
        if document.manifest.chunk_size != self.chunk_size:
            return False
        manifest = document.manifest
        there = sum(self._with_keys("EXISTS", manifest.chunk_keys()))
        return bool(there == manifest.count) and self._prolong(document)

    def _send(
        self, manifest: Manifest, file: BinaryIO, sent: Callable[[int], None]
    ) -> tuple[str, list[int]]:
        """Send the chunks; return SHA-256 and the chunks' CRC-32 of the very bytes sent."""
        sha256 = hashlib.sha256()
        crc: list[int] = []
        file.seek(0)

        def read(views: list[memoryview]) -> int:
            for view in views:
                read_whole(file, view)
                sha256.update(view)
                crc.append(crc32(view))
            count = sum(map(len, views))
            sent(count)
            return count

        if self._is_streamed(manifest):
            chunks = manifest.chunks()
            self._stream(lambda stream: stream.send(chunks, read))
        else:
            with self._client.pipeline(transaction=False) as pipe:
                for batch in manifest.batches():
                    for number in batch:
                        chunk = memoryview(bytearray(manifest.length(number)))
                        read([chunk])
                        pipe.set(manifest.chunk_key(number), chunk)
                    pipe.execute()
        if file.read(1):
            raise OSError(errno.EIO, CHANGED)
        return sha256.hexdigest(), crc

    def _commit(self, manifest: Manifest, members: Mapping[str, Any], replace: bool) -> str | None:
        """Let the document name the chunks sent; return the status, or None if the lease lapsed."""
        text = json.dumps(members, ensure_ascii=False, allow_nan=False)
        with self._node(manifest.key).pipeline() as pipe:
            while True:
                pipe.watch(manifest.key, manifest.lease)
                if not pipe.exists(manifest.lease):
                    return None
                current = self._current(manifest.key, pipe)
                if current is not None:
                    if self._holds(current, manifest.size, members["sha256"]):
                        # Another loader was first, with the same bytes.
                        pipe.reset()
                        self._unlink(manifest)
                        return "unchanged"
                    _refuse_another_image(manifest.key, current, members, replace)
                pipe.multi()
                pipe.execute_command("JSON.SET", manifest.key, "$", text)
                # JSON.SET keeps the time to live that the key has.
                if self.ttl is None:
                    pipe.persist(manifest.key)
                else:
                    pipe.pexpire(manifest.key, round(self.ttl * 1000))
                pipe.delete(manifest.lease)
                try:
                    pipe.execute()
                except redis.WatchError:
                    continue
                break
        if current is None:
            return "loaded"
        if current.document is not None:
            self._unlink(current.document.manifest)
        return "replaced"

    def _abandon(self, manifest: Manifest) -> bool:
        """Take back what was sent, unless it turns out to be committed; return whether it is."""
        # Without the lease no commit still under way can succeed: it watches that key.
        self._client.unlink(manifest.lease)
        with contextlib.suppress(DamagedError):  # a foreign key that has taken the place
            members = self._members(manifest.key, ("version",))
            if members is not None and members.get("version") == manifest.version:
                return True
        self._unlink(manifest)
        return False

    def _unlink(self, manifest: Manifest) -> None:
        self._with_keys("UNLINK", [*manifest.chunk_keys(), manifest.lease])

    def _expire(self, manifest: Manifest, *, longer: bool = False) -> None:
        """Give the chunks the time to live of this store's files and a little more, or for ever.

        With `longer`, none gets less time than it has.
        """
        with self._client.pipeline(transaction=False) as pipe:
            for key in manifest.chunk_keys():
                if self.ttl is None:
                    pipe.persist(key)
                else:
                    pipe.pexpire(key, round(self.ttl * 1000) + CHUNKS_OUTLIVE_MS, gt=longer)
            pipe.execute()

    def _prolong(self, document: Document, *, below: float = math.inf) -> bool:
        """Let a version live as long as this store's files do, if it has less than `below` seconds.

        Never less long than it would; its chunks first, so that at no moment the document outlives
        them. Return whether it is still the stored version.
        """
        key, version = document.key, document.manifest.version
        node = self._node(key)
        left = node.pttl(key)
        if left == -1 or left >= below * 1000:  # -1: it does not expire, nor do its chunks
            return True
        self._expire(document.manifest, longer=True)
        with node.pipeline() as pipe:
            while True:
                pipe.watch(key)
                members = self._members(key, ("version",), pipe)
                if members is None or members.get("version") != version:
                    return False
                pipe.multi()
                if self.ttl is None:
                    pipe.persist(key)
                else:
                    pipe.pexpire(key, round(self.ttl * 1000), gt=True)
                try:
                    pipe.execute()
                except redis.WatchError:
                    continue
                return True

    @_server_errors()
    def delete(self, name: str) -> None:
        """Delete a stored file: its document first, so that no reader meets half of it.

        Parameters
        ----------
        name : str
            Key, path or unambiguous imageName.

        Raises
        ------
        NotStoredError, AmbiguousNameError
            If the name is not that of one stored file.
        """
        key, _ = self._lookup(name, ("version",))
        with self._node(key).pipeline() as pipe:
            while True:
                pipe.watch(key)
                current = self._current(key, pipe)
                pipe.multi()
                pipe.delete(key)
                try:
                    pipe.execute()
                except redis.WatchError:
                    continue
                break
        if current is not None and current.document is not None:
            self._unlink(current.document.manifest)

    @_server_errors()
    def sweep(self) -> pd.DataFrame:
        """Remove the chunks that no document names: what loaders leave behind when they are killed.

        Safe while others load and read. Where a lease says that a load may be under way, the sweep
        waits for as long as a lease lasts (5 s) and removes what is not renewed.

        Returns
        -------
        pandas.DataFrame
            One row for every version removed: ``path``, ``version``, ``chunks`` and ``size``, the
            bytes that they held.
        """
        chunks = self._client.scan_iter(
            f"{CHUNK_PREFIX}{DOCUMENT_PREFIX}*", count=10_000, _type="string"
        )
        rows, leased = [], []
        while page := [os.fsdecode(key) for key in itertools.islice(chunks, SWEEP_PAGE)]:
            unnamed, in_use = self._unnamed(page)
            rows += self._remove(unnamed)
            leased += in_use
        if leased:
            time.sleep(LEASE_MS / 1000)
            rows += self._remove(self._unnamed(leased)[0])
        report = pd.DataFrame(rows, columns=["path", "version", "chunks", "size"])
        return report.groupby(["path", "version"], as_index=False).sum()

    def _unnamed(self, keys: Iterable[str]) -> tuple[list[str], list[str]]:
        """Return those of the chunks that no document names, and those whose version has a lease.

        The lease is looked for before the document: a load that has neither will never commit.
        """
        versions: dict[Manifest, list[str]] = {}
        for key in keys:
            match = CHUNK_KEY.fullmatch(key)
            if match and document_key(path_of(match[1])) == match[1]:
                versions.setdefault(Manifest(match[1], match[2], 0, 1, ()), []).append(key)
        with self._client.pipeline(transaction=False) as pipe:
            for manifest in versions:
                pipe.exists(manifest.lease)
            leased = dict(zip(versions, pipe.execute(), strict=True))
            for manifest in versions:
                pipe.execute_command("JSON.GET", manifest.key, "$.version", "$.chunks[0]")
            documents = pipe.execute(raise_on_error=False)
        unnamed = []
        for (manifest, chunks), document in zip(versions.items(), documents, strict=True):
            if isinstance(document, Exception) and "wrong" not in str(document).lower():
                raise document
            # Of a damaged document one of the two is enough: the chunks may be all that is left.
            found = json.loads(document) if isinstance(document, bytes) else {}
            named = itertools.chain.from_iterable(found.values())
            if not leased[manifest] and not {manifest.version, manifest.chunk_key(0)} & {
                *map(str, named)
            }:
                unnamed += chunks
        return unnamed, [
            key for manifest in versions if leased[manifest] for key in versions[manifest]
        ]

    def _remove(self, chunks: Sequence[str]) -> list[tuple[str, str, int, int]]:
        """Unlink `chunks`; return path, version, number and bytes of what was there."""
        with self._client.pipeline(transaction=False) as pipe:
            for key in chunks:
                pipe.strlen(key)
                pipe.unlink(key)
            replies = pipe.execute()
        rows = []
        for key, size, was_there in zip(chunks, replies[::2], replies[1::2], strict=True):
            document, version, _ = key.removeprefix(CHUNK_PREFIX).rsplit(":", 2)
            rows.append((shown_path(path_of(document)), version, was_there, size * was_there))
        return rows

    # --- reading ---

    @_server_errors()
    def read(self, name: str, *, into: Any = None) -> Any:
        """Return the bytes of a stored file, each chunk checked by its length and CRC-32.

        Parameters
        ----------
        name : str
            Key, path or unambiguous imageName; a path wins over an imageName. By key or path it
            takes two round trips for a file of up to 16 MiB, by imageName one more.
        into : writable buffer, optional
            Filled in place, for large files; at least as long as the file.

        Returns
        -------
        bytes, or memoryview
            The file, or the part of `into` that it fills.

        Raises
        ------
        NotStoredError, AmbiguousNameError
            If the name is not that of one stored file.
        MissingChunkError, DamagedError
            If the file cannot be given back as it was stored; the chunk is named.
        """

        def whole(document: Document) -> Any:
            size = document.manifest.size
            if into is None and not self._is_streamed(document.manifest):
                return b"".join(chunk for batch in self._batches(document) for chunk in batch)
            view = memoryview(bytearray(size) if into is None else into).cast("B")
            if len(view) < size:
                raise ValueError(f"The buffer has {len(view)} bytes, {document.key} {size}.")
            view = view[:size]
            if self._is_streamed(document.manifest):
                chunks = document.manifest.chunks()
                self._stream(lambda stream: stream.fetch(chunks, view, crcs=document.crc))
            else:
                position = 0
                for batch in self._batches(document):
                    for chunk in batch:
                        view[position : position + len(chunk)] = chunk
                        position += len(chunk)
            return bytes(view) if into is None else view

        return self._consistently(name, whole, refill=True)

    @_server_errors()
    def open(self, name: str, *, cache_bytes: int = CACHE_BYTES) -> ChunkReader:
        """Open a stored file for reading; only the chunks that are touched are fetched.

        Parameters
        ----------
        name : str
            As for :meth:`read`.
        cache_bytes : int, optional
            How much of the file is kept at a time, in bytes.

        Returns
        -------
        ChunkReader
            A binary file of the version that is stored now, for pydicom, tifffile and others.
        """
        key, members = self._lookup(name, MANIFEST_MEMBERS)
        manifest = parse_manifest(key, members)
        reader = ChunkReader(
            manifest,
            lambda numbers: self._some_chunks(manifest, numbers),
            name=path_of(key),
            cache_bytes=cache_bytes,
        )
        # The document's; an imageName was looked for as a path and by a search before.
        reader.round_trips = 1 if name in (key, path_of(key)) else 3
        return reader

    @_server_errors()
    def header(self, name: str) -> pydicom.Dataset:
        """Return the data set of a stored DICOM file up to its pixels, from its first chunks.

        Raises
        ------
        NotDicomError
            If the stored file is a slide.
        """
        with self.open(name) as file:
            start = header.dataset_start(cast(BinaryIO, file))
            if start is None:
                raise NotDicomError(f"{file.name} is not a DICOM file and has no header.")
            source: Any = file
            if start == 1:  # after a stray byte; pydicom would begin before it
                file.seek(start)
                source = io.BytesIO(file.read())
            source.seek(0)
            return pydicom.dcmread(source, stop_before_pixels=True, force=True)

    @_server_errors()
    def manifest(self, name: str) -> Manifest:
        """Return how a stored file is cut into chunks; `name` as for :meth:`read`."""
        return parse_manifest(*self._lookup(name, MANIFEST_MEMBERS))

    @_server_errors()
    def sha256(self, name: str) -> str:
        """Return the SHA-256 that was stored with a file; `name` as for :meth:`read`."""
        return str(self._lookup(name, ("sha256",))[1].get("sha256"))

    @_server_errors()
    def restore(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> pd.DataFrame:
        """Write every stored file below `folder`, after checking it against its SHA-256.

        A file appears whole or not at all. Nothing is written outside `folder`, and no link below
        it is followed.

        Parameters
        ----------
        folder : path
            Made if missing.
        overwrite : bool, optional
            Whether a file that exists may be replaced.

        Returns
        -------
        pandas.DataFrame
            One row for every document: ``path``, ``key``, ``size`` (bytes), ``status`` (restored,
            skipped or damaged) and ``reason``.
        """
        root = Path(folder)
        root.mkdir(parents=True, exist_ok=True)
        root = root.resolve()

        def write(document: Document) -> str:
            target = _target(root, document.key)
            if not overwrite and os.path.lexists(target):
                raise FileExistsError(errno.EEXIST, "exists; overwrite=True replaces it")
            target.parent.mkdir(parents=True, exist_ok=True)
            scratch = target.with_name(f".restore-{secrets.token_hex(6)}")
            try:
                with scratch.open("xb") as file:
                    self._copy(document, file.write)
                scratch.replace(target)
            finally:
                scratch.unlink(missing_ok=True)
            return "restored"

        return self._each("Restoring", write)

    @_server_errors()
    def verify(self) -> pd.DataFrame:
        """Check every stored file: its chunks' lengths and CRC-32, and its SHA-256.

        Returns
        -------
        pandas.DataFrame
            One row for every document: ``path``, ``key``, ``size`` (bytes), ``status`` (ok or
            damaged) and ``reason``, which names every chunk that is gone or damaged.
        """

        def check(document: Document) -> str:
            try:
                self._copy(document, len)
            except (MissingChunkError, DamagedError) as error:
                if faults := self._faults(document):
                    raise type(error)(f"{', '.join(faults)}. {LOAD_AGAIN}") from None
                raise
            return "ok"

        return self._each("Verifying", check)

    def _faults(self, document: Document) -> list[str]:
        """Return what is wrong with each chunk that is not as it was stored."""
        manifest, faults = document.manifest, []
        for batch in manifest.batches():
            for number, chunk in zip(batch, self._fetch(manifest, batch), strict=True):
                try:
                    _check_chunks(manifest, [number], [chunk], [document.crc[number]])
                except (MissingChunkError, DamagedError):
                    what = "gone" if chunk is None else "damaged"
                    faults.append(f"the chunk {manifest.chunk_key(number)} is {what}")
        return faults

    def _each(self, label: str, action: Callable[[Document], str]) -> pd.DataFrame:
        """Return a row for every document: what `action` says of it, or why it could not."""
        rows = []
        for key in self._bar(self._keys(), label, "file"):
            row: dict[str, Any] = {
                "path": shown_path(path_of(key)),
                "key": shown_path(key),
                "size": 0,
            }

            def act(document: Document, row: dict[str, Any] = row) -> str:
                row["size"] = document.manifest.size
                return action(document)

            try:
                row |= {"status": self._consistently(key, act), "reason": ""}
            except (MissingChunkError, DamagedError) as error:
                row |= {"status": "damaged", "reason": str(error)}
            except NotStoredError:
                continue  # deleted meanwhile
            except OSError as error:
                row |= {"status": "skipped", "reason": error.strerror or str(error)}
            rows.append(row)
        return pd.DataFrame(rows, columns=["path", "key", "size", "status", "reason"])

    def _keys(self) -> list[str]:
        """Return the keys of all documents, sorted; also of those that no search finds."""
        found = self._client.scan_iter(f"{DOCUMENT_PREFIX}*", count=10_000, _type="ReJSON-RL")
        return sorted({os.fsdecode(key) for key in found})

    def _lookup(
        self, name: str, members: Sequence[str], *, refill: bool = False
    ) -> tuple[str, dict[str, Any]]:
        """Return key and members of the document that `name` means."""
        keys = [document_key(name)]
        if name.startswith(DOCUMENT_PREFIX):
            keys.insert(0, name)
        for key in keys:
            found = self._members(key, members)
            if found is not None:
                return key, found
        if refill and self.source is not None:
            # Before the look-up by imageName: that would give another image of the same name.
            for key in keys:
                if self._refill(key):
                    continue
                found = self._members(key, members)
                if found is None:
                    raise MissingChunkError(f"{key} is evicted again as soon as it is loaded.")
                return key, found
        if not self._searchable:
            raise NotStoredError(
                f"No file {shown_path(name)!r} is stored under this key or path, and by imageName "
                f"none can be found here. {NO_COORDINATOR}"
            )
        images = self.find(imageName=shown_path(name), columns=())
        if len(images) > 1:
            paths = ", ".join(images["path"][:3])
            raise AmbiguousNameError(
                f"{len(images)} stored files are named {shown_path(name)}; say which by its path: "
                f"{paths}"
                f"{', ...' if len(images) > 3 else '.'}"
            )
        found = self._members(images["key"].iloc[0], members) if len(images) else None
        if found is None:
            raise NotStoredError(f"No file {shown_path(name)!r} is stored: no key, path or name.")
        return images["key"].iloc[0], found

    def _consistently(
        self, name: str, action: Callable[[Document], Any], *, refill: bool = False
    ) -> Any:
        """Return what `action` makes of one version of the file; start over if it is replaced.

        With `refill`, as for reading, what Redis has evicted is loaded from the source.
        """
        misses = self.misses
        for _ in range(ATTEMPTS):
            key, members = self._lookup(name, STORAGE_MEMBERS, refill=refill)
            document = parse_document(key, members)
            try:
                result = action(document)
            except MissingChunkError as error:
                now = self._members(key, ("version",))
                if now is not None and now.get("version") == document.manifest.version:
                    if not refill or self.source is None:
                        raise
                    if problem := self._refill(key):
                        raise MissingChunkError(
                            f"{error} The source cannot help: {problem}"
                        ) from None
                continue
            if refill:
                self.hits += misses == self.misses
                if self.renew and self.ttl is not None:
                    self._prolong(document, below=self.ttl / 2)
            return result
        raise MissingChunkError(
            f"{shown_path(name)} is replaced or evicted faster than it can be read."
        )

    def _refill(self, key: str) -> str:
        """Load the file of `key` from the source again; return why it cannot be, if so."""
        assert self.source is not None
        try:
            file = _target(self.source, key)
            if not file.resolve().is_relative_to(self.source) or not file.is_file():
                return "no such file below it"
            self.misses += 1
            self._load([Load(path_of(key), file, strict=True)], replace=False)
        except ServerError:
            raise
        except (OSError, NotDicomError, DamagedError, DifferentImageError) as error:
            return getattr(error, "strerror", None) or str(error)
        return ""

    def _fetch(self, manifest: Manifest, batch: range) -> list[Any]:
        """Return the chunks of these numbers, None for those that are gone."""
        keys = manifest.chunk_keys(batch)
        return [chunk for reply in self._with_keys("MGET", keys) for chunk in reply]

    def _batches(self, document: Document) -> Iterator[list[bytes]]:
        """Yield the chunks in order, a batch at a time, each of its length and CRC-32."""
        manifest = document.manifest
        for batch in manifest.batches():
            chunks = self._fetch(manifest, batch)
            _check_chunks(manifest, batch, chunks, [document.crc[number] for number in batch])
            yield chunks

    @_server_errors()
    def _some_chunks(self, manifest: Manifest, numbers: Sequence[int]) -> list[bytes]:
        """Return some chunks of one version, checked, in one round trip."""
        runs = [f"$.crc[{first}:{last + 1}]" for first, last in _runs(numbers)]
        with self._client.pipeline(transaction=False) as pipe:
            # In this order: a document that is still the same had all its chunks just before.
            self._queue(pipe, "MGET", manifest.chunk_keys(numbers))
            pipe.execute_command("JSON.GET", manifest.key, "$.version", *runs)
            try:
                *groups, reply = pipe.execute()
            except redis.ResponseError as error:
                raise DamagedError(
                    f"{manifest.key} cannot be read: {_server_words(error)}. Load the file again."
                ) from None
        found = json.loads(reply or "{}")
        if found.get("$.version") != [manifest.version]:
            raise MissingChunkError(
                f"{manifest.key} was replaced or deleted since it was opened. Open it again."
            )
        crcs = [crc for run_of in runs for crc in found[run_of]]
        if len(crcs) != len(numbers):
            raise DamagedError(f"The document {manifest.key} is damaged: CRCs are missing.")
        chunks = [chunk for group in groups for chunk in group]
        _check_chunks(manifest, numbers, chunks, crcs)
        return chunks

    def _copy(self, document: Document, write: Callable[[Any], object]) -> None:
        """Pass all bytes on in order, checked; raise in the end if the SHA-256 is another."""
        sha256 = hashlib.sha256()

        def pass_on(piece: Any) -> None:
            sha256.update(piece)
            write(piece)

        if self._is_streamed(document.manifest):
            chunks = document.manifest.chunks()
            self._stream(lambda stream: stream.copy(chunks, pass_on, crcs=document.crc))
        else:
            for batch in self._batches(document):
                for chunk in batch:
                    pass_on(chunk)
        if sha256.hexdigest() != document.sha256:
            raise DamagedError(
                f"{document.key} is damaged: its bytes do not have the SHA-256 that was stored. "
                f"{LOAD_AGAIN}"
            )

    def _is_streamed(self, manifest: Manifest) -> bool:
        """Whether connections of its own pay for a file, and can be made."""
        return manifest.size > BATCH_BYTES and supports(self._client)

    def _stream(self, work: Callable[[ChunkStream], Awaitable[None]]) -> None:
        async def whole() -> None:
            async with ChunkStream(self._client, timeout=SOCKET_TIMEOUT_S) as stream:
                await work(stream)

        run(whole())

    # --- searching ---

    @_server_errors()
    def find(
        self,
        query: str = "",
        *,
        columns: Sequence[str] | None = None,
        order_by: str | None = None,
        limit: int | None = None,
        **conditions: Any,
    ) -> pd.DataFrame:
        """Find stored files by their indexed fields, in one round trip.

        Parameters
        ----------
        query : str, optional
            A query in RediSearch's own language (dialect 2), beside the conditions.
        columns : sequence of str, optional
            The indexed fields to show; all that any of the files has by default.
        order_by : str, optional
            The field to sort by, descending with a minus before it; files without it come last,
            equal ones in order of their path.
        limit : int, optional
            Only so many files, the first ones in that order.
        **conditions
            ``field=value``, of which all have to be met; the field by its name, as `modality`, or
            its DICOM keyword, as `Modality` (`Columns`, since `columns` is taken). A value is

            - a text or a number that the field equals, or one of the field's several values;
            - a date: ``20190131``, ``"2019-01-31"``, `datetime.date`; or all of a month or a year:
              ``"2019-01"``, ``"2019"``;
            - a tuple ``(low, high)``: a range, both ends included, None for an open side;
            - a list: one of several of these;
            - None if the field is absent, ``...`` if it is present;
            - ``words("contrast brain*")``: all these words, stemmed, or the beginnings of them;
            - ``not_(value)``: none of what `value` matches, files without the field among them.

        Returns
        -------
        pandas.DataFrame
            One row for every file, in order of its path: ``path``, ``key`` and the columns.

        Raises
        ------
        NotIndexedError
            If a field is not indexed.
        ValueError
            If a value does not fit its field.
        SearchError, SearchTimeoutError
            If there is no complete answer.
        """
        if limit is not None and (not isinstance(limit, int) or limit < 1):
            raise ValueError(f"limit is {limit!r}; give a number of files, at least 1.")
        search = self._query(query, conditions)
        shown = self._index.names if columns is None else list(columns)
        fields = {name: self._field(name) for name in shown}
        order = None if order_by is None else self._field(order_by.removeprefix("-"))
        descending = order_by is not None and order_by.startswith("-")
        loaded = [*dict.fromkeys([*fields.values(), *([order] if order else [])])]
        if limit is None:
            found = self._hits(search, loaded)
        else:
            by = [f"@{order}", "DESC" if descending else "ASC"] if order else []
            by += ["@__key", "ASC"]
            first = ["LOAD", "1", "@__key", "SORTBY", str(len(by)), *by, "MAX", str(limit)]
            load = ["LOAD", str(len(loaded)), *(f"@{name}" for name in loaded)] if loaded else []
            groups = self._groups(search, *first, *load)
            found = [(os.fsdecode(group[b"__key"]), group) for group in groups]
        found.sort(key=lambda hit: hit[0])
        if order:
            found = ordered(found, order, self._index.fields[order], descending=descending)
        return self._frame(found, fields, keep_empty=columns is not None or not found)

    def _hits(self, search: Query, loaded: Sequence[str]) -> list[Hit]:
        """Return key and loaded fields of every match."""
        reply = self._search(
            "FT.SEARCH", search, "RETURN", str(len(loaded)), *loaded, "LIMIT", "0", str(SEARCH_PAGE)
        )
        results = reply[b"results"]
        if reply[b"total_results"] <= len(results):
            return [(os.fsdecode(hit[b"id"]), hit.get(b"extra_attributes", {})) for hit in results]
        load = ["LOAD", str(len(loaded) + 1), "@__key", *(f"@{name}" for name in loaded)]
        return [(os.fsdecode(hit[b"__key"]), hit) for hit in self._groups(search, *load)]

    def _frame(
        self, found: Sequence[Hit], fields: Mapping[str, str], *, keep_empty: bool
    ) -> pd.DataFrame:
        """Return a row for every hit, with a column for each of `fields`: shown name, own name."""
        columns = {
            "path": text_column([shown_path(path_of(key)) for key, _ in found]),
            "key": text_column([key for key, _ in found]),
        }
        for name, field in fields.items():
            replies = [values.get(field.encode()) for _, values in found]
            if keep_empty or any(reply is not None for reply in replies):
                columns[name] = column(field, self._index.fields[field], replies)
        return pd.DataFrame(columns, copy=False)

    @_server_errors()
    def count_by(
        self,
        name: str,
        across: str | None = None,
        *,
        query: str = "",
        missing: bool = False,
        by: str | None = None,
        **conditions: Any,
    ) -> Any:
        """Count the files by the values of one indexed field, or of two.

        A file whose attribute has several values counts once for each of them.

        Parameters
        ----------
        name, across : str
            The field; and a second one for a cross table.
        missing : bool, optional
            Whether files without the field are counted, as pandas' missing value.
        by : {"year", "month"}, optional
            What to count dates by.
        query, **conditions
            As for :meth:`find`.

        Returns
        -------
        pandas.Series or pandas.DataFrame
            Counts by value, largest first, with `by` in order of time. For two fields a table with
            a row for each value of `name` and a column for each of `across`, both sorted.

        Raises
        ------
        NotIndexedError, ValueError, SearchError, SearchTimeoutError
            As for :meth:`find`.
        """
        search = self._query(query, conditions)
        names = [name] if across is None else [name, across]
        fields = [self._field(each) for each in names]
        if by is not None and (by not in ("year", "month") or DATE_FIELDS.isdisjoint(fields)):
            raise ValueError(f"by={by!r}: count {', '.join(DATE_FIELDS)} by 'year' or 'month'.")
        if not missing:
            present = " ".join(f"-(ismissing(@{field}))" for field in fields)
            search = search._replace(text=f"{search.text} {present}".removeprefix("* "))
        group = ["GROUPBY", str(len(fields)), *(f"@{field}" for field in fields)]
        counts: Counter[tuple[Any, ...]] = Counter()
        for row in self._groups(search, *group, "REDUCE", "COUNT", "0", "AS", "__count"):
            values = [self._values(field, row[field.encode()], by) for field in fields]
            for combination in itertools.product(*values):
                counts[combination] += int(row[b"__count"])
        if across is not None:
            table = pd.Series(counts, dtype="int64")
            table.index = pd.MultiIndex.from_tuples(counts, names=names)
            return table.unstack(fill_value=0).sort_index().sort_index(axis="columns")
        ranked = sorted(
            counts.items(),
            key=lambda item: (item[0][0] is None, 0 if by else -item[1], item[0][0]),
        )
        values = [value for (value,), _ in ranked]
        if any(isinstance(value, str) for value in values):
            texts = text_column([np.nan if value is None else value for value in values])
            index = pd.Index(texts, name=name, copy=False)
        else:
            integers = all(isinstance(value, int) or value is None for value in values)
            nullable = "Int64" if integers and None in values else None
            index = pd.Index(values, name=name, dtype=nullable)
        totals = np.array([total for _, total in ranked], dtype=np.int64)
        return pd.Series(totals, index=index, name="count", copy=False)

    def _values(self, field: str, reply: bytes | None, by: str | None) -> set[Any]:
        if reply is None:
            return {None}
        values = values_of(field, self._index.fields[field], reply)
        return {period_of(value, by) if by and field in DATE_FIELDS else value for value in values}

    @_server_errors()
    def similar(
        self,
        image: str | NDArray[Any],
        k: int = 5,
        *,
        columns: Sequence[str] = SIMILAR_COLUMNS,
        query: str = "",
        **conditions: Any,
    ) -> pd.DataFrame:
        """Find the stored images that look most like one, by their thumbnails, in one search.

        Parameters
        ----------
        image : str or numpy.ndarray
            A stored file, as for :meth:`read`; or a picture of shape (rows, columns) or (rows,
            columns, 3).
        k : int, optional
            How many images; `image` itself is none of them.
        columns, query, **conditions
            As for :meth:`find`.

        Returns
        -------
        pandas.DataFrame
            At most `k` rows, nearest first: ``path``, ``key``, ``distance`` (the root mean square
            difference of the thumbnails in grey levels, 0 to 255) and the columns.

        Raises
        ------
        NoThumbnailError
            If the stored file has no pixels or none that could be decoded.
        NotStoredError, AmbiguousNameError
            If the name is not that of one stored file.
        ValueError
            If the array is no picture.
        NotIndexedError, SearchError, SearchTimeoutError
            As for :meth:`find`.
        """
        if not isinstance(k, int) or k < 1:
            raise ValueError(f"k is {k!r}; give a number of images, at least 1.")
        own_key = ""
        if isinstance(image, str):
            own_key, members = self._lookup(image, (DESCRIPTOR,))
            if DESCRIPTOR not in members:
                raise NoThumbnailError(
                    f"{shown_path(own_key)} cannot be compared: it has no pixels, or was loaded "
                    "with descriptors=False (load it again without), or could not be decoded."
                )
            wanted = members[DESCRIPTOR]
        else:
            wanted = thumbnail.of_array(image)
        search = self._query(query, conditions)
        fields = {name: self._field(name) for name in columns}
        vector: list[str | bytes] = [
            "vector",
            np.array(wanted, dtype="<f4").tobytes(),
            "k",
            str(k + 1),
        ]
        given = [*search.parameters[2:], *vector]
        search = search._replace(
            text=f"({search.text})=>[KNN $k @{DESCRIPTOR} $vector AS __distance]",
            parameters=["PARAMS", str(len(given)), *given],
        )
        reply = self._search(
            "FT.SEARCH", search, "SORTBY", "__distance", "LIMIT", "0", str(k + 1),
            "RETURN", str(len(fields) + 1), "__distance", *fields.values(),
        )  # fmt: skip
        found = [(os.fsdecode(hit[b"id"]), hit[b"extra_attributes"]) for hit in reply[b"results"]]
        found = [hit for hit in found if hit[0] != own_key][:k]
        frame = self._frame(found, fields, keep_empty=True)
        distances = [thumbnail.distance(float(values[b"__distance"])) for _, values in found]
        frame.insert(2, "distance", np.array(distances, dtype=np.float64))
        return frame

    def _query(self, query: str, conditions: Mapping[str, Any]) -> Query:
        self._ensure_index()
        for name in conditions:
            self._field(name)
        return build_query(query, conditions, self._index, self._other_forms)

    def _other_forms(self, field: str, word: str) -> list[str]:
        """Return the terms that the engine searches for beside `word`: those of its stem."""
        plan = self._searched.execute_command(
            "FT.EXPLAIN", INDEX, f"@{field}:($word)", "PARAMS", "2", "word", word, "DIALECT", "2"
        )
        return re.findall(r"^ +@\w+:(.+)\(expanded\)$", plan.decode(), flags=re.MULTILINE)

    def _field(self, name: str) -> str:
        """Return the indexed field that `name` means; another process may just have added it."""
        try:
            return self._index.field(name)
        except NotIndexedError:
            self._index = IndexInfo.of(self._searched.execute_command("FT.INFO", INDEX))
            return self._index.field(name)

    def _groups(self, search: Query, *stages: str) -> list[dict[bytes, bytes]]:
        """Return all rows of an aggregation. A cursor, since servers may cap an answer without."""
        cursor_options = ["WITHCURSOR", "COUNT", str(SEARCH_PAGE)]
        reply, cursor = self._search("FT.AGGREGATE", search, *stages, *cursor_options)
        rows = [result[b"extra_attributes"] for result in reply[b"results"]]
        while cursor:
            reply, cursor = self._searched.execute_command("FT.CURSOR", "READ", INDEX, cursor)
            refuse_partial(reply)
            rows += [result[b"extra_attributes"] for result in reply[b"results"]]
        return rows

    def _search(self, command: str, search: Query, *stages: str) -> Any:
        """Send a search and, in the same round trip, ask whether the index can answer it."""
        self._ensure_index()
        with self._searched.pipeline(transaction=False) as pipe:
            pipe.execute_command("FT.INFO", INDEX)
            pipe.execute_command(
                command, INDEX, search.text, *stages, *search.parameters,
                "TIMEOUT", str(SEARCH_TIMEOUT_MS), "DIALECT", "2",
            )  # fmt: skip
            if search.expands_words:
                pipe.execute_command("FT.CONFIG", "GET", "MAXEXPANSIONS")
            info, reply, *config = pipe.execute(raise_on_error=False)
        if isinstance(info, Exception):
            self._index_known = False
            raise SearchError(f"The index {INDEX} cannot be used: {info}. Search again to make it.")
        if int(info[b"indexing"]):
            raise SearchError(
                f"The index {INDEX} is still being built ({float(info[b'percent_indexed']):.0%}); "
                "try again in a moment."
            )
        if isinstance(reply, Exception):
            if "timeout" in str(reply).lower():
                raise SearchTimeoutError(TIMED_OUT)
            raise SearchError(f"The search engine refused the query: {reply}")
        refuse_partial(reply[0] if isinstance(reply, list) else reply)
        if config:
            refuse_unexpanded(search, info, config[0])
        return reply

    # --- the index ---

    @_server_errors()
    def index_also(self, *keywords: str) -> pd.Series[int]:
        """Add DICOM attributes to the index, over all that is stored, and wait until it is done.

        They are searched for by their keywords, as ``find(KVP=(100, 120))``. Nothing is read
        again: the documents have them in ``header``, except sequences and bulk data. Numbers are
        compared as numbers; all else, dates among it, is exact text.

        Parameters
        ----------
        *keywords : str
            From the DICOM dictionary (PS3.6), as ``"KVP"``.

        Returns
        -------
        pandas.Series
            How many stored files have each.

        Raises
        ------
        ValueError
            If a keyword is unknown, a sequence or bulk data; nothing is added then.
        ServerError
            If this Redis user may not alter the index.
        """
        own = {indexed.keyword for indexed in header.FIELDS.values()}
        self._ensure_index()
        self._add_fields({each: header_field(each) for each in keywords if each not in own})
        self._wait_for_index()  # another process may have added them just now
        counts = []
        for keyword in keywords:
            search = self._query("", {keyword: ...})
            groups = self._groups(search, "GROUPBY", "0", "REDUCE", "COUNT", "0", "AS", "n")
            counts.append(sum(int(group[b"n"]) for group in groups))
        return pd.Series(counts, index=list(keywords), name="files", dtype="int64")

    def _ensure_index(self) -> None:
        """Make the index unless it is there, and add to one of an older version what it lacks."""
        if self._index_known:
            return
        if not self._searchable:
            raise SearchError(NO_COORDINATOR)
        try:
            self._index = IndexInfo.of(self._searched.execute_command("FT.INFO", INDEX))
        except NoPermissionError as error:
            raise ServerError(
                f"This Redis user may not use the index {INDEX}: see the two ACL rules in README."
            ) from error
        except redis.ResponseError as error:
            if "unknown command" in str(error).lower():
                raise ServerError(f"This Redis has no search engine. {OWN_REDIS}") from error
            self._create_index()
        # A user who may search but not alter does without the newer fields.
        with contextlib.suppress(ServerError):
            self._add_fields(SCHEMA)
        self._index_known = True

    def _create_index(self) -> None:
        schema = [word for field in SCHEMA.values() for word in field]
        try:
            # Without stop words: "with contrast" is no "without contrast".
            self._searched.execute_command(
                "FT.CREATE", INDEX, "ON", "JSON", "PREFIX", "1", DOCUMENT_PREFIX,
                "STOPWORDS", "0", "SCHEMA", *schema,
            )  # fmt: skip
        except NoPermissionError as error:
            raise ServerError(
                f"The index {INDEX} is missing and this Redis user may not make it: let the owner "
                "load or search once (README, the two ACL rules)."
            ) from error
        except redis.ResponseError as error:
            if "json" in str(error).lower():
                raise ServerError(f"This Redis has no JSON engine. {OWN_REDIS}") from error
            if "already exists" not in str(error):  # another process was first
                raise
        self._wait_for_index()

    def _add_fields(self, schema: Mapping[str, Sequence[str]]) -> None:
        """Add to the index those fields of `schema` that it lacks, and wait for them."""
        while missing := sorted(name for name in schema if name not in self._index.fields):
            added = [word for name in missing for word in schema[name]]
            try:
                self._searched.execute_command("FT.ALTER", INDEX, "SCHEMA", "ADD", *added)
            except NoPermissionError as error:
                raise ServerError(
                    f"This Redis user may not add {', '.join(missing)} to the index: let the owner "
                    "do it (README, the two ACL rules)."
                ) from error
            except redis.ResponseError as error:
                if "duplicate" not in str(error).lower():  # another process was first
                    raise
            self._wait_for_index()

    def _wait_for_index(self) -> None:
        """Wait until the index covers what was stored before it was made or altered."""
        while int((info := self._searched.execute_command("FT.INFO", INDEX))[b"indexing"]):
            time.sleep(0.05)
        self._index = IndexInfo.of(info)

    @_server_errors()
    def drop_index(self) -> None:
        """Drop the index; the documents stay, and the next search makes it again."""
        with contextlib.suppress(redis.ResponseError):
            self._searched.execute_command("FT.DROPINDEX", INDEX)
        self._index_known = False

    def _unindexed(self, keys: Sequence[str]) -> set[str]:
        """Return those of the documents at `keys` that no search finds."""
        if not self._searchable:
            return set()
        self._wait_for_index()
        missing = set(keys)
        for first in range(0, len(keys), KEYS_PER_COMMAND):
            group = keys[first : first + KEYS_PER_COMMAND]
            only = ["INKEYS", str(len(group)), *group]
            reply = self._search(
                "FT.SEARCH", Query(), *only, "NOCONTENT", "LIMIT", "0", str(len(group))
            )
            missing -= {os.fsdecode(hit[b"id"]) for hit in reply[b"results"]}
        # Not those that were deleted, or have expired or been evicted since.
        return {key for key in missing if self._client.exists(key)}

    def _bar(self, items: Sequence[Any], label: str, unit: str) -> Iterable[Any]:
        return tqdm(items, desc=label, unit=unit, disable=not self.progress, file=sys.stdout)


def _check_chunks(
    manifest: Manifest,
    numbers: Sequence[int],
    chunks: Sequence[bytes | None],
    crcs: Sequence[int],
) -> None:
    """Raise if a chunk is gone, or is not of its length and CRC-32."""
    missing = [n for n, chunk in zip(numbers, chunks, strict=True) if chunk is None]
    if missing:
        raise MissingChunkError.of([manifest.chunk_key(n) for n in missing])
    for number, chunk, crc in zip(numbers, chunks, crcs, strict=True):
        if chunk is None or len(chunk) != manifest.length(number) or crc32(chunk) != crc:
            raise DamagedError.of(manifest.chunk_key(number))


def _runs(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield the first and the last of each run of consecutive numbers."""
    first = last = numbers[0]
    for number in numbers[1:]:
        if number != last + 1:
            yield first, last
            first = number
        last = number
    yield first, last


class _Current(NamedTuple):
    """What is stored at a key at one moment: a sound document or None, and some of its members."""

    document: Document | None
    members: Mapping[str, Any]

    @classmethod
    def of(cls, key: str, members: Mapping[str, Any] | None) -> _Current | None:
        if members is None:
            return None
        with contextlib.suppress(DamagedError):
            return cls(parse_document(key, members), members)
        return cls(None, members)


class _Leases:
    """Say of versions that they are being loaded, for as long as that takes.

    A lease runs out ``LEASE_MS`` after its holder is gone; a load that finds it gone starts again.
    """

    def __init__(self, client: Client) -> None:
        self._client = client
        self._held: set[str] = set()
        self._lock = threading.Lock()
        self._renewer: threading.Thread | None = None

    @contextlib.contextmanager
    def held(self, key: str) -> Iterator[None]:
        """Hold the lease `key` during a ``with`` block; what it stands for decides what follows."""
        self._client.set(key, b"", px=LEASE_MS)
        with self._lock:
            self._held.add(key)
            if self._renewer is None or not self._renewer.is_alive():  # as after a fork
                self._renewer = threading.Thread(target=self._renew, name="leases", daemon=True)
                self._renewer.start()
        try:
            yield
        finally:
            with self._lock:
                self._held.remove(key)

    def _renew(self) -> None:
        """Renew what is held, until for a whole period nothing is."""
        while True:
            time.sleep(LEASE_MS / 3000)
            with self._lock:
                held = list(self._held)
                if not held:
                    self._renewer = None
                    return
            for key in held:
                # If it cannot be renewed, the commit notices. XX: never make it anew.
                with contextlib.suppress(*REDIS_ERRORS):
                    self._client.set(key, b"", px=LEASE_MS, xx=True)


def _get_members(key: str, names: Sequence[str]) -> list[Any]:
    return ["JSON.GET", os.fsencode(key), *(f"$.{name}" for name in names)]


def _parse_members(key: str, names: Sequence[str], reply: Any) -> dict[str, Any] | None:
    """Return the members in the reply to `_get_members`, or None if there is no document."""
    if isinstance(reply, redis.ResponseError):
        if "unknown command" in str(reply).lower():
            raise ServerError(f"This Redis has no JSON engine. {OWN_REDIS}") from reply
        if "wrong" not in str(reply).lower():
            raise reply
        raise DamagedError(f"The key {key} holds something else than a document.") from reply
    if isinstance(reply, Exception):
        raise reply
    if reply is None:
        return None
    found = json.loads(reply)
    if len(names) == 1:  # of a single path, Redis gives the values alone
        found = {f"$.{names[0]}": found}
    return {name: values[0] for name in names if (values := found[f"$.{name}"])}


def _refuse_another_image(
    key: str, current: _Current, members: Mapping[str, Any], replace: bool
) -> None:
    stored, new = current.members.get("sopInstanceUID"), members.get("sopInstanceUID")
    if not replace and stored and new and stored != new:
        raise DifferentImageError(
            f"{key} holds another image (another SOP Instance UID): load with under='a folder' to "
            "keep both, or with replace=True"
        )


# --- files ---------------------------------------------------------------------------------------


def _target(root: Path, key: str) -> Path:
    """Return where the file of `key` is restored below `root`; refuse what leads elsewhere."""
    path = path_of(key)
    pure = PurePosixPath(path)
    sound = (
        document_key(path) == key
        and "\0" not in path
        and path == str(pure)
        and not pure.is_absolute()
        and ".." not in pure.parts
        and pure.parts
    )
    if not sound:
        raise PermissionError(
            errno.EPERM, f"{shown_path(path)!r} is no path below the folder; refused"
        )
    target = root.joinpath(*pure.parts)
    if any((root / parent).is_symlink() for parent in pure.parents):
        raise PermissionError(errno.EPERM, f"{shown_path(path)!r} leads through a link; refused")
    return target
