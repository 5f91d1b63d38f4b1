"""How a file lies in Redis: its chunk plan and its manifest; computed, without a server."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dicomstore.errors import LOAD_AGAIN, DamagedError
from dicomstore.keys import CHUNK_PREFIX, path_of, shown_path

#: Redis rounds a value up to an allocator class, four a doubling; a payload of exactly 2^n bytes
#: wastes 25%. This one fits the 256 KiB class.
DEFAULT_CHUNK_SIZE = 262_080
#: A command or pipeline carries no more than this (bytes): larger ones double the server's memory
#: and meet its 1 GB limit on a client's query buffer.
BATCH_BYTES = 16 * 1024 * 1024
#: Strings that a version may have beside its chunks: where its frames lie, and its data set as
#: DICOM JSON, compressed.
ATTACHMENTS = ("frames", "json")
#: The members of a document that say how the file is cut, and all that say how it is stored.
MANIFEST_MEMBERS = ("size", "version", "chunkSize", "tail")
STORAGE_MEMBERS = (*MANIFEST_MEMBERS, "imageName", "blake3", "crc", "chunks", "attachments")


def _allocated(payload: int) -> int:
    """Return what Redis allocates for a string value: jemalloc's classes, four a doubling."""
    needed = payload + (6 if payload < 2**16 else 10)  # string header and terminator
    step = max(16, 1 << max(0, (needed - 1).bit_length() - 3))
    return -(-needed // step) * step


def plan_tail(size: int, chunk_size: int) -> tuple[int, ...]:
    """Return the lengths of what follows the last full chunk.

    The rest of a file is one piece, or two where cutting it at an allocator class saves more than
    256 bytes of Redis memory (a key of its own costs about 96).

    Parameters
    ----------
    size, chunk_size : int
        In bytes.

    Returns
    -------
    tuple of int
        At most two lengths in bytes.
    """
    rest = size % chunk_size
    if rest == 0:
        return ()
    step = max(16, 1 << max(0, (rest + 10).bit_length() - 3))
    first = (rest + 10) // step * step - 10
    if 0 < first < rest:
        saved = _allocated(rest) - _allocated(first) - _allocated(rest - first) - 96
        if saved > 256:
            return first, rest - first
    return (rest,)


@dataclass(frozen=True, slots=True)
class Manifest:
    """Where the bytes of one version of a file lie: chunk keys and offsets, computed."""

    key: str
    version: str
    size: int
    chunk_size: int
    tail: tuple[int, ...]

    @property
    def count(self) -> int:
        """The number of chunks."""
        return self.size // self.chunk_size + len(self.tail)

    def chunk_key(self, number: int) -> str:
        """Return the key of chunk `number`."""
        return f"{CHUNK_PREFIX}{self.key}:{self.version}:{number}"

    def chunk_keys(self, numbers: Sequence[int] | None = None) -> list[str]:
        """Return the keys of the chunks `numbers`, of all by default."""
        prefix = f"{CHUNK_PREFIX}{self.key}:{self.version}:"
        wanted = range(self.count) if numbers is None else numbers
        return [f"{prefix}{number}" for number in wanted]

    def attachment_key(self, name: str) -> str:
        """Return the key of one of the ``ATTACHMENTS``."""
        return f"{CHUNK_PREFIX}{self.key}:{self.version}:{name}"

    @property
    def lease(self) -> str:
        """The key that says that this version is being loaded."""
        return f"{CHUNK_PREFIX}{{{self.key}}}:{self.version}"

    def all_keys(self) -> list[str]:
        """Return every key that this version may have, its document's excepted."""
        return [*self.chunk_keys(), *map(self.attachment_key, ATTACHMENTS), self.lease]

    def length(self, number: int) -> int:
        """Return the length of chunk `number` in bytes."""
        full = self.size // self.chunk_size
        return self.chunk_size if number < full else self.tail[number - full]

    def offset(self, number: int) -> int:
        """Return where chunk `number` begins in the file, in bytes."""
        full = self.size // self.chunk_size
        return min(number, full) * self.chunk_size + sum(self.tail[: max(0, number - full)])

    def number_at(self, position: int) -> int:
        """Return the number of the chunk that holds the byte at `position`."""
        full = self.size // self.chunk_size
        if position < full * self.chunk_size or len(self.tail) < 2:
            return position // self.chunk_size
        return full + (position >= full * self.chunk_size + self.tail[0])

    def chunks(self, numbers: Sequence[int] | None = None) -> list[tuple[bytes, int]]:
        """Return key and length of the chunks `numbers`, of all by default, in order."""
        if numbers is None:
            lengths = [self.chunk_size] * (self.size // self.chunk_size) + list(self.tail)
        else:
            lengths = [self.length(number) for number in numbers]
        keys = self.chunk_keys(numbers)
        return [(key.encode(), length) for key, length in zip(keys, lengths, strict=True)]

    def batches(self) -> Iterator[range]:
        """Yield the chunk numbers in order, in runs of at most ``BATCH_BYTES``."""
        step = max(1, BATCH_BYTES // self.chunk_size)
        for first in range(0, self.count, step):
            yield range(first, min(first + step, self.count))


@dataclass(frozen=True, slots=True)
class Document:
    """What a document says of how its file is stored.

    Attributes
    ----------
    manifest : Manifest
    blake3 : str
        Of the whole file, in hexadecimal.
    crc : sequence of int
        The CRC-32 of each chunk.
    attachments : mapping
        What lies beside the chunks: the CRC-32 of each by its name, unless edited.
    """

    manifest: Manifest
    blake3: str
    crc: Sequence[int] = field(repr=False)
    attachments: Mapping[str, Any] = field(repr=False)

    @property
    def key(self) -> str:
        return self.manifest.key


def parse_manifest(key: str, members: Mapping[str, Any]) -> Manifest:
    """Return the manifest that a document's scalars give, after checking that they agree."""
    version, size, chunk_size = (members.get(name) for name in ("version", "size", "chunkSize"))
    tail = members.get("tail")
    sound = (
        isinstance(version, str)
        and re.fullmatch("[0-9a-f]{12}", version)
        and _is_natural(size)
        and _is_natural(chunk_size)
        and chunk_size
        and isinstance(tail, list)
        and len(tail) <= 2
        and all(_is_natural(length) and length for length in tail)
        and sum(tail) == size % chunk_size
    )
    if not sound:
        raise _disagreement(key)
    return Manifest(key, str(version), size, chunk_size, tuple(tail))  # type: ignore[arg-type]


def parse_document(key: str, members: Mapping[str, Any]) -> Document:
    """Return the document, after checking that its members agree with one another."""
    manifest = parse_manifest(key, members)
    blake3, crc, chunks = (members.get(name) for name in ("blake3", "crc", "chunks"))
    # An edited name would let a look-up by imageName end at this file.
    is_named = members.get("imageName") == shown_path(path_of(key).rpartition("/")[2])
    digest = isinstance(blake3, str) and re.fullmatch("[0-9a-f]{64}", blake3)
    counted = isinstance(crc, list) and len(crc) == manifest.count and digest
    # Only this file's own keys: no document can point at a foreign one.
    if not is_named or not counted or chunks != manifest.chunk_keys():
        raise _disagreement(key)
    named = members.get("attachments")
    known = named if isinstance(named, dict) else {}
    attachments = {name: known[name] for name in ATTACHMENTS if name in known}
    return Document(manifest, str(blake3), crc or (), attachments)


def _disagreement(key: str) -> DamagedError:
    return DamagedError(
        f"The document {shown_path(key)} is damaged: its imageName, size, chunkSize, tail, crc and "
        f"chunks do not agree. {LOAD_AGAIN}"
    )


def _is_natural(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
