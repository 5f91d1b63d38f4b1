"""Files out: each in one version, with as few round trips as there can be."""

from __future__ import annotations

import contextlib
import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, TypeVar, cast

from dicomstore.blobs.chunks import Chunks, Mend, check
from dicomstore.blobs.manifest import (
    BATCH_BYTES,
    MANIFEST_MEMBERS,
    STORAGE_MEMBERS,
    Document,
    Manifest,
    parse_document,
    parse_manifest,
)
from dicomstore.blobs.reader import CACHE_BYTES, ChunkReader
from dicomstore.blobs.versions import Versions, is_foreign
from dicomstore.errors import (
    DamagedError,
    MissingChunkError,
)
from dicomstore.keys import likely_key, path_of, shown_path
from dicomstore.naming import Naming
from dicomstore.server.connection import Server
from dicomstore.tier import Mender, Tier

Result = TypeVar("Result")

#: How often a read starts over when the file is replaced or evicted under it.
ATTEMPTS = 20
#: So many manifests are remembered, some 300 bytes each.
REMEMBERED = 20_000


class Reading:
    """Reads stored files.

    Parameters
    ----------
    server : Server
    chunks : Chunks
    versions : Versions
    tier : Tier
        Mends what is missing, where it has a source.
    naming : Naming
    """

    def __init__(
        self,
        server: Server,
        chunks: Chunks,
        versions: Versions,
        tier: Tier,
        naming: Naming,
    ) -> None:
        self._server = server
        self._chunks = chunks
        self._versions = versions
        self._tier = tier
        self._naming = naming
        self._remembered = _Remembered()

    def manifest(self, name: str) -> Manifest:
        """Return the manifest of the stored version."""
        return parse_manifest(*self._naming.members(name, MANIFEST_MEMBERS, self._tier.mender()))

    def remember(self, found: Iterable[tuple[str, Mapping[str, Any]]]) -> None:
        """Remember where files lie that a search has found: reading one takes one round trip."""
        for key, members in found:
            with contextlib.suppress(DamagedError):  # whoever reads it is told
                self._remembered.put(parse_manifest(key, members))

    # --- whole files ---

    def read(self, name: str) -> bytes:
        """Return a file's bytes."""
        if (known := self._read_remembered(name)) is not None:
            return known
        return self._mending(name, self._chunks.read)[1]

    def _read_remembered(self, name: str) -> bytes | None:
        """Return a small file's bytes in one round trip, or None if that is not possible."""
        key = likely_key(name)
        manifest = self._remembered.get(key)
        if manifest is None or manifest.size > BATCH_BYTES:
            return None
        try:
            chunks = self.some(manifest, range(manifest.count))
        except (MissingChunkError, DamagedError):
            self._remembered.forget(key)
            return None  # the long way reads the new version, or mends, or says what is wrong
        self._tier.finished(manifest, hit=True)
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    def read_into(self, name: str, into: Any) -> memoryview:
        """Fill a buffer with a file; return the part of it that is filled."""

        def fill(document: Document, mend: Mend | None) -> memoryview:
            view, size = memoryview(into).cast("B"), document.manifest.size
            if len(view) < size:
                raise ValueError(f"The buffer has {len(view)} bytes, {document.key} {size}.")
            self._chunks.read_into(document, view[:size], mend)
            return view[:size]

        return self._mending(name, fill)[1]

    def _mending(
        self, name: str, read: Callable[[Document, Mend | None], Result]
    ) -> tuple[str, Result]:
        """Read a whole file; what Redis has lost comes from the source, where there is one."""
        mender = self._tier.mender()
        manifest, result = self.consistently(
            name, lambda document: (document.manifest, read(document, mender)), mender
        )
        self._tier.finished(manifest, hit=mender is None or not mender.was_needed)
        return manifest.key, result

    def read_each(self, names: Sequence[str]) -> Iterator[tuple[str, bytes]]:
        """Yield key and bytes of files, in order: many documents and chunks in each request."""
        for group in self._naming.stored(names, STORAGE_MEMBERS):
            ready: list[Document] = []
            for name, _, found in group:
                if found is None or isinstance(found, Exception) or found.document is None:
                    yield from self._chunks_of(ready)
                    ready = []
                    yield self._mending(name, self._chunks.read)
                else:
                    ready.append(found.document)
            yield from self._chunks_of(ready)

    def _chunks_of(self, documents: Sequence[Document]) -> Iterator[tuple[str, bytes]]:
        """Yield whole files; one that is replaced or cannot be mended is read by itself."""
        done = 0
        while done < len(documents):
            mender = self._tier.mender()
            try:
                for document, content in self._chunks.read_each(documents[done:], mender):
                    done += 1
                    self._remembered.put(document.manifest)
                    hit = mender is None or not mender.was_needed
                    self._tier.finished(document.manifest, hit=hit)
                    if mender is not None:
                        mender.was_needed = False
                    yield document.key, content
            except (MissingChunkError, DamagedError):
                done += 1
                yield self._mending(documents[done - 1].key, self._chunks.read)

    def consistently(
        self, name: str, action: Callable[[Document], Result], mender: Mender | None = None
    ) -> Result:
        """Return what `action` makes of one version of a file; start over if it is replaced."""
        for _ in range(ATTEMPTS):
            key, members = self._naming.members(name, STORAGE_MEMBERS, mender)
            document = parse_document(key, members)
            try:
                result = action(document)
            except (MissingChunkError, DamagedError):
                if self._versions.is_current(document.manifest):
                    raise
                continue
            self._remembered.put(document.manifest)
            return result
        raise MissingChunkError(
            f"{shown_path(name)} is replaced or evicted faster than it can be read."
        )

    # --- parts of files ---

    def open(self, name: str, cache_bytes: int = CACHE_BYTES) -> ChunkReader:
        """Open a file for reading."""
        manifest = self.manifest(name)
        # The document's; an imageName was looked for as a path and by a search before.
        trips = 1 if name in (manifest.key, path_of(manifest.key)) else 3
        return self._opened(manifest, cache_bytes=cache_bytes, round_trips=trips)

    def _opened(self, manifest: Manifest, **options: int) -> ChunkReader:
        fetch = _Fetch(self, manifest)
        return ChunkReader(manifest, fetch, name=path_of(manifest.key), **options)

    def some(
        self, manifest: Manifest, numbers: Sequence[int], mend: Mend | None = None
    ) -> list[bytes]:
        """Return chunks of one version, checked, in one round trip; lost ones come from `mend`.

        Raises
        ------
        MissingChunkError, DamagedError
            If a chunk is gone or damaged, or the file was replaced.
        """
        runs = [f"$.crc[{first}:{last + 1}]" for first, last in _runs(numbers)]
        commands = self._server.for_keys("MGET", manifest.chunk_keys(numbers))
        # In this order: a document that is still the same had all its chunks just before.
        commands.append(("JSON.GET", manifest.key, "$.version", *runs))
        *groups, reply = self._server.replies(commands)
        if isinstance(reply, Exception):
            if not is_foreign(reply):
                raise reply
            raise DamagedError(f"{manifest.key} cannot be read: {reply}") from reply
        found = json.loads(reply or "{}")
        if found.get("$.version") != [manifest.version]:
            raise MissingChunkError(
                f"{manifest.key} was replaced or deleted since it was opened. Open it again."
            )
        crcs = [crc for run in runs for crc in found[run]]
        if len(crcs) != len(numbers):
            raise DamagedError(f"The document {manifest.key} is damaged: CRCs are missing.")
        chunks: list[bytes | None] = []
        for group in groups:
            if isinstance(group, Exception):
                raise group
            chunks += group
        return check(manifest, numbers, chunks, crcs, mend)

    def is_current(self, manifest: Manifest) -> bool:
        """Whether this is still the stored version."""
        return self._versions.is_current(manifest)

    def spans(self, manifest: Manifest, spans: Sequence[tuple[int, int]]) -> list[bytes]:
        """Return pieces of one version of a file, given offset and length, a batch a round trip."""
        touched = [
            range(manifest.number_at(offset), manifest.number_at(offset + max(length, 1) - 1) + 1)
            for offset, length in spans
        ]
        numbers = sorted({number for each in touched for number in each})
        step = max(1, BATCH_BYTES // manifest.chunk_size)
        chunks: dict[int, bytes] = {}
        for first in range(0, len(numbers), step):
            batch = numbers[first : first + step]
            chunks |= zip(batch, self.some_mended(manifest, batch), strict=True)
        pieces = []
        for (offset, length), own in zip(spans, touched, strict=True):
            begin = offset - manifest.offset(own[0])
            whole = chunks[own[0]] if len(own) == 1 else b"".join(chunks[n] for n in own)
            pieces.append(whole[begin : begin + length])
        return pieces

    def attachment(
        self, manifest: Manifest, name: str, crc: Any, make: Callable[[BinaryIO], bytes | None]
    ) -> bytes:
        """Return what lies beside the chunks of a version.

        What is gone or damaged is made again from the file, where there is a source.

        Parameters
        ----------
        manifest : Manifest
        name : str
            One of ``ATTACHMENTS``.
        crc : int
            As the document has it.
        make : callable
            Makes it of the open file; None if it cannot be made.

        Raises
        ------
        MissingChunkError, DamagedError
            If it is gone or damaged, and cannot be made again.
        """
        with contextlib.suppress(MissingChunkError, DamagedError):
            return self._chunks.attachment(manifest, name, crc)
        with self._tier.one_at_a_time(manifest.attachment_key(name)):
            try:
                return self._chunks.attachment(manifest, name, crc)
            except (MissingChunkError, DamagedError):
                if not self._tier.has_source or not isinstance(crc, int):
                    raise
                with self._tier.fetching(), self._opened(manifest) as file:
                    text = make(cast(BinaryIO, file))
                if text is None:
                    raise
            self._versions.attach_again(manifest, name, text)
            return text

    def mender(self) -> Mender | None:
        """Return what fetches for one read what Redis has lost; None without a source."""
        return self._tier.mender()

    def some_mended(self, manifest: Manifest, numbers: Sequence[int]) -> list[bytes]:
        """As `some`; what Redis has lost comes from the source, where there is one."""
        return self.some(manifest, numbers, self._tier.mender())


class _Fetch:
    """Fetches chunks for a reader; can be pickled with it."""

    def __init__(self, reading: Reading, manifest: Manifest) -> None:
        self._reading = reading
        self._manifest = manifest

    def __call__(self, numbers: Sequence[int]) -> list[bytes]:
        return self._reading.some_mended(self._manifest, numbers)


class _Remembered:
    """The manifests of files that were read or found, the latest of them."""

    def __init__(self) -> None:
        self._manifests: OrderedDict[str, Manifest] = OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[_Remembered], tuple[()]]:
        return _Remembered, ()

    def get(self, key: str) -> Manifest | None:
        return self._manifests.get(key)

    def put(self, manifest: Manifest) -> None:
        with self._lock:
            self._manifests[manifest.key] = manifest
            self._manifests.move_to_end(manifest.key)
            if len(self._manifests) > REMEMBERED:
                self._manifests.popitem(last=False)

    def forget(self, key: str) -> None:
        with self._lock:
            self._manifests.pop(key, None)


def _runs(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield the first and the last of each run of consecutive numbers."""
    first = last = numbers[0]
    for number in numbers[1:]:
        if number != last + 1:
            yield first, last
            first = number
        last = number
    yield first, last
