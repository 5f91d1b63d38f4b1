"""A stored file as a Python file object that fetches only the chunks that a read touches."""

from __future__ import annotations

import io
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

from layout import BATCH_BYTES, Layout

#: Chunks kept by default (bytes): a slide reader comes back to the same ones.
CACHE_BYTES = 64 * 1024 * 1024
#: The most that is fetched ahead of a sequential reader at a time (bytes).
READ_AHEAD_BYTES = 8 * 1024 * 1024

Chunk = bytes | memoryview


class ChunkReader(io.BufferedIOBase):
    """A read-only, seekable binary file over the chunks of one version of a stored file.

    What a read touches and is not kept is fetched in one round trip. While the reads follow one
    another, more is fetched ahead, twice as much each time. Threads may share a reader: each read
    is whole, from the one position that they share.

    Parameters
    ----------
    layout : Layout
        Of the version that is read, also when the file is replaced meanwhile.
    fetch : callable
        Takes chunk numbers in ascending order and returns the chunks, checked.
    name : str
        The path of the file.
    cache_bytes : int, optional
        How much is kept, in bytes; at least what one read touches.

    Attributes
    ----------
    bytes_fetched, round_trips : int
        What it took so far.
    """

    def __init__(
        self,
        layout: Layout,
        fetch: Callable[[Sequence[int]], Sequence[Chunk]],
        *,
        name: str,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self.name = name
        self.bytes_fetched = 0
        self.round_trips = 0
        self._layout = layout
        self._fetch = fetch
        self._cache_bytes = cache_bytes
        self._kept: OrderedDict[int, Chunk] = OrderedDict()
        self._kept_bytes = 0
        self._position = 0
        self._next_position = -1
        self._ahead = 0
        self._lock = threading.RLock()

    def __repr__(self) -> str:
        return f"ChunkReader(name={self.name!r}, size={self.size})"

    @property
    def size(self) -> int:
        """The file's size in bytes."""
        return self._layout.size

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        self._check_open()
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """Set the position and return it; as in `io.BytesIO`, also beyond the end."""
        with self._lock:
            self._check_open()
            if whence == io.SEEK_SET:
                if offset < 0:
                    raise ValueError(f"negative seek value {offset} in {self.name}")
                self._position = offset
            elif whence == io.SEEK_CUR:
                self._position = max(0, self._position + offset)
            elif whence == io.SEEK_END:
                self._position = max(0, self.size + offset)
            else:
                raise ValueError(f"invalid whence ({whence}, should be 0, 1 or 2)")
            return self._position

    def read(self, size: int | None = -1, /) -> bytes:
        with self._lock:
            self._check_open()
            left = max(0, self.size - self._position)
            wanted = left if size is None or size < 0 else min(size, left)
            pieces = self._pieces(self._position, wanted)
            data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
            self._position += wanted
            return bytes(data)

    def read1(self, size: int = -1, /) -> bytes:
        with self._lock:
            return self.read(len(self.peek()) if size < 0 else size)

    def readinto(self, buffer: Any, /) -> int:
        with self._lock:
            self._check_open()
            view = memoryview(buffer).cast("B")
            wanted = min(len(view), max(0, self.size - self._position))
            filled = 0
            while filled < wanted:
                # In steps, so that no more than one of them is held beside the caller's buffer.
                step = min(wanted - filled, BATCH_BYTES)
                for piece in self._pieces(self._position, step):
                    view[filled : filled + len(piece)] = piece
                    filled += len(piece)
                self._position += step
            return wanted

    def readinto1(self, buffer: Any, /) -> int:
        return self.readinto(buffer)

    def peek(self, size: int = 0, /) -> bytes:
        """Return what is left of the chunk at the position, at least one byte before the end."""
        with self._lock:
            self._check_open()
            if self._position >= self.size:
                return b""
            number = self._layout.number_at(self._position)
            start = self._layout.offset(number)
            left = self._layout.length(number) - (self._position - start)
            return bytes(self._pieces(self._position, left)[0])

    def write(self, _data: Any, /) -> int:
        raise io.UnsupportedOperation(f"{self.name} is open for reading; store it with put or load")

    def close(self) -> None:
        with self._lock:
            self._kept.clear()
            super().close()

    def _check_open(self) -> None:
        if self.closed:
            raise ValueError(f"I/O operation on closed file {self.name}.")

    def _pieces(self, position: int, wanted: int) -> list[memoryview]:
        """Return `wanted` bytes from `position` as slices of chunks."""
        if wanted == 0:
            return []
        layout = self._layout
        first, last = layout.number_at(position), layout.number_at(position + wanted - 1)
        chunks = self._chunks(first, last, sequential=position == self._next_position)
        self._next_position = position + wanted
        pieces = []
        for number, chunk in zip(range(first, last + 1), chunks, strict=True):
            start = layout.offset(number)
            lower, upper = max(position - start, 0), position + wanted - start
            pieces.append(memoryview(chunk)[lower:upper])
        return pieces

    def _chunks(self, first: int, last: int, *, sequential: bool) -> list[Chunk]:
        """Return the chunks from `first` to `last`, fetching those that are not kept."""
        missing = [number for number in range(first, last + 1) if number not in self._kept]
        found = {n: self._kept[n] for n in range(first, last + 1) if n in self._kept}
        if missing:
            chunk_size = self._layout.chunk_size
            most = min(READ_AHEAD_BYTES, self._cache_bytes // 2)
            self._ahead = min(max(2 * self._ahead, chunk_size), most) if sequential else 0
            ahead = range(last + 1, min(last + 1 + self._ahead // chunk_size, self._layout.count))
            missing += [number for number in ahead if number not in self._kept]
            for number, chunk in zip(missing, self._fetched(missing), strict=True):
                found[number] = chunk
                self._kept[number] = chunk
                self._kept_bytes += len(chunk)
        for number in range(first, last + 1):
            self._kept.move_to_end(number)
        while self._kept_bytes > self._cache_bytes and len(self._kept) > 1:
            self._kept_bytes -= len(self._kept.popitem(last=False)[1])
        return [found[number] for number in range(first, last + 1)]

    def _fetched(self, numbers: Sequence[int]) -> list[Chunk]:
        chunks: list[Chunk] = []
        step = max(1, BATCH_BYTES // self._layout.chunk_size)
        for first in range(0, len(numbers), step):
            chunks += self._fetch(numbers[first : first + step])
            self.round_trips += 1
        self.bytes_fetched += sum(map(len, chunks))
        return chunks
