"""A stored file as a Python file object that fetches only the chunks that a read touches."""

from __future__ import annotations

import contextlib
import io
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
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

Fetch = Callable[[Sequence[int]], Sequence[bytes]]


class ChunkReader(io.BufferedIOBase):
    """A read-only, seekable binary file over the chunks of one version of a stored file.

    The chunks that a read touches are fetched in one round trip, those that are kept excepted.
    While reads follow one another, a thread fetches what comes next, as much as has been read in a
    row. Threads may share a reader, and with it the position: each read is whole.

    A reader can be pickled if `fetch` can: it opens again at the same position.

    Parameters
    ----------
    manifest : Manifest
        Of the version that is read, even if the file is replaced meanwhile.
    fetch : callable
        Takes chunk numbers in ascending order and returns the chunks in one round trip. It checks
        them, and raises a `DicomRedisError` for a chunk that is gone or damaged: what it returns
        is handed out. It is also called in a second thread.
    name : str
        The path of the file.
    cache_bytes : int, optional
        How much is kept (bytes), or one chunk if that is more.
    least_bytes : int, optional
        How much is fetched at a time at least (bytes), where the chunks are small.
    sequential_bytes : int, optional
        How much must have been read in a row before any is fetched ahead (bytes).
    round_trips : int, optional
        How many it took to open the file.
    """

    def __init__(
        self,
        manifest: Manifest,
        fetch: Fetch,
        *,
        name: str,
        cache_bytes: int = CACHE_BYTES,
        least_bytes: int = LEAST_FETCH_BYTES,
        sequential_bytes: int = SEQUENTIAL_BYTES,
        round_trips: int = 0,
    ) -> None:
        self.name = name
        self._options = {
            "cache_bytes": cache_bytes,
            "least_bytes": least_bytes,
            "sequential_bytes": sequential_bytes,
        }
        self._manifest = manifest
        self._fetch = fetch
        self._cache = _Cache(manifest, fetch, **self._options)
        self._opening = round_trips
        self._lines = io.BytesIO()  # whole lines that nobody has read, of one chunk
        self._lines_size = 0
        self._position = 0  # behind these lines
        self._lock = threading.RLock()

    def __repr__(self) -> str:
        return f"ChunkReader(name={self.name!r}, size={self.size})"

    def __reduce__(self) -> tuple[Any, ...]:
        options = {"name": self.name, **self._options}
        return _opened_again, (self._manifest, self._fetch, self.tell(), options)

    @property
    def size(self) -> int:
        """The file's size in bytes."""
        return self._manifest.size

    @property
    def bytes_fetched(self) -> int:
        """How many bytes of chunks have been asked for so far."""
        return self._cache.bytes_fetched

    @property
    def round_trips(self) -> int:
        """How many round trips the file has taken so far."""
        return self._opening + self._cache.round_trips

    def readable(self) -> bool:
        self._check_open()
        return True

    def seekable(self) -> bool:
        self._check_open()
        return True

    def tell(self) -> int:
        with self._lock:
            self._check_open()
            return self._position - self._lines_size + self._lines.tell()

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """Set the position and return it; as in `io.BytesIO`, also beyond the end."""
        position = index(offset)
        with self._lock:
            self._settle()
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
                self._position = self._cache.row_start = position
            return position

    def read(self, size: int | None = -1, /) -> bytes:
        most = -1 if size is None else index(size)
        with self._lock:
            self._settle()
            left = max(0, self.size - self._position)
            wanted = left if most < 0 else min(most, left)
            if wanted > BATCH_BYTES:
                # A BytesIO hands out its bytes without a copy: they are in memory once.
                whole = io.BytesIO(bytes(wanted))
                with whole.getbuffer() as view:
                    self.readinto(view)
                return whole.getvalue()
            pieces = self._pieces(wanted)
            self._position += wanted
            return bytes(pieces[0]) if len(pieces) == 1 else b"".join(pieces)

    def read1(self, size: int | None = -1, /) -> bytes:
        """Return up to `size` bytes; by default what is left of the chunk at the position."""
        with self._lock:
            return self.read(len(self.peek()) if size is None or index(size) < 0 else size)

    def readline(self, size: int | None = -1, /) -> bytes:
        # A lock would take longer than this call, during which no other thread can come between.
        if size == -1 and (line := self._lines.readline()):
            return line
        with self._lock:
            self._settle()
            most = self.size if size is None or index(size) < 0 else index(size)
            with self._back_after_an_error():
                line = b"".join(self._line(min(most, max(0, self.size - self._position))))
            if size == -1:
                self._line_up()
            return line

    def _line(self, most: int) -> Iterator[bytes]:
        """Yield the rest of a line, chunk by chunk, and move on; at most so many bytes."""
        while most:
            number = self._manifest.number_at(self._position)
            (chunk,) = self._cache.chunks(number, number, self._position)
            at = self._position - self._manifest.offset(number)
            newline = chunk.find(b"\n", at, at + most) + 1
            piece = chunk[at : newline or at + most]
            self._position += len(piece)
            most = 0 if newline else most - len(piece)
            yield piece

    def _line_up(self) -> None:
        """Put the whole lines that are left in the chunk at the position into ``_lines``."""
        number = self._manifest.number_at(self._position)
        chunk = self._cache.kept(number)
        lines = chunk[self._position - self._manifest.offset(number) : chunk.rfind(b"\n") + 1]
        self._lines, self._lines_size = io.BytesIO(lines), len(lines)
        self._position += len(lines)

    def _settle(self) -> None:
        """Check that the file is open, and put back the lines that nobody has read."""
        self._check_open()
        if self._lines_size:
            # Emptied first: a thread that has just got hold of them may not hand one out as well.
            self._position -= len(self._lines.read())
            self._lines, self._lines_size = io.BytesIO(), 0

    def readlines(self, hint: int | None = -1, /) -> list[bytes]:
        if hint is None or hint <= 0:
            return io.BytesIO(self.read()).readlines()
        lines: list[bytes] = []
        while hint > 0 and (line := self.readline()):
            lines.append(line)
            hint -= len(line)
        return lines

    def readinto(self, buffer: Any, /) -> int:
        view = memoryview(buffer)
        if view.readonly or not view.c_contiguous:
            raise TypeError("readinto() needs a writable, contiguous buffer")
        with self._lock:
            self._settle()
            wanted = min(view.nbytes, max(0, self.size - self._position))
            start, filled = self._position, 0
            with self._back_after_an_error():
                while filled < wanted:
                    # In steps: no more than one of them is held beside the caller's buffer.
                    for piece in self._pieces(min(wanted - filled, BATCH_BYTES)):
                        view.cast("B")[filled : filled + len(piece)] = piece
                        filled += len(piece)
                    self._position = start + filled
            return wanted

    @contextlib.contextmanager
    def _back_after_an_error(self) -> Iterator[None]:
        position = self._position
        try:
            yield
        except BaseException:
            self._position = position
            raise

    def peek(self, size: int = 0, /) -> bytes:
        """Return what is left of the chunk at the position, at least one byte before the end."""
        with self._lock:
            self._settle()
            if self._position >= self.size:
                return b""
            number = self._manifest.number_at(self._position)
            end = self._manifest.offset(number) + self._manifest.length(number)
            return bytes(self._pieces(end - self._position)[0])

    def read_spans(self, spans: Sequence[tuple[int, int]]) -> list[bytes]:
        """Return pieces by offset and length; what is not kept comes in one round trip."""
        with self._lock:
            self._settle()
            at = self._manifest.number_at
            ranges = (range(at(start), at(start + length - 1) + 1) for start, length in spans)
            self._cache.get_ready(sorted({number for each in ranges for number in each}))
            return [self.read(length) for start, length in spans if self.seek(start) >= 0]

    def write(self, _data: Any, /) -> int:
        self._check_open()
        raise io.UnsupportedOperation(f"{self.name} is open for reading; store it with put or load")

    def close(self) -> None:
        """Let go of the chunks; what is being fetched ahead is waited for."""
        with self._lock:
            self._lines.read()
            self._cache.close()
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
        chunks = self._cache.chunks(first, last, position)
        pieces = []
        for number, chunk in zip(range(first, last + 1), chunks, strict=True):
            start = manifest.offset(number)
            lower, upper = max(position - start, 0), position + wanted - start
            pieces.append(memoryview(chunk)[lower:upper])
        return pieces


def _opened_again(
    manifest: Manifest, fetch: Fetch, position: int, options: dict[str, Any]
) -> ChunkReader:
    """Return a reader that was pickled."""
    reader = ChunkReader(manifest, fetch, **options)
    reader.seek(position)
    return reader


class _Cache:
    """The chunks that a reader keeps, and those that it fetches and fetches ahead."""

    def __init__(
        self,
        manifest: Manifest,
        fetch: Fetch,
        *,
        cache_bytes: int,
        least_bytes: int,
        sequential_bytes: int,
    ) -> None:
        self.bytes_fetched = self.round_trips = 0
        self.row_start = 0  # from there to the position, the reads followed one another
        self._manifest = manifest
        self._fetch = fetch
        self._cache_bytes = cache_bytes
        self._least_bytes = least_bytes
        self._sequential_bytes = sequential_bytes
        self._kept: OrderedDict[int, bytes] = OrderedDict()
        self._kept_bytes = 0
        self._ahead: _FetchAhead | None = None

    def close(self) -> None:
        """Let go of the chunks; what is being fetched ahead is waited for."""
        # The garbage collector may close a reader in the very thread that fetches for it.
        if self._ahead is not None and self._ahead is not threading.current_thread():
            self._ahead.join()
        self._ahead = None
        self._kept.clear()

    def get_ready(self, numbers: Sequence[int]) -> None:
        """Fetch those of the chunks `numbers`, in ascending order, that are not kept."""
        if missing := self._missing(numbers):
            self._fetch_now(missing)

    def kept(self, number: int) -> bytes:
        """Return a chunk that is kept, or nothing."""
        return self._kept.get(number, b"")

    def chunks(self, first: int, last: int, position: int) -> list[bytes]:
        """Return the chunks from `first` to `last`, fetching those that are not kept.

        `position` is where the reader is.
        """
        numbers = range(first, last + 1)
        missing = self._missing(numbers)
        ahead = self._ahead
        if missing and ahead and (missing[0] in ahead.numbers or not ahead.is_alive()):
            self._receive(ahead, position)
            missing = self._missing(numbers)
        self.get_ready(missing)
        chunks = [self._kept[number] for number in numbers]
        for number in numbers:
            self._kept.move_to_end(number)
        self._fetch_ahead(last, position - self.row_start)
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
        spare_bytes = max(0, self._least_bytes - len(missing) * chunk_size)
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

    def _fetch_ahead(self, last: int, row: int) -> None:
        """Start to fetch what comes after so many bytes in a row, unless that is under way."""
        if row < self._sequential_bytes or self._ahead is not None:
            return
        size = min(row, READ_AHEAD_BYTES)
        gap = self._missing(self._after(last, size))
        if gap:
            numbers = self._missing(self._after(gap[0] - 1, size))
            ahead = _FetchAhead(self._fetch, self._counted(numbers))
            ahead.start()
            self._ahead = ahead

    def _receive(self, ahead: _FetchAhead, position: int) -> None:
        ahead.join()
        self._ahead = None
        if ahead.chunks is None:
            self.row_start = position  # not again at once
        else:
            self._keep(ahead.numbers, ahead.chunks)

    def _keep(self, numbers: Sequence[int], chunks: Sequence[bytes]) -> None:
        for number, chunk in zip(numbers, chunks, strict=True):
            if number not in self._kept:
                self._kept[number] = chunk
                self._kept_bytes += len(chunk)

    def _counted(self, numbers: Sequence[int]) -> Sequence[int]:
        self.round_trips += 1
        self.bytes_fetched += sum(map(self._manifest.length, numbers))
        return numbers


class _FetchAhead(threading.Thread):
    """Chunks that are fetched while the reader is busy with the ones before."""

    def __init__(self, fetch: Fetch, numbers: Sequence[int]) -> None:
        super().__init__(name="ChunkReader")
        self.numbers = numbers
        self.chunks: Sequence[bytes] | None = None
        self._fetch = fetch

    def run(self) -> None:
        # The read that wants a chunk fetches it again and meets the error itself.
        with contextlib.suppress(Exception):
            self.chunks = self._fetch(self.numbers)
