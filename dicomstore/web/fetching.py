"""Stored instances read without waiting: asyncio, as few round trips as there can be."""

from __future__ import annotations

import json
import zlib
from collections import OrderedDict
from collections.abc import AsyncIterator, Sequence
from typing import Any, NamedTuple

import redis
import redis.asyncio

from dicomstore.blobs.chunks import check
from dicomstore.blobs.manifest import MANIFEST_MEMBERS, Manifest, parse_manifest
from dicomstore.blobs.wire import crc32
from dicomstore.errors import DamagedError, FrameError, MissingChunkError, NotStoredError
from dicomstore.imaging.frames import OPTIONS, Frames, Span
from dicomstore.keys import path_of, shown_path

#: What has to be known of an instance before anything of it can be served.
MEMBERS = (
    *MANIFEST_MEMBERS,
    "frames",
    "transferSyntaxUID",
    "attachments",
    "sopInstanceUID",
    *(f"header.{keyword}" for keyword in OPTIONS),
)
#: So many connections to Redis; who wants one more waits.
CONNECTIONS = 32
#: So many instances are remembered, with where their frames lie.
REMEMBERED = 4096
#: How often a read starts over when its instance is replaced under it.
ATTEMPTS = 20
#: Of a file that is streamed, so much is held at a time (bytes).
PIECE_BYTES = 1024 * 1024
#: A data set's JSON is not larger than this (bytes).
JSON_BYTES = 16 * 1024 * 1024

Command = tuple[Any, ...]


class Stored(NamedTuple):
    """One version of an instance: where its bytes and its frames lie."""

    manifest: Manifest
    frames: Frames
    uid: str | None

    @property
    def syntax(self) -> str | None:
        return self.frames.syntax


class Fetching:
    """Reads instances by the keys of their documents.

    Parameters
    ----------
    client : redis.Redis
        A new asyncio client is made like it.
    """

    def __init__(self, client: redis.Redis) -> None:
        pool = client.connection_pool
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

    async def close(self) -> None:
        await self._redis.aclose(close_connection_pool=True)

    async def replies(self, commands: Sequence[Command]) -> list[Any]:
        """Send commands in one round trip; return the replies, errors among them."""
        async with self._redis.pipeline(transaction=False) as pipe:
            for command in commands:
                pipe.execute_command(*command)
            return await pipe.execute(raise_on_error=False)

    # --- documents ---

    async def stored(self, key: str, *, anew: bool = False) -> Stored:
        """Return the version of an instance that is stored, or was when it was last looked for.

        Raises
        ------
        NotStoredError
            If it has been deleted.
        DamagedError
            If its document is not what was stored.
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
                if table is None:
                    raise FrameError(
                        f"Where the frames of {shown_path(path_of(key))} lie is gone: delete the "
                        "file and load it again."
                    )
            attributes = {
                keyword: members[f"header.{keyword}"]
                for keyword in OPTIONS
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

    async def json(self, keys: Sequence[str]) -> list[bytes | None]:
        """Return data sets as DICOM JSON, compressed; None for one that has none or is deleted."""
        found: dict[str, bytes | None] = {}
        wanted = list(dict.fromkeys(keys))
        for _ in range(ATTEMPTS):
            commands = [("JSON.GET", key, "$.version", "$.attachments.json") for key in wanted]
            names, crcs = [], []
            for key, reply in zip(wanted, await self.replies(commands), strict=True):
                members = json.loads(reply) if isinstance(reply, bytes) else {}
                version, crc = members.get("$.version"), members.get("$.attachments.json")
                if not version or not crc:
                    found[key] = None
                    continue
                names.append((key, f"chunk:{key}:{version[0]}:json"))
                crcs.append(crc[0])
            if not names:
                break
            (texts,) = await self.replies([("MGET", *(name for _, name in names))])
            wanted = []
            for (key, _), text, crc in zip(names, texts, crcs, strict=True):
                if text is not None and crc32(text) == crc:
                    found[key] = text
                else:
                    wanted.append(key)  # replaced meanwhile
            if not wanted:
                break
        else:
            raise DamagedError(f"The DICOM JSON of {shown_path(wanted[0])} is gone or damaged.")
        return [found[key] for key in keys]

    # --- bytes ---

    async def frames(self, key: str, numbers: Sequence[int]) -> tuple[Stored, list[bytes]]:
        """Return frames as they are stored, numbered from 0, all of one version."""
        for _ in range(ATTEMPTS):
            known = key in self._known
            stored = await self.stored(key)
            try:
                fetched = await self.pieces(stored, [stored.frames.span(k) for k in numbers])
            except (MissingChunkError, DamagedError):
                self._known.pop(key, None)
                if not known:
                    raise
                continue
            return stored, [
                stored.frames.stored(k, one) for k, one in zip(numbers, fetched, strict=True)
            ]
        raise MissingChunkError(f"{shown_path(key)} is replaced faster than it can be read.")

    async def pieces(self, stored: Stored, spans: Sequence[Span]) -> list[bytes]:
        """Return pieces of one version of a file in one round trip."""
        manifest = stored.manifest
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
