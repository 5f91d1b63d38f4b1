"""A stored file as a Python file object that fetches only the chunks that a read touches."""

from __future__ import annotations

import contextlib
import io
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from operator import index
from typing import Any

from dicomstore.blobs.manifest import BATCH_BYTES, Manifest
from dicomstore.errors import DicomRedisError
from dicomstore.server.connection import KEYS_PER_COMMAND

#: Chunks kept by default (bytes): a slide reader comes back to the same ones.
CACHE_BYTES = 64 * 1024 * 1024
#: Of smaller chunks, several are fetched at a time (bytes): fewer would save no time.
LEAST_FETCH_BYTES = 128 * 1024
#: How much must have been read in a row before any is fetched ahead (bytes): the tile offsets of
#: a slide are read in a row too, and what follows them is not wanted.
SEQUENTIAL_BYTES = 1024 * 1024
#: The most that is fetched ahead at a time (bytes).
READ_AHEAD_BYTES = 8 * 1024 * 1024

Chunk = bytes | memoryview
Fetch = Callable[[Sequence[int]], Sequence[Chunk]]


class ChunkReader(io.BufferedIOBase):
    """A read-only, seekable binary file over the chunks of one version of a stored file.

    What a read touches and is not kept is fetched in one round trip. While the reads follow one
    another, a thread fetches what comes next, as much as has been read in a row. Threads may share
    a reader: each read is whole, from the one position that they share.

    Parameters
    ----------
    manifest : Manifest
        Of the version that is read, also when the file is replaced meanwhile.
    fetch : callable
        Takes chunk numbers in ascending order and returns the chunks, checked, in one round trip.
        It raises a `DicomRedisError` for a chunk that is gone or damaged. It is called in another
        thread too.
    name : str
        The path of the file.
    cache_bytes : int, optional
        How much is kept, in bytes; at least what one read touches.

    Attributes
    ----------
    bytes_fetched, round_trips : int
        What it asked for so far.
    """

    def __init__(
        self, manifest: Manifest, fetch: Fetch, *, name: str, cache_bytes: int = CACHE_BYTES
    ) -> None:
        self.name = name
        self.bytes_fetched = 0
        self.round_trips = 0
        self._manifest = manifest
        self._fetch = fetch
        self._cache_bytes = cache_bytes
        self._kept: OrderedDict[int, Chunk] = OrderedDict()
        self._kept_bytes = 0
        self._coming: _Coming | None = None
        self._position = 0
        self._run_start = 0  # from there to the position, the reads followed one another
        self._lock = threading.RLock()

    def __repr__(self) -> str:
        return f"ChunkReader(name={self.name!r}, size={self.size})"

    @property
    def size(self) -> int:
        """The file's size in bytes."""
        return self._manifest.size

    def readable(self) -> bool:
        self._check_open()
        return True

    def seekable(self) -> bool:
        self._check_open()
        return True

    def tell(self) -> int:
        self._check_open()
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """Set the position and return it; as in `io.BytesIO`, also beyond the end."""
        position = index(offset)
        with self._lock:
            self._check_open()
            if whence == io.SEEK_SET:
                if position < 0:
                    raise ValueError(f"negative seek value {offset} in {self.name}")
            elif whence == io.SEEK_CUR:
                position = max(0, self._position + position)
            elif whence == io.SEEK_END:
                position = max(0, self.size + position)
            else:
                raise ValueError(f"invalid whence ({whence}, should be 0, 1 or 2)")
            if position != self._position:
                self._position = self._run_start = position
            return position

    def read(self, size: int | None = -1, /) -> bytes:
        most = -1 if size is None else index(size)
        with self._lock:
            self._check_open()
            left = max(0, self.size - self._position)
            wanted = left if most < 0 else min(most, left)
            pieces = self._pieces(wanted)
            self._position += wanted
            return bytes(pieces[0]) if len(pieces) == 1 else b"".join(pieces)

    def read1(self, size: int | None = -1, /) -> bytes:
        """Return up to `size` bytes; by default what is left of the chunk at the position."""
        with self._lock:
            return self.read(len(self.peek()) if size is None or index(size) < 0 else size)

    def readline(self, size: int | None = -1, /) -> bytes:
        # IOBase's returns more than `size` where a peek ends, as ours do at the end of a chunk.
        left = self.size if size is None or index(size) < 0 else index(size)
        pieces = []
        with self._lock:
            self._check_open()
            while left > 0 and (ahead := self.peek()[:left]):
                pieces.append(self.read(ahead.find(b"\n") + 1 or len(ahead)))
                left = 0 if pieces[-1].endswith(b"\n") else left - len(ahead)
        return b"".join(pieces)

    def readinto(self, buffer: Any, /) -> int:
        view = memoryview(buffer)
        if view.readonly or not view.c_contiguous:
            raise TypeError("readinto() needs a writable, contiguous buffer")
        with self._lock:
            self._check_open()
            wanted = min(view.nbytes, max(0, self.size - self._position))
            start, filled = self._position, 0
            try:
                while filled < wanted:
                    # In steps: no more than one of them is held beside the caller's buffer.
                    for piece in self._pieces(min(wanted - filled, BATCH_BYTES)):
                        view.cast("B")[filled : filled + len(piece)] = piece
                        filled += len(piece)
                    self._position = start + filled
            except BaseException:
                self._position = start
                raise
            return wanted

    def peek(self, size: int = 0, /) -> bytes:
        """Return what is left of the chunk at the position, at least one byte before the end."""
        with self._lock:
            self._check_open()
            if self._position >= self.size:
                return b""
            number = self._manifest.number_at(self._position)
            end = self._manifest.offset(number) + self._manifest.length(number)
            return bytes(self._pieces(end - self._position)[0])

    def read_spans(self, spans: Sequence[tuple[int, int]]) -> list[bytes]:
        """Return pieces by offset and length; what is not kept comes in one round trip."""
        with self._lock:
            self._check_open()
            at = self._manifest.number_at
            ranges = (range(at(start), at(start + length - 1) + 1) for start, length in spans)
            if missing := self._missing(sorted({number for each in ranges for number in each})):
                self._fetch_now(missing)
            return [self.read(length) for start, length in spans if self.seek(start) >= 0]

    def write(self, _data: Any, /) -> int:
        self._check_open()
        raise io.UnsupportedOperation(f"{self.name} is open for reading; store it with put or load")

    def close(self) -> None:
        """Let go of the chunks; what is being fetched ahead is waited for."""
        with self._lock:
            # The garbage collector may close a reader in the very thread that fetches for it.
            if self._coming is not None and self._coming is not threading.current_thread():
                self._coming.join()
            self._coming = None
            self._kept.clear()
            super().close()

    def _check_open(self) -> None:
        if self.closed:
            raise ValueError(f"I/O operation on closed file {self.name}.")

    def _pieces(self, wanted: int) -> list[memoryview]:
        """Return `wanted` bytes from the position on as slices of chunks."""
        if wanted == 0:
            return []
        manifest, position = self._manifest, self._position
        first, last = manifest.number_at(position), manifest.number_at(position + wanted - 1)
        pieces = []
        for number, chunk in zip(range(first, last + 1), self._chunks(first, last), strict=True):
            start = manifest.offset(number)
            lower, upper = max(position - start, 0), position + wanted - start
            pieces.append(memoryview(chunk)[lower:upper])
        return pieces

    def _chunks(self, first: int, last: int) -> list[Chunk]:
        """Return the chunks from `first` to `last`, fetching those that are not kept."""
        numbers = range(first, last + 1)
        missing = self._missing(numbers)
        coming = self._coming
        if missing and coming and (missing[0] in coming.numbers or not coming.is_alive()):
            self._receive(coming)
            missing = self._missing(numbers)
        if missing:
            self._fetch_now(missing)
        chunks = [self._kept[number] for number in numbers]
        for number in numbers:
            self._kept.move_to_end(number)
        self._fetch_ahead(last)
        while self._kept_bytes > self._cache_bytes and len(self._kept) > 1:
            self._kept_bytes -= len(self._kept.popitem(last=False)[1])
        return chunks

    def _missing(self, numbers: Iterable[int]) -> list[int]:
        return [number for number in numbers if number not in self._kept]

    def _after(self, last: int, size: int) -> range:
        """Return the numbers of the chunks after `last`, of some `size` bytes."""
        count = min(size, self._cache_bytes // 2) // self._manifest.chunk_size
        return range(last + 1, min(last + 1 + min(count, KEYS_PER_COMMAND), self._manifest.count))

    def _fetch_now(self, missing: list[int]) -> None:
        chunk_size = self._manifest.chunk_size
        spare_bytes = max(0, LEAST_FETCH_BYTES - len(missing) * chunk_size)
        spare = self._missing(self._after(missing[-1], spare_bytes))
        if spare:
            # What is wrong with a spare chunk concerns only the read that wants it.
            with contextlib.suppress(DicomRedisError):
                self._keep(missing + spare, self._fetch(self._counted(missing + spare)))
                return
        step = max(1, BATCH_BYTES // chunk_size)
        for first in range(0, len(missing), step):
            batch = missing[first : first + step]
            self._keep(batch, self._fetch(self._counted(batch)))

    def _fetch_ahead(self, last: int) -> None:
        """Start to fetch what a sequential reader wants next, unless that is under way."""
        run = self._position - self._run_start
        if run < SEQUENTIAL_BYTES or self._coming is not None:
            return
        size = min(run, READ_AHEAD_BYTES)
        gap = self._missing(self._after(last, size))
        if gap:
            numbers = self._missing(self._after(gap[0] - 1, size))
            coming = _Coming(self._fetch, self._counted(numbers))
            coming.start()
            self._coming = coming

    def _receive(self, coming: _Coming) -> None:
        coming.join()
        self._coming = None
        if coming.chunks is None:
            self._run_start = self._position  # not again at once
        else:
            self._keep(coming.numbers, coming.chunks)

    def _keep(self, numbers: Sequence[int], chunks: Sequence[Chunk]) -> None:
        for number, chunk in zip(numbers, chunks, strict=True):
            if number not in self._kept:
                self._kept[number] = chunk
                self._kept_bytes += len(chunk)

    def _counted(self, numbers: Sequence[int]) -> Sequence[int]:
        self.round_trips += 1
        self.bytes_fetched += sum(map(self._manifest.length, numbers))
        return numbers


class _Coming(threading.Thread):
    """Chunks that are fetched while the reader is busy with the ones before."""

    def __init__(self, fetch: Fetch, numbers: Sequence[int]) -> None:
        super().__init__(name="ChunkReader")
        self.numbers = numbers
        self.chunks: Sequence[Chunk] | None = None
        self._fetch = fetch

    def run(self) -> None:
        # The read that wants a chunk fetches it again and meets the error itself.
        with contextlib.suppress(Exception):
            self.chunks = self._fetch(self.numbers)
