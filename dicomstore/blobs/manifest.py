"""How a file lies in Redis: its keys, its chunks, its document; computed, without a server."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote_to_bytes

from dicomstore.errors import DamagedError

DOCUMENT_PREFIX = "file:"
CHUNK_PREFIX = "chunk:"
#: Redis rounds a value up to an allocator class, four a doubling; a payload of exactly 2^n bytes
#: wastes 25%. This one fits the 256 KiB class.
DEFAULT_CHUNK_SIZE = 262_080
#: A command or pipeline carries no more than this (bytes): larger ones double the server's memory
#: and meet its 1 GB limit on a client's query buffer.
BATCH_BYTES = 16 * 1024 * 1024
KEYS_PER_COMMAND = 1000
#: What says how a file is cut, and all that says how it is stored.
LAYOUT_MEMBERS = ("size", "version", "chunkSize", "tail")
STORAGE_MEMBERS = (*LAYOUT_MEMBERS, "imageName", "sha256", "crc", "chunks")


def quote_path(path: str) -> str:
    """Return `path` as it stands in keys: ``%``, ``{``, ``}`` and bytes not UTF-8 as ``%XX``."""
    return re.sub("[%{}\udc80-\udcff]", lambda match: f"%{ord(match[0]) & 0xFF:02X}", path)


def unquote_path(quoted: str) -> str:
    """Return the path that :func:`quote_path` made `quoted` of."""
    return os.fsdecode(unquote_to_bytes(os.fsencode(quoted)))


def shown_path(path: str) -> str:
    """Return `path` as text that can be printed and indexed: bytes not UTF-8 as ``%XX``."""
    return re.sub("[\udc80-\udcff]", lambda match: f"%{ord(match[0]) & 0xFF:02X}", path)


def checked_path(path: str) -> str:
    """Return `path` if a file can be stored under it; raise ValueError otherwise."""
    parts = path.split("/")
    if any(part in ("", ".", "..") for part in parts) or "\0" in path:
        raise ValueError(
            f"{shown_path(path)!r} is no path for a stored file: give a relative one, with '/' "
            "between its parts and without '..'."
        )
    return path


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


@dataclass(frozen=True)
class Layout:
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
        prefix = self.chunk_key(0)[:-1]
        wanted = range(self.count) if numbers is None else numbers
        return [f"{prefix}{number}" for number in wanted]

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

    def chunks(self) -> list[tuple[bytes, int]]:
        """Return key and length of every chunk, in order."""
        full = self.size // self.chunk_size
        lengths = [self.chunk_size] * full + list(self.tail)
        return [(key.encode(), n) for key, n in zip(self.chunk_keys(), lengths, strict=True)]

    @property
    def lease(self) -> str:
        """The key that says that this version is being loaded."""
        return f"{CHUNK_PREFIX}{{{self.key}}}:{self.version}"

    def batches(self) -> Iterator[range]:
        """Yield the chunk numbers in order, in runs of at most ``BATCH_BYTES``."""
        step = max(1, BATCH_BYTES // self.chunk_size)
        for first in range(0, self.count, step):
            yield range(first, min(first + step, self.count))


@dataclass(frozen=True)
class Document:
    """What a reader needs of a stored document."""

    layout: Layout
    sha256: str
    crc: Sequence[int] = field(repr=False)

    @property
    def key(self) -> str:
        return self.layout.key


def parse_layout(key: str, members: Mapping[str, Any]) -> Layout:
    """Return the layout that a document's scalars describe, after checking that they agree."""
    layout = Layout(
        key,
        str(members.get("version")),
        _natural(members.get("size")),
        _natural(members.get("chunkSize")),
        tuple(_natural(length) for length in _list(members.get("tail"))),
    )
    sound = (
        re.fullmatch("[0-9a-f]{12}", layout.version)
        and layout.size >= 0
        and layout.chunk_size > 0
        and len(layout.tail) <= 2
        and all(length > 0 for length in layout.tail)
        and sum(layout.tail) == layout.size % layout.chunk_size
    )
    if not sound:
        raise _disagreement(key)
    return layout


def parse_document(key: str, members: Mapping[str, Any]) -> Document:
    """Return the document, after checking that its members agree with one another."""
    layout = parse_layout(key, members)
    sha256 = str(members.get("sha256"))
    crc, chunks = _list(members.get("crc")), _list(members.get("chunks"))
    # An edited name would let a look-up by imageName end at this file.
    named = members.get("imageName") == shown_path(path_of(key).rpartition("/")[2])
    counted = len(crc) == len(chunks) == layout.count and re.fullmatch("[0-9a-f]{64}", sha256)
    # Nothing but this very file's own keys: no document can point at a foreign one.
    if not named or not counted or chunks != layout.chunk_keys():
        raise _disagreement(key)
    return Document(layout, sha256, crc)


def _disagreement(key: str) -> DamagedError:
    return DamagedError(
        f"The document {shown_path(key)} is damaged: its imageName, size, chunkSize, tail, crc and "
        "chunks do not agree. Load the file again."
    )


def _natural(value: Any) -> int:
    return value if isinstance(value, int) and value >= 0 else -1


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def document_key(path: str) -> str:
    """Return the key of the document of the file at `path`."""
    return DOCUMENT_PREFIX + quote_path(path)


def path_of(key: str) -> str:
    """Return the path whose document has the key `key`."""
    return unquote_path(key.removeprefix(DOCUMENT_PREFIX))
