"""The chunks of one manifest, in and out of Redis.

This is the only place that chooses how they travel: in pipelines of redis-py, or, for files of more
than one batch, over connections of their own.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import math
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any

from blake3 import blake3

from dicomstore.blobs.manifest import BATCH_BYTES, Document, Manifest
from dicomstore.blobs.wire import ChunkStream, complete, crc32
from dicomstore.errors import DamagedError, MissingChunkError
from dicomstore.server.connection import SOCKET_TIMEOUT_S, Server
from dicomstore.server.nodes import Command

#: So many bytes of small files are fetched in one request.
TOGETHER_BYTES = 2 * 1024 * 1024

#: Returns lost chunks, given a manifest, and the CRC-32 of each chunk by its number; or raises.
Mend = Callable[[Manifest, Mapping[int, int]], Mapping[int, bytes]]
#: Fills memory with the next bytes of a file; raises where the file ends too early.
ReadInto = Callable[[memoryview], None]


class Chunks:
    """Sends, fetches, checks and removes chunks.

    Parameters
    ----------
    server : Server
    ttl_ms : int, optional
        Time to live of the chunks that are sent (ms). What is small stays: a version's attachments
        have none.
    """

    def __init__(self, server: Server, ttl_ms: int | None = None) -> None:
        self._server = server
        self._ttl_ms = ttl_ms

    # --- in ---

    def send(
        self,
        manifest: Manifest,
        read_into: ReadInto,
        done: Callable[[int], None],
        together: list[Command] | None = None,
        *,
        cold: bool = False,
    ) -> tuple[str, list[int]]:
        """Send all chunks; return the BLAKE3 and the chunks' CRC-32 of the very bytes sent.

        Parameters
        ----------
        manifest : Manifest
        read_into : callable
            Called in order, also in a thread.
        done : callable
            Told of every number of bytes that was read to be sent.
        together : list, optional
            Where the commands for a file of one batch are appended, to be sent with others.
        cold : bool, optional
            Whether the chunks are only read and not sent.
        """
        digest, crc = blake3(), []

        def read(views: list[memoryview]) -> int:
            for view in views:
                read_into(view)
                digest.update(view)
                crc.append(crc32(view))
            count = sum(map(len, views))
            done(count)
            return count

        if cold:
            scratch = memoryview(bytearray(manifest.chunk_size))
            for number in range(manifest.count):
                read([scratch[: manifest.length(number)]])
        elif self._goes_by_wire(manifest.size):
            chunks = manifest.chunks()
            self._stream(lambda stream: stream.send(chunks, read, ttl_ms=self._ttl_ms))
        else:
            for batch in manifest.batches():
                pieces = [memoryview(bytearray(manifest.length(number))) for number in batch]
                read(pieces)
                keys = manifest.chunk_keys(batch)
                commands = [
                    _set(key, piece, self._ttl_ms) for key, piece in zip(keys, pieces, strict=True)
                ]
                if together is not None and len(batch) == manifest.count:
                    together += commands
                else:
                    self._server.commands(commands)
        return digest.hexdigest(), crc

    def attach(self, manifest: Manifest, attachments: Mapping[str, bytes]) -> list[Command]:
        """Return the commands that store what lies beside the chunks of a version."""
        return [("SET", manifest.attachment_key(name), text) for name, text in attachments.items()]

    def has_attachments(self, document: Document) -> bool:
        """Whether all that belongs beside the chunks lies there."""
        keys = list(map(document.manifest.attachment_key, document.attachments))
        replies = self._server.commands(self._server.for_keys("EXISTS", keys))
        return bool(sum(replies) == len(keys))

    def attachment_faults(self, document: Document) -> dict[str, str]:
        """Return what is wrong with each attachment that is not as it was stored, by its name."""
        keys = list(map(document.manifest.attachment_key, document.attachments))
        replies = self._server.commands(self._server.for_keys("MGET", keys))
        texts = itertools.chain.from_iterable(replies)
        return {
            name: "gone" if text is None else "damaged"
            for (name, crc), text in zip(document.attachments.items(), texts, strict=True)
            if text is None or crc32(text) != crc
        }

    def attachment(self, manifest: Manifest, name: str, crc: Any) -> bytes:
        """Return a string that lies beside the chunks of a version, of this CRC-32.

        Raises
        ------
        MissingChunkError, DamagedError
            If it is gone, or does not have this CRC-32.
        """
        key = manifest.attachment_key(name)
        text: bytes | None = self._server.command("MGET", key)[0]
        if text is None:
            raise MissingChunkError.of([key])
        if crc32(text) != crc:
            raise DamagedError.of(key)
        return text

    def put_back(self, manifest: Manifest, chunks: Mapping[int, bytes]) -> None:
        """Store some chunks of a version again; those of a file that stays for good stay too."""
        ttl_ms = None if self._ttl_ms is None or self._is_permanent(manifest) else self._ttl_ms
        self._server.commands(
            [_set(manifest.chunk_key(number), piece, ttl_ms) for number, piece in chunks.items()]
        )

    def _is_permanent(self, manifest: Manifest) -> bool:
        """Whether the first chunk that is there does not expire."""
        left = self._server.command("PTTL", manifest.chunk_key(0))
        if left == -2:  # gone
            keys = manifest.chunk_keys()
            times = self._server.commands([("PTTL", key) for key in keys])
            left = next((ms for ms in times if ms != -2), left)
        return bool(left == -1)

    # --- out ---

    def fetch(self, manifest: Manifest, numbers: Sequence[int]) -> list[bytes | None]:
        """Return chunks in one round trip, None for those that are gone; at most a batch."""
        replies = self._server.commands(self._server.for_keys("MGET", manifest.chunk_keys(numbers)))
        return list(itertools.chain.from_iterable(replies))

    def in_order(self, document: Document, mend: Mend | None = None) -> Iterator[bytes]:
        """Yield the chunks in order, each of its length and CRC-32; a batch in each request."""
        for batch in document.manifest.batches():
            chunks = self.fetch(document.manifest, batch)
            crcs = document.crc[batch.start : batch.stop]
            yield from check(document.manifest, batch, chunks, crcs, mend)

    def read(self, document: Document, mend: Mend | None = None) -> bytes:
        """Return a whole file; lost chunks come from `mend`."""
        if not self._goes_by_wire(document.manifest.size):
            return b"".join(self.in_order(document, mend))
        # A BytesIO hands out its bytes without a copy: the file is in memory once.
        file = io.BytesIO(bytes(document.manifest.size))
        with file.getbuffer() as view:
            self.read_into(document, view, mend)
        return file.getvalue()

    def read_into(self, document: Document, view: memoryview, mend: Mend | None = None) -> None:
        """Fill `view`, which is as long as the file; lost chunks come from `mend`."""
        if self._goes_by_wire(document.manifest.size):
            chunks = document.manifest.chunks()

            def fetch(stream: ChunkStream) -> Awaitable[None]:
                return stream.fetch(chunks, view, crcs=document.crc)

            if mend is None:
                self._stream_out(document, fetch)
                return
            with contextlib.suppress(MissingChunkError, DamagedError):
                self._stream(fetch)
                return
        position = 0
        for chunk in self.in_order(document, mend):
            view[position : position + len(chunk)] = chunk
            position += len(chunk)

    def copy(self, document: Document, write: Callable[[Any], object]) -> None:
        """Pass all bytes on in order; raise in the end if the file's digest is wrong."""
        digest = blake3()

        def pass_on(piece: Any) -> None:
            digest.update(piece)
            write(piece)

        if self._goes_by_wire(document.manifest.size):
            chunks = document.manifest.chunks()
            self._stream_out(
                document, lambda stream: stream.copy(chunks, pass_on, crcs=document.crc)
            )
        else:
            for chunk in self.in_order(document):
                pass_on(chunk)
        if digest.hexdigest() != document.blake3:
            raise DamagedError(
                f"{document.key} is damaged: its bytes do not have the BLAKE3 that was stored. "
                "Delete the file and load it again."
            )

    def copy_all(self, documents: Sequence[Document], write: Callable[[Any], object]) -> None:
        """Pass the bytes of many files on, one after the other, without looking at their digests.

        `write` is called in a thread while the next chunks are received.
        """
        if self._goes_by_wire(sum(document.manifest.size for document in documents)):
            chunks = [chunk for document in documents for chunk in document.manifest.chunks()]
            crcs = [crc for document in documents for crc in document.crc]
            self._stream(lambda stream: stream.copy(chunks, write, crcs=crcs))
        else:
            for group in _groups(documents):
                alone = len(group) == 1
                pieces = self.in_order(group[0]) if alone else self._read_batch(group, None)
                for piece in pieces:
                    write(piece)

    def read_each(
        self, documents: Sequence[Document], mend: Mend | None = None
    ) -> Iterator[tuple[Document, bytes]]:
        """Yield whole files in order, with the chunks of many small files in each request."""
        for group in _groups(documents):
            if len(group) == 1:
                yield group[0], self.read(group[0], mend)
            else:
                yield from zip(group, self._read_batch(group, mend), strict=True)

    def _read_batch(self, documents: Sequence[Document], mend: Mend | None) -> Iterator[bytes]:
        keys = [key for document in documents for key in document.manifest.chunk_keys()]
        replies = self._server.commands(self._server.for_keys("MGET", keys))
        chunks = itertools.chain.from_iterable(replies)
        for document in documents:
            numbers = range(document.manifest.count)
            own = list(itertools.islice(chunks, len(numbers)))
            yield b"".join(check(document.manifest, numbers, own, document.crc, mend))

    # --- checking, keeping and removing ---

    def missing(self, manifests: Sequence[Manifest]) -> list[int]:
        """Return how many chunks of each manifest are gone, in one round trip."""
        commands = [self._server.for_keys("EXISTS", each.chunk_keys()) for each in manifests]
        replies = iter(self._server.commands(list(itertools.chain.from_iterable(commands))))
        return [
            manifest.count - sum(itertools.islice(replies, len(own)))
            for manifest, own in zip(manifests, commands, strict=True)
        ]

    def gone(self, manifest: Manifest) -> list[int]:
        """Return the numbers of the chunks that are not in Redis, in one round trip."""
        replies = self._server.commands([("EXISTS", key) for key in manifest.chunk_keys()])
        return [number for number, there in enumerate(replies) if not there]

    def faults(self, document: Document) -> dict[int, str]:
        """Return what is wrong with each chunk that is not as it was stored: gone or damaged."""
        manifest, faults = document.manifest, {}
        for batch in manifest.batches():
            for number, chunk in zip(batch, self.fetch(manifest, batch), strict=True):
                if chunk is None:
                    faults[number] = "gone"
                elif not is_sound(manifest, number, chunk, document.crc[number]):
                    faults[number] = "damaged"
        return faults

    def keep(self, manifest: Manifest, *, below: float = math.inf) -> None:
        """Let the chunks live as long as what is sent now, if less than `below` (0 to 1) is left.

        None gets less time than it has.
        """
        left = self._server.command("PTTL", manifest.chunk_key(0))
        if left == -1 or left >= below * (self._ttl_ms or math.inf):  # -1: it stays for good
            return
        command = ("PERSIST",) if self._ttl_ms is None else ("PEXPIRE", self._ttl_ms, "GT")
        self._server.commands([(command[0], key, *command[1:]) for key in manifest.chunk_keys()])

    def unlink(self, manifest: Manifest) -> None:
        """Remove all keys of a version, its lease among them."""
        self._server.commands(self._server.for_keys("UNLINK", manifest.all_keys()))

    # --- the way ---

    def _goes_by_wire(self, size: int) -> bool:
        """Whether connections of its own pay for so many bytes, and can be made."""
        return size > BATCH_BYTES and self._server.wire_client() is not None

    def _stream_out(
        self, document: Document, work: Callable[[ChunkStream], Awaitable[None]]
    ) -> None:
        """As `_stream`; an error names all chunks of the file that are gone."""
        try:
            self._stream(work)
        except MissingChunkError as error:
            if gone := self.gone(document.manifest):
                raise MissingChunkError.of(document.manifest.chunk_keys(gone)) from error
            raise

    def _stream(self, work: Callable[[ChunkStream], Awaitable[None]]) -> None:
        client = self._server.wire_client()
        assert client is not None

        async def whole() -> None:
            async with ChunkStream(client, timeout=SOCKET_TIMEOUT_S) as stream:
                await work(stream)

        complete(whole())


def _groups(documents: Sequence[Document]) -> Iterator[list[Document]]:
    """Cut `documents` into groups of at most ``TOGETHER_BYTES``, but at least one document."""
    group: list[Document] = []
    size = 0
    for document in documents:
        if group and size + document.manifest.size > TOGETHER_BYTES:
            yield group
            group, size = [], 0
        group.append(document)
        size += document.manifest.size
    if group:
        yield group


def _set(key: str, value: Any, ttl_ms: int | None) -> Command:
    return ("SET", key, value, *(() if ttl_ms is None else ("PX", ttl_ms)))


def is_sound(manifest: Manifest, number: int, chunk: bytes, crc: int) -> bool:
    """Whether a chunk has its length and its CRC-32."""
    return len(chunk) == manifest.length(number) and crc32(chunk) == crc


def check(
    manifest: Manifest,
    numbers: Sequence[int],
    chunks: Sequence[bytes | None],
    crcs: Sequence[int],
    mend: Mend | None = None,
) -> list[bytes]:
    """Return `chunks`, all there and sound; lost ones come from `mend`.

    Raises
    ------
    MissingChunkError, DamagedError
        If one is gone, or does not have its length and CRC-32.
    """
    lost = {
        number: crc
        for number, chunk, crc in zip(numbers, chunks, crcs, strict=True)
        if chunk is None or not is_sound(manifest, number, chunk, crc)
    }
    if not lost:
        return list(chunks)  # type: ignore[arg-type]
    if mend is not None:
        mended = mend(manifest, lost)
        pairs = zip(numbers, chunks, strict=True)
        return [mended[number] if number in lost else chunk for number, chunk in pairs]  # type: ignore[misc]
    gone = [number for number, chunk in zip(numbers, chunks, strict=True) if chunk is None]
    if gone:
        raise MissingChunkError.of(manifest.chunk_keys(gone))
    raise DamagedError.of(manifest.chunk_key(min(lost)))
