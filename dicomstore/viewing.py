"""Headers, frames and volumes out: only what they need is fetched."""

from __future__ import annotations

import io
import itertools
import os
import threading
from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset, dcmread

from dicomstore.blobs.chunks import Chunks
from dicomstore.blobs.manifest import (
    MANIFEST_MEMBERS,
    STORAGE_MEMBERS,
    Document,
    Manifest,
    parse_document,
    parse_manifest,
)
from dicomstore.blobs.versions import Versions
from dicomstore.errors import (
    DamagedError,
    MissingChunkError,
    NotDicomError,
)
from dicomstore.imaging.frames import OPTIONS, Frames
from dicomstore.imaging.header import dataset_start, read
from dicomstore.imaging.locating import is_sound, locate
from dicomstore.imaging.metadata import compressed_json
from dicomstore.imaging.volume import Instance, Plan, Slice, Volume, needs_dataset, plan_volumes
from dicomstore.keys import likely_key, path_of, shown_path
from dicomstore.naming import Naming
from dicomstore.reading import Reading

#: What has to be known of an instance before a frame of it can be fetched and decoded.
FRAME_MEMBERS = (
    *MANIFEST_MEMBERS,
    "frames",
    "attachments.frames",
    "transferSyntaxUID",
    *(f"header.{keyword}" for keyword in OPTIONS),
)
#: So many instances are remembered, with where their frames lie.
REMEMBERED = 256
#: How often a frame is read again when its instance is replaced meanwhile.
ATTEMPTS = 20


#: What has to be known of an instance before its frames can be slices of a volume.
VOLUME_MEMBERS = (
    *STORAGE_MEMBERS, "frames", "attachments.frames", "transferSyntaxUID", "header",
)  # fmt: skip


class _Stored(NamedTuple):
    """An instance, and where its frames lie."""

    document: Document
    frames: Frames


class Viewing:
    """Fetches headers and frames, and makes volumes of frames.

    Parameters
    ----------
    chunks : Chunks
    versions : Versions
    naming : Naming
    reading : Reading
    """

    def __init__(
        self, chunks: Chunks, versions: Versions, naming: Naming, reading: Reading
    ) -> None:
        self._chunks = chunks
        self._versions = versions
        self._naming = naming
        self._reading = reading
        self._known: OrderedDict[str, tuple[Manifest, Frames]] = OrderedDict()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_known": OrderedDict(), "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def header(self, name: str) -> Dataset:
        """Return the data set of a DICOM file up to its pixels."""
        with self._reading.open(name) as file:
            start = dataset_start(cast(BinaryIO, file))
            if start is None:
                raise NotDicomError(f"{file.name} is not a DICOM file and has no header.")
            source: Any = file
            if start == 1:  # after a stray byte; pydicom would begin before it
                file.seek(start)
                source = io.BytesIO(file.read())
            source.seek(0)
            return dcmread(source, stop_before_pixels=True, force=True)

    def dicom_json(self, key: str) -> bytes | None:
        """Return the data set as DICOM JSON, compressed; None if the file has none.

        Parameters
        ----------
        key : str
            Of the document.

        Raises
        ------
        MissingChunkError, DamagedError
            If it is gone or damaged, and cannot be made again.
        """

        def read(document: Document) -> bytes | None:
            crc = document.attachments.get("json")
            if crc is None:
                return None
            return self._reading.attachment(document.manifest, "json", crc, _dicom_json)

        return self._reading.consistently(key, read, self._reading.mender())

    def frames_of(self, name: str) -> Frames:
        """Return where the frames of an instance lie; a table that is gone is made again."""
        manifest, members = self._members(name)
        return self._frames(manifest, members, _options(members))

    def frame_bytes(self, name: str, numbers: Sequence[int]) -> list[bytes]:
        """Return frames as they are stored."""
        return self._fetched(name, numbers)[1]

    def frames(self, name: str, numbers: Sequence[int]) -> list[NDArray[Any]]:
        """Return frames decoded."""
        frames, stored = self._fetched(name, numbers)
        return [frames.decode(k, one) for k, one in zip(numbers, stored, strict=True)]

    def _fetched(self, name: str, numbers: Sequence[int]) -> tuple[Frames, list[bytes]]:
        # By key: what an imageName means can change while the file that it meant stays.
        key = likely_key(name)
        for _ in range(ATTEMPTS):
            with self._lock:
                known = self._known.pop(key, None)
            manifest, members = (known[0], {}) if known else self._members(name)
            try:
                frames = known[1] if known else self._frames(manifest, members, _options(members))
                spans = [frames.span(k) for k in numbers]
                fetched = self._reading.spans(manifest, spans)
            except (MissingChunkError, DamagedError):
                # A remembered version may have been replaced: one that was looked up just now not.
                if known is None and self._reading.is_current(manifest):
                    raise
                continue
            with self._lock:
                self._known[manifest.key] = manifest, frames
                if len(self._known) > REMEMBERED:
                    self._known.popitem(last=False)
            return frames, [frames.stored(k, one) for k, one in zip(numbers, fetched, strict=True)]
        raise MissingChunkError(f"{shown_path(name)} is replaced faster than it can be read.")

    def _members(self, name: str) -> tuple[Manifest, dict[str, Any]]:
        """Return an instance's manifest, and what its document says of its frames."""
        key, members = self._naming.members(name, FRAME_MEMBERS, self._reading.mender())
        return parse_manifest(key, members), members

    def _frames(
        self, manifest: Manifest, members: Mapping[str, Any], attributes: Mapping[str, Any]
    ) -> Frames:
        """Return where the frames of a version lie."""
        where, syntax, table = members.get("frames"), members.get("transferSyntaxUID"), None
        sound = isinstance(attributes, dict) and isinstance(syntax, str | None)
        if not sound or not is_sound(where, manifest.size):
            raise DamagedError(
                f"The document {shown_path(manifest.key)} is damaged: its frames, header and "
                "transferSyntaxUID cannot be used. Delete the file and load it again."
            )
        if Frames.needs_table(where):
            crc = members.get("attachments.frames")
            count = where["count"]  # type: ignore[index]  # it is sound
            known = {"header": {**attributes, "NumberOfFrames": count}}

            def make(file: BinaryIO) -> bytes | None:
                return locate(file, known)[1]

            table = self._reading.attachment(manifest, "frames", crc, make)
        path = shown_path(path_of(manifest.key))
        return Frames(path, where, attributes, syntax, table)

    # --- volumes ---

    def volumes(self, keys: Sequence[str], *, split: bool) -> list[Volume]:
        """Return what the instances at `keys` show, each volume as one array."""
        quickly = True
        for _ in range(ATTEMPTS):
            stored: list[_Stored] = []
            try:
                stored = self._instances(keys)
                plans = plan_volumes(map(self._instance, stored), split=split)
                of_path = {one.frames.name: one for one in stored}
                return [self._assembled(plan, of_path, quickly=quickly) for plan in plans]
            except (MissingChunkError, DamagedError):
                if not quickly and all(
                    self._reading.is_current(s.document.manifest) for s in stored
                ):
                    raise
                quickly = False  # frame by frame: lost chunks come from the source, if there is one
        raise MissingChunkError("The instances are replaced faster than they can be read.")

    def _instances(self, keys: Sequence[str]) -> list[_Stored]:
        found = self._versions.stored(keys, VOLUME_MEMBERS)
        stored = []
        members: Mapping[str, Any]
        for key, one in zip(keys, found, strict=True):
            if isinstance(one, Exception):
                raise one
            if one is None or one.document is None:  # evicted, or damaged since it was found
                key, members = self._naming.members(key, VOLUME_MEMBERS, self._reading.mender())
                document = parse_document(key, members)
            else:
                document, members = one.document, one.members
            frames = self._frames(document.manifest, members, members.get("header", {}))
            stored.append(_Stored(document, frames))
        return stored

    def _instance(self, stored: _Stored) -> Instance:
        attributes: Any = stored.frames.attributes
        if needs_dataset(attributes):
            attributes = self.header(stored.document.key)
        return Instance(stored.frames.name, attributes, stored.frames.syntax)

    def _assembled(self, plan: Plan, of_path: Mapping[str, _Stored], *, quickly: bool) -> Volume:
        """Fetch the slices of one volume, and put them into its array."""
        array = plan.empty()
        native: dict[str, list[_Place]] = {}
        coded: list[tuple[int, Slice]] = []
        for n, one in enumerate(plan.slices):
            frames = of_path[one.path].frames
            span = frames.span(one.frame)
            fits = span.length == array[n].size * one.stored.itemsize
            if quickly and fits and "start" in (frames.member or {}):
                native.setdefault(one.path, []).append(_Place(n, span.offset, span.length))
            else:
                coded.append((n, one))
        if native:
            files = [of_path[path].document for path in native]
            self._chunks.copy_all(files, _Scatter(plan, array, files, list(native.values())))
        if coded:
            with ThreadPoolExecutor(os.cpu_count()) as pool:

                def put(numbered: tuple[int, Slice]) -> None:
                    n, one = numbered
                    document, frames = of_path[one.path]
                    (fetched,) = self._reading.spans(document.manifest, [frames.span(one.frame)])
                    stored = frames.stored(one.frame, fetched)
                    plan.put(array, n, frames.decode(one.frame, stored))

                list(pool.map(put, coded))
        return plan.volume(array)


def _dicom_json(file: BinaryIO) -> bytes | None:
    """Return a file's data set as DICOM JSON, compressed; None if it cannot be made."""
    elements = read(file)
    return elements and compressed_json(elements)


def _options(members: Mapping[str, Any]) -> dict[str, Any]:
    """Return the attributes that decoding needs, of what a document says."""
    found = {keyword: members.get(f"header.{keyword}") for keyword in OPTIONS}
    return {keyword: value for keyword, value in found.items() if value is not None}


class _Place(NamedTuple):
    """Where the bytes of slice `n` lie in its file."""

    n: int
    offset: int
    length: int


class _Scatter:
    """Takes the bytes of files one after the other; puts those of slices into an array."""

    def __init__(
        self,
        plan: Plan,
        array: NDArray[Any],
        documents: Sequence[Document],
        places: Sequence[list[_Place]],
    ) -> None:
        self._plan = plan
        self._array = array
        starts = itertools.accumulate((d.manifest.size for d in documents), initial=0)
        self._places = deque(
            _Place(place.n, start + place.offset, place.length)
            for start, of_file in zip(starts, places, strict=False)
            for place in sorted(of_file, key=lambda place: place.offset)
        )
        self._position = 0
        self._room: NDArray[Any] | None = None

    def __call__(self, piece: Any) -> None:
        data = np.frombuffer(piece, np.uint8)
        end = self._position + len(data)
        while self._places and self._places[0].offset < end:
            place = self._places[0]
            if self._room is None:
                self._room = self._plan.room(self._array, place.n)
            target = self._room.reshape(-1).view(np.uint8)
            first = max(place.offset, self._position)
            last = min(place.offset + place.length, end)
            target[first - place.offset : last - place.offset] = data[
                first - self._position : last - self._position
            ]
            if last < place.offset + place.length:
                break
            self._plan.put_native(self._array, place.n, self._room)
            self._places.popleft()
            self._room = None
        self._position = end
