"""Stored instances read without waiting: asyncio, as few round trips as there can be."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import io
import json
import zlib
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import redis
import redis.asyncio
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian

from dicomstore.blobs.chunks import check
from dicomstore.blobs.manifest import MANIFEST_MEMBERS, Manifest, parse_manifest
from dicomstore.blobs.wire import crc32
from dicomstore.errors import (
    DamagedError,
    FrameError,
    MissingChunkError,
    NotStoredError,
    ServerError,
)
from dicomstore.imaging.frames import OPTIONS, Frames
from dicomstore.imaging.locating import Span, locate
from dicomstore.keys import path_of, shown_path
from dicomstore.store import DicomStore
from dicomstore.web import inflating

#: What decoding a frame needs to know, and finding it in a data set that is inflated first.
ATTRIBUTES = (*OPTIONS, "NumberOfFrames")

#: What has to be known of an instance before anything of it can be served.
MEMBERS = (
    *MANIFEST_MEMBERS,
    "frames",
    "transferSyntaxUID",
    "attachments.frames",
    "sopInstanceUID",
    *(f"header.{keyword}" for keyword in ATTRIBUTES),
)
#: So many connections to Redis; who wants one more waits.
CONNECTIONS = 32
#: So many instances are remembered, with where their frames lie.
REMEMBERED = 4096
#: How often a read starts over when its instance is replaced under it.
ATTEMPTS = 20
#: So many reads wait at a time for what only the store itself can do.
THREADS = 4
#: Of a file that is streamed, so much is held at a time (bytes).
PIECE_BYTES = 1024 * 1024
#: A data set's JSON is not larger than this (bytes).
JSON_BYTES = 16 * 1024 * 1024

Command = tuple[Any, ...]
Result = TypeVar("Result")


class Stored(NamedTuple):
    """One version of an instance: where its bytes and its frames lie."""

    manifest: Manifest
    frames: Frames
    uid: str | None
    is_inflated: bool = False

    @property
    def syntax(self) -> str | None:
        return self.frames.syntax


class Attached(NamedTuple):
    """A version of an instance, and the CRC-32 of its DICOM JSON; None if it has none."""

    version: str
    json_crc: int | None


class Fetching:
    """Reads instances by the keys of their documents.

    Parameters
    ----------
    store : DicomStore
        A new asyncio client is made like its own. What Redis has lost is read through the store,
        which fetches it from the source, if there is one.

    Raises
    ------
    ServerError
        If the store is in a cluster.
    """

    def __init__(self, store: DicomStore) -> None:
        if not isinstance(store.client, redis.Redis):
            raise ServerError("DICOMweb is served from one Redis server, not from a cluster.")
        pool = store.client.connection_pool
        settings = {
            name: value for name, value in pool.connection_kwargs.items() if name in _SETTINGS
        }
        kind = {
            redis.SSLConnection: redis.asyncio.SSLConnection,
            redis.UnixDomainSocketConnection: redis.asyncio.UnixDomainSocketConnection,
        }.get(pool.connection_class, redis.asyncio.Connection)
        if kind is redis.asyncio.SSLConnection:
            settings |= {k: v for k, v in pool.connection_kwargs.items() if k.startswith("ssl_")}
        self._redis = redis.asyncio.Redis(
            connection_pool=redis.asyncio.BlockingConnectionPool(
                max_connections=CONNECTIONS, timeout=30, connection_class=kind, **settings
            )
        )
        self._known: OrderedDict[str, Stored] = OrderedDict()
        self._store = store
        self._threads = ThreadPoolExecutor(THREADS, "dicomweb-store")
        self._inflating = asyncio.Lock()  # one at a time: each may take much memory

    async def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        await self._redis.aclose(close_connection_pool=True)

    async def replies(self, commands: Sequence[Command]) -> list[Any]:
        """Send commands in one round trip; return the replies, errors among them."""
        async with self._redis.pipeline(transaction=False) as pipe:
            for command in commands:
                pipe.execute_command(*command)
            return await pipe.execute(raise_on_error=False)

    async def _through_store(self, work: Callable[..., Result], *arguments: Any) -> Result:
        """Return what `work` returns, which waits for Redis, or for the source."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, functools.partial(work, *arguments))

    # --- documents ---

    async def stored(self, key: str, *, anew: bool = False) -> Stored:
        """Return the version of an instance that is stored, or was when it was last looked for.

        Raises
        ------
        NotStoredError
            If it has been deleted.
        MissingChunkError, DamagedError
            If its document is not what was stored, or where its frames lie is gone for good.
        """
        known = None if anew else self._known.get(key)
        if known is not None:
            self._known.move_to_end(key)
            return known
        for _ in range(ATTEMPTS):
            (reply,) = await self.replies([("JSON.GET", key, *(f"$.{name}" for name in MEMBERS))])
            members = _members(key, reply)
            manifest = parse_manifest(key, members)
            where, table = members.get("frames"), None
            if Frames.needs_table(where):
                table, version = await self.replies(
                    [("MGET", manifest.attachment_key("frames")), ("JSON.GET", key, "$.version")]
                )
                if version != f'["{manifest.version}"]'.encode():
                    continue
                table = table[0]
                if table is None or crc32(table) != members.get("attachments.frames"):
                    await self._through_store(self._store.frames_of, key)
                    continue
            attributes = {
                keyword: members[f"header.{keyword}"]
                for keyword in ATTRIBUTES
                if f"header.{keyword}" in members
            }
            syntax = members.get("transferSyntaxUID")
            frames = Frames(shown_path(path_of(key)), where, attributes, syntax, table)
            found = Stored(manifest, frames, members.get("sopInstanceUID"))
            self._known[key] = found
            if len(self._known) > REMEMBERED:
                self._known.popitem(last=False)
            return found
        raise MissingChunkError(f"{shown_path(key)} is replaced faster than it can be read.")

    async def json(self, attached: Mapping[str, Attached | None]) -> dict[str, bytes | None]:
        """Return data sets as DICOM JSON, compressed, by the keys of their documents.

        It is empty for an instance that has none, and None for one that is deleted.

        Raises
        ------
        MissingChunkError, DamagedError
            If one is gone or damaged, and cannot be made again.
        """
        found: dict[str, bytes | None] = {
            key: b"" if one else None for key, one in attached.items()
        }
        named = {key: one for key, one in attached.items() if one and one.json_crc is not None}
        if named:
            names = [f"chunk:{key}:{one.version}:json" for key, one in named.items()]
            (texts,) = await self.replies([("MGET", *names)])
            if isinstance(texts, Exception):
                raise texts
            found |= zip(named, texts, strict=True)
        # Replaced meanwhile, or lost.
        others = [key for key, one in named.items() if crc32(found[key] or b"") != one.json_crc]
        found |= zip(others, await asyncio.gather(*map(self._json_anew, others)), strict=True)
        return found

    async def attached(self, keys: Sequence[str]) -> dict[str, Attached | None]:
        """Return by key what is attached to the stored versions; None for a deleted instance."""
        wanted = list(dict.fromkeys(keys))
        # One command for all: a command each took longer than everything else of the answer.
        (replies,) = await self.replies([("JSON.MGET", *wanted, "$['version','attachments']")])
        if isinstance(replies, Exception):
            raise replies
        found: dict[str, Attached | None] = {}
        for key, reply in zip(wanted, replies, strict=True):
            members = [] if reply is None else json.loads(reply)
            version = next((one for one in members if isinstance(one, str)), None)
            attachments = next((one for one in members if isinstance(one, dict)), {})
            found[key] = Attached(version, attachments.get("json")) if version else None
        return found

    async def _json_anew(self, key: str) -> bytes | None:
        try:
            return await self._through_store(self._store.dicom_json, key) or b""
        except NotStoredError:
            return None

    # --- bytes ---

    async def frames(self, key: str, numbers: Sequence[int]) -> tuple[Stored, list[bytes]]:
        """Return frames as they are stored, numbered from 0, all of one version.

        Those of a deflated instance are as they lie in its inflated data set.
        """
        for _ in range(ATTEMPTS):
            stored = await self.stored(key)
            try:
                if stored.syntax == DeflatedExplicitVRLittleEndian:
                    async with self._inflating:
                        return await self._through_store(self._inflated, stored, numbers)
                fetched = await self.pieces(stored, [stored.frames.span(k) for k in numbers])
            except (MissingChunkError, DamagedError, FrameError):
                self._known.pop(key, None)
                if (await self.stored(key)).manifest == stored.manifest:
                    raise
                continue
            return stored, [
                stored.frames.stored(k, one) for k, one in zip(numbers, fetched, strict=True)
            ]
        raise MissingChunkError(f"{shown_path(key)} is replaced faster than it can be read.")

    def _inflated(self, stored: Stored, numbers: Sequence[int]) -> tuple[Stored, list[bytes]]:
        manifest = stored.manifest
        if manifest.size > inflating.INFLATED_BYTES:
            raise inflating.TooLargeError("The deflated instance is too large.")
        (content,) = self._store.spans(manifest, [Span(0, manifest.size)])
        file = inflating.plain(io.BytesIO(content))
        member, table = locate(file, {"header": stored.frames.attributes})
        frames = dataclasses.replace(
            stored.frames, member=member, syntax=ExplicitVRLittleEndian, table=table
        )
        found = []
        for k in numbers:
            span = frames.span(k)
            file.seek(span.offset)
            found.append(frames.stored(k, file.read(span.length)))
        return stored._replace(frames=frames, is_inflated=True), found

    async def pieces(self, stored: Stored, spans: Sequence[Span]) -> list[bytes]:
        """Return pieces of one version of a file in one round trip, if Redis has them.

        Raises
        ------
        MissingChunkError, DamagedError
            If a chunk is gone or damaged and has no source, or the file was replaced.
        """
        try:
            return await self._pieces(stored.manifest, spans)
        except (MissingChunkError, DamagedError) as error:
            if not error.keys:  # replaced
                raise
        return await self._through_store(self._store.spans, stored.manifest, spans)

    async def _pieces(self, manifest: Manifest, spans: Sequence[Span]) -> list[bytes]:
        touched = [
            range(
                manifest.number_at(span.offset),
                manifest.number_at(span.offset + max(span.length, 1) - 1) + 1,
            )
            for span in spans
        ]
        numbers = sorted({number for each in touched for number in each})
        chunks = dict(zip(numbers, await self._chunks(manifest, numbers), strict=True))
        pieces = []
        for span, own in zip(spans, touched, strict=True):
            begin = span.offset - manifest.offset(own[0])
            whole = chunks[own[0]] if len(own) == 1 else b"".join(chunks[n] for n in own)
            pieces.append(whole[begin : begin + span.length])
        return pieces

    async def stream(self, stored: Stored, span: Span | None = None) -> AsyncIterator[bytes]:
        """Yield the bytes of one version of a file, or of a span of it, some at a time."""
        manifest = stored.manifest
        offset, length = span or Span(0, manifest.size)
        end = offset + length
        while offset < end:
            piece = Span(offset, min(PIECE_BYTES, end - offset))
            yield (await self.pieces(stored, [piece]))[0]
            offset += piece.length

    async def _chunks(self, manifest: Manifest, numbers: Sequence[int]) -> list[bytes]:
        runs = [f"$.crc[{number}]" for number in numbers]
        if numbers[-1] - numbers[0] == len(numbers) - 1:
            runs = [f"$.crc[{numbers[0]}:{numbers[-1] + 1}]"]
        # In this order: a document that is still the same had all its chunks just before.
        chunks, reply = await self.replies(
            [
                ("MGET", *manifest.chunk_keys(numbers)),
                ("JSON.GET", manifest.key, "$.version", *runs),
            ]
        )
        if isinstance(chunks, Exception):
            raise chunks
        members = json.loads(reply) if isinstance(reply, bytes) else {}
        if members.get("$.version") != [manifest.version]:
            raise MissingChunkError(f"{manifest.key} was replaced or deleted.")
        crcs = [crc for run in runs for crc in members.get(run, ())]
        if len(crcs) != len(numbers):
            raise DamagedError(f"The document {manifest.key} is damaged: CRCs are missing.")
        return check(manifest, numbers, chunks, crcs)


#: What an asyncio client takes over from the one that it is made like.
_SETTINGS = {
    "host",
    "port",
    "path",
    "username",
    "password",
    "credential_provider",
    "socket_timeout",
    "socket_connect_timeout",
    "socket_read_size",
    "socket_keepalive",
}


def _members(key: str, reply: Any) -> dict[str, Any]:
    """Return those of ``MEMBERS`` that a document has, by their names."""
    if isinstance(reply, redis.ResponseError):
        raise DamagedError(f"{shown_path(key)} cannot be read: there is no document.") from reply
    if isinstance(reply, Exception):
        raise reply
    if reply is None:
        raise NotStoredError(f"{shown_path(path_of(key))} has been deleted.")
    found = json.loads(reply)
    return {name: values[0] for name in MEMBERS if (values := found.get(f"$.{name}"))}


def inflated(compressed: bytes) -> bytes:
    """Return a data set's JSON."""
    inflater = zlib.decompressobj()
    text = inflater.decompress(compressed, JSON_BYTES)
    if inflater.unconsumed_tail:
        raise DamagedError("A data set's JSON is larger than one can be.")
    return text
