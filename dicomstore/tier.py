"""Redis as a hot tier in front of a source: what Redis has lost is fetched from there again."""

from __future__ import annotations

import contextlib
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from dicomstore.blobs.chunks import Chunks, is_sound
from dicomstore.blobs.manifest import Manifest
from dicomstore.blobs.versions import Versions
from dicomstore.errors import DifferentImageError, MissingChunkError, NotDicomError, ServerError
from dicomstore.keys import path_of, shown_path
from dicomstore.loading import Load, Loader
from dicomstore.source import Source


class Tier:
    """Fetches lost chunks and files from a source, and keeps what is read alive.

    Parameters
    ----------
    chunks : Chunks
    versions : Versions
    loader : Loader
    source : path or URL, optional
        Where the files were loaded from.
    renew : bool
        Whether a file that is read with less than half of its time to live gets the whole again.
    """

    def __init__(
        self,
        chunks: Chunks,
        versions: Versions,
        loader: Loader,
        source: str | os.PathLike[str] | None,
        *,
        renew: bool,
    ) -> None:
        self._source = None if source is None else Source(source)
        self._chunks = chunks
        self._versions = versions
        self._loader = loader
        self._renew = renew
        #: Called with the key of a file that a read had to fetch.
        self.on_miss: Callable[[str], None] | None = None
        self._reads: Counter[bool] = Counter()
        self._lock = threading.Lock()
        self._fetching = 0
        self._gaps: dict[str, tuple[threading.Lock, list[None]]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_lock": None, "_gaps": {}, "_fetching": 0}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    @property
    def has_source(self) -> bool:
        """Whether there is a place that lost chunks come from."""
        return self._source is not None

    def has(self, key: str) -> bool:
        """Whether the source has the file of a document."""
        return self._source is not None and self._source.has(key)

    @property
    def hits(self) -> int:
        """How many reads found the whole file in Redis."""
        return self._reads[True]

    @property
    def misses(self) -> int:
        """How many reads needed the source."""
        return self._reads[False]

    def finished(self, manifest: Manifest, *, hit: bool) -> None:
        """Count a read of a whole file, and renew its time to live where that is wanted."""
        with self._lock:
            self._reads[hit] += 1
        if self._renew:
            self._chunks.keep(manifest, below=0.5)

    @property
    def is_fetching(self) -> bool:
        """Whether a read waits for the source."""
        return self._fetching > 0

    @contextlib.contextmanager
    def fetching(self) -> Iterator[None]:
        """Say for the ``with`` block that a read waits for the source."""
        with self._lock:
            self._fetching += 1
        try:
            yield
        finally:
            with self._lock:
                self._fetching -= 1

    def mender(self) -> Mender | None:
        """Return what fetches lost chunks for one read; None without a source."""
        return None if self._source is None else Mender(self)

    def mend(self, manifest: Manifest, crcs: Mapping[int, int]) -> dict[int, bytes]:
        """Fetch lost chunks from the source and put them back; many readers at once fetch once.

        Parameters
        ----------
        manifest : Manifest
        crcs : mapping
            The numbers of the chunks, at most a batch of them, and their CRC-32.

        Returns
        -------
        dict of int to bytes

        Raises
        ------
        MissingChunkError
            If the source has no such file, or a different one, or the file was replaced.
        """
        with self.one_at_a_time(manifest.key):
            numbers = list(crcs)
            there = zip(numbers, self._chunks.fetch(manifest, numbers), strict=True)
            found = {
                number: chunk
                for number, chunk in there
                if chunk is not None and is_sound(manifest, number, chunk, crcs[number])
            }
            gone = [number for number in numbers if number not in found]
            if not gone:
                return found
            fetched = self._fetch(manifest, gone)
            changed = [n for n in gone if not is_sound(manifest, n, fetched[n], crcs[n])]
            if changed:
                self._load(manifest.key)
                raise MissingChunkError(
                    f"{manifest.key} has changed in the source and is loaded anew. Open it again."
                )
            if not self._versions.put_back(manifest, fetched):
                raise MissingChunkError(
                    f"{manifest.key} was replaced or deleted since it was opened. Open it again."
                )
            return found | fetched

    def load_evicted(self, key: str) -> bool:
        """Load the file of a document that is gone from the source; return whether it is there.

        Raises
        ------
        MissingChunkError
            If the source has it, and it cannot be loaded now: it changes meanwhile, as an example.
        """
        if self._source is None:
            return False
        with self.one_at_a_time(key):
            if self._versions.members(key, ("version",)) is not None:
                return True
            try:
                self._load(key)
            except MissingChunkError as error:
                if self.has(key) and not isinstance(error.__cause__, NotDicomError):
                    raise
                return False
            return True

    def _fetch(self, manifest: Manifest, numbers: list[int]) -> dict[int, bytes]:
        assert self._source is not None
        ranges = [(manifest.offset(number), manifest.length(number)) for number in numbers]
        try:
            pieces = self._source.ranges(manifest.key, ranges)
        except OSError as error:
            chunk = manifest.chunk_key(numbers[0])
            raise MissingChunkError(
                f"The chunk {chunk} is gone or damaged, and the source cannot help: "
                f"{error.strerror or error}.",
                (chunk,),
            ) from error
        return dict(zip(numbers, pieces, strict=True))

    def _load(self, key: str) -> None:
        """Load a whole file from the source."""
        assert self._source is not None
        try:
            with self._source.file(key) as file:
                self._loader.load([Load(path_of(key), file, strict=True)], at_once=True)
        except ServerError:
            raise
        except (OSError, NotDicomError, DifferentImageError) as error:
            why = getattr(error, "strerror", None) or str(error)
            raise MissingChunkError(
                f"{shown_path(key)} is gone, and the source cannot help: {why}."
            ) from error

    @contextlib.contextmanager
    def one_at_a_time(self, key: str) -> Iterator[None]:
        """Let only one thread at a time bring back what is missing at `key`."""
        with self._lock:
            gap, waiting = self._gaps.setdefault(key, (threading.Lock(), []))
            waiting.append(None)
        try:
            with gap:
                yield
        finally:
            with self._lock:
                waiting.pop()
                if not waiting:
                    self._gaps.pop(key, None)


class Mender:
    """Fetches for one read what Redis has lost, and remembers whether it had to."""

    def __init__(self, tier: Tier) -> None:
        self._tier = tier
        self.was_needed = False

    def __call__(self, manifest: Manifest, crcs: Mapping[int, int]) -> dict[int, bytes]:
        with self._tier.fetching():
            found = self._tier.mend(manifest, crcs)
        self._missed(manifest.key)
        return found

    def load(self, key: str) -> bool:
        """Load the file of a document that is gone; return whether it is there."""
        with self._tier.fetching():
            is_there = self._tier.load_evicted(key)
        if is_there:
            self._missed(key)
        return is_there

    def _missed(self, key: str) -> None:
        self.was_needed = True
        if self._tier.on_miss is not None:
            self._tier.on_miss(key)
