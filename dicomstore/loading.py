"""Files in: walk a folder, describe what is new, send it and commit it; a row of a report each."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import stat
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from blake3 import blake3
from tqdm import tqdm

from dicomstore.blobs.chunks import Chunks
from dicomstore.blobs.manifest import (
    BATCH_BYTES,
    DEFAULT_CHUNK_SIZE,
    STORAGE_MEMBERS,
    Document,
    Manifest,
)
from dicomstore.blobs.versions import Stored, Versions, Write
from dicomstore.blobs.wire import crc32
from dicomstore.errors import DamagedError, DifferentImageError, NotDicomError, ServerError
from dicomstore.imaging.describing import Description, describe_all
from dicomstore.keys import document_key, shown_path
from dicomstore.server.nodes import Command

CHANGED = "changed while it was read; load it again"
PARTIAL_HEADER = "its header could be read only in part"
NO_THUMBNAIL = "its pixels take too much time or memory to decode: similar() does not find it"
#: So many documents are looked up together, to see which files are stored already.
LOOK_UP = 32
#: Small files are sent and committed together: so many, or of so many bytes.
TOGETHER = 32
TOGETHER_BYTES = 4 * 1024 * 1024
#: What has to be known of a stored file before it is loaded again.
STORED_MEMBERS = (
    *STORAGE_MEMBERS, "sopInstanceUID", "vendor", "rows", "headerPartial", "thumbnail",
)  # fmt: skip


class Load:
    """One file to be loaded, and its row of the report.

    Parameters
    ----------
    path : str
        Its path in the store.
    content : Path or bytes
        The file, or what it would hold.
    problem : str, optional
        Why it cannot be loaded.
    strict : bool, optional
        Whether errors are raised instead of reported.
    """

    def __init__(
        self, path: str, content: Path | bytes, problem: str = "", *, strict: bool = False
    ) -> None:
        self._reported = () if strict else (OSError, NotDicomError, DamagedError)
        self.path = path
        self.key = document_key(path)
        self.content = content
        self.modified: int | None = None
        self.row: dict[str, Any] = {
            "path": shown_path(path),
            "key": "",
            "size": 0,
            "chunks": 0,
            "status": "skipped",
            "reason": problem,
        }

    def size(self) -> int:
        """Return its size in bytes, 0 if it cannot be known."""
        if isinstance(self.content, bytes):
            return len(self.content)
        with contextlib.suppress(OSError):
            return self.content.stat().st_size
        return 0

    @contextlib.contextmanager
    def opened(self) -> Iterator[BinaryIO]:
        """Open the file, and note its size and when it was modified last.

        What fits into a batch is read at once, and cannot change after that.
        """
        if isinstance(self.content, bytes):
            self.row["size"] = len(self.content)
            yield io.BytesIO(self.content)
            return
        with open(self.content, "rb", buffering=0) as file:
            self.row["size"] = os.fstat(file.fileno()).st_size
            content = file.read() if self.row["size"] <= BATCH_BYTES else None
            self.modified = _modified(file)
            if content is None:
                yield file
            else:
                self.row["size"] = len(content)
                yield io.BytesIO(content)

    @contextlib.contextmanager
    def reporting(self) -> Iterator[None]:
        """Note an error as the reason why the file is skipped, unless the server made it."""
        try:
            yield
        except ServerError:
            raise
        except self._reported as error:
            self.row["reason"] = getattr(error, "strerror", None) or str(error)

    def succeeded(self, status: str, chunks: int, reasons: Sequence[str] = ()) -> None:
        """Note that the file is stored."""
        self.row |= {"key": self.key, "chunks": chunks, "status": status}
        self.row["reason"] = "; ".join(reasons)


class Progress:
    """A bar that shows how many files and bytes of a load are done."""

    def __init__(self, loads: Sequence[Load], *, shown: bool) -> None:
        self._sizes = {load.key: load.size() if shown else 0 for load in loads}
        self._files = self._bytes = 0
        # Not `disable`: the first bar of a process takes milliseconds, and a semaphore.
        self._bar = None if not shown else tqdm(
            total=sum(self._sizes.values()), desc="Loading", unit="B", unit_scale=True,
            unit_divisor=1024, file=sys.stdout,
        )  # fmt: skip

    def sent(self, count: int) -> None:
        """Count bytes of a file that is under way."""
        if self._bar is not None:
            self._bar.update(count)

    def finished(self, load: Load) -> None:
        """Count a file, and those of its bytes that were not sent, or were sent again."""
        if self._bar is None:
            return
        self._files += 1
        self._bytes += self._sizes[load.key]
        self._bar.set_postfix_str(f"{self._files} of {len(self._sizes)} files", refresh=False)
        self._bar.update(self._bytes - self._bar.n)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


class Loader:
    """Stores files.

    Parameters
    ----------
    chunks : Chunks
    versions : Versions
    chunk_size : int
        In bytes.
    thumbnails : bool
        Whether a frame of every image is decoded for its thumbnail.
    """

    def __init__(
        self, chunks: Chunks, versions: Versions, chunk_size: int, *, thumbnails: bool
    ) -> None:
        self._chunks = chunks
        self._versions = versions
        self._chunk_size = chunk_size
        self._thumbnails = thumbnails

    def load(
        self,
        loads: Sequence[Load],
        *,
        replace: bool = False,
        repair: bool = False,
        cold: bool = False,
        at_once: bool = False,
        shown: bool = False,
    ) -> None:
        """Store files, and note in each one's row what became of it.

        Parameters
        ----------
        loads : sequence of Load
        replace, repair : bool, optional
            As for `DicomStore.load`.
        cold : bool, optional
            Whether only documents are made, and no chunks are sent.
        at_once : bool, optional
            Whether somebody waits to read them: no pixels are decoded, for which worker processes
            would have to start. The next load adds the thumbnails.
        shown : bool, optional
            Whether there is a progress bar.
        """
        progress = Progress(loads, shown=shown)
        new = self._new(loads, progress, repair=repair, cold=cold)
        described = describe_all(new, len(loads), self._thumbnails and not at_once)
        together: list[tuple[Load, Write, list[str]]] = []
        with contextlib.closing(progress), contextlib.closing(described):
            for (load, stored), description in described:
                with load.reporting():
                    if isinstance(description, OSError):
                        raise description
                    if load.row["status"] == "skipped":
                        reasons = self._check(load, stored, description, replace=replace)
                        with load.opened() as file:
                            send = _Sending(self._chunks, load, file, description, progress, cold)
                            write = self._write(load, send, replace=replace)
                            if load.row["size"] > TOGETHER_BYTES:
                                self._finish([(load, write, reasons)], progress)
                                continue
                            together.append((load, write, reasons))
                    else:
                        self._add_thumbnail(stored, description)
                if not together or together[-1][0] is not load:
                    progress.finished(load)
                size = sum(write.size for _, write, _ in together)
                if len(together) == TOGETHER or size > TOGETHER_BYTES:
                    self._finish(together, progress)
                    together = []
            self._finish(together, progress)

    def _new(
        self, loads: Sequence[Load], progress: Progress, *, repair: bool, cold: bool
    ) -> Iterator[tuple[tuple[Load, Stored | None], Path | bytes]]:
        """Yield the files that have to be described, each with what is stored in its place."""
        for first in range(0, len(loads), LOOK_UP):
            group = [load for load in loads[first : first + LOOK_UP] if not load.row["reason"]]
            found = self._versions.stored([load.key for load in group], STORED_MEMBERS)
            here = {load.key: stored for load, stored in zip(group, found, strict=True)}
            for load in loads[first : first + LOOK_UP]:
                stored, wanted = here.get(load.key), False
                with load.reporting():
                    if isinstance(stored, Exception):
                        raise stored
                    wanted = load.key in here and not self._keep(
                        load, stored, repair=repair, cold=cold
                    )
                if wanted:
                    assert not isinstance(stored, Exception)
                    yield (load, stored), load.content
                else:
                    progress.finished(load)

    def _keep(self, load: Load, stored: Stored | None, *, repair: bool, cold: bool) -> bool:
        """Keep what is stored if it is this file, mended where it has to be; note that in the row.

        Return whether that is all there is to do.
        """
        document = stored and stored.document
        if stored is None or document is None or not 0 < load.size() == document.manifest.size:
            return False
        if document.manifest.chunk_size != self._chunk_size:
            return False
        chunks = self._chunks
        is_sound = (
            not chunks.attachment_faults(document) if repair else chunks.has_attachments(document)
        )
        if not is_sound:
            return False
        with load.opened() as file:
            if load.row["size"] != document.manifest.size or _digest(file) != document.blake3:
                return False
            if not cold:  # before a chunk is sent again: `keep` goes by the first one's time
                self._chunks.keep(document.manifest)
            status = "unchanged" if cold else self._mended(file, document, repair=repair)
        if not status:
            return False
        reasons = [PARTIAL_HEADER] if "headerPartial" in stored.members else []
        load.succeeded(status, document.manifest.count, reasons)
        has_thumbnail = "thumbnail" in stored.members or "rows" not in stored.members
        return has_thumbnail or not self._thumbnails

    def _mended(self, file: BinaryIO, document: Document, *, repair: bool) -> str:
        """Send the chunks that are gone again, with `repair` also the damaged ones.

        Return ``"unchanged"``, ``"repaired"``, or ``""`` if it has to be stored anew: it was
        replaced meanwhile, or its document has a wrong CRC-32.
        """
        if not repair and not self._chunks.missing([document.manifest])[0]:
            return "unchanged"
        faults = self._chunks.faults(document)
        pieces: dict[int, bytes] = {}
        for number in faults:
            file.seek(document.manifest.offset(number))
            piece = bytearray(document.manifest.length(number))
            _fill(file, memoryview(piece))
            if crc32(piece) != document.crc[number]:
                return ""
            pieces[number] = bytes(piece)
            if sum(map(len, pieces.values())) > BATCH_BYTES or number == max(faults):
                if not self._versions.put_back(document.manifest, pieces):
                    return ""
                pieces = {}
        return "repaired" if faults else "unchanged"

    def _check(
        self, load: Load, stored: Stored | None, description: Description, *, replace: bool
    ) -> list[str]:
        """Raise if a file cannot be stored; return what its row has to say if it can."""
        members = description.members
        if load.size() == 0:
            raise NotDicomError("an empty file")
        if members is None:
            if isinstance(load.content, bytes):
                raise NotDicomError(
                    f"{shown_path(load.path)} is not DICOM (no DICM, no SOP Class UID). A slide is "
                    "loaded from a file, since OpenSlide reads only files."
                )
            raise NotDicomError("neither DICOM (no DICM, no SOP Class UID) nor a slide")
        if stored is not None and not replace:
            new = {**members, "size": load.size()}
            _refuse_different_image(load.path, stored.members, new)
        reasons = [PARTIAL_HEADER] if "headerPartial" in members else []
        return reasons + ([NO_THUMBNAIL] if description.given_up and self._thumbnails else [])

    def _write(self, load: Load, send: _Sending, *, replace: bool) -> Write:
        def may_replace(stored: Stored, new: Mapping[str, Any]) -> None:
            if not replace:
                _refuse_different_image(load.path, stored.members, new)

        return Write(load.key, load.row["size"], self._chunk_size, send, may_replace)

    def _finish(
        self, together: Sequence[tuple[Load, Write, list[str]]], progress: Progress
    ) -> None:
        """Store files, and note in their rows what became of them."""
        self._versions.write([write for _, write, _ in together])
        for load, write, reasons in together:
            with load.reporting():
                if isinstance(write.outcome, Exception):
                    raise write.outcome
                load.succeeded(str(write.outcome), write.manifest.count, reasons)
            progress.finished(load)

    def _add_thumbnail(self, stored: Stored | None, description: Description) -> None:
        """Give a document the thumbnail that it was stored without."""
        if stored and stored.document and description.thumbnail:
            manifest = stored.document.manifest
            self._versions.set_member(manifest, "thumbnail", description.thumbnail)


class _Sending:
    """Sends one file's chunks, and says what its document has to be."""

    def __init__(
        self,
        chunks: Chunks,
        load: Load,
        file: BinaryIO,
        description: Description,
        progress: Progress,
        cold: bool,
    ) -> None:
        self._chunks = chunks
        self._load = load
        self._file = file
        self._description = description
        self._progress = progress
        self._cold = cold
        if load.modified != description.modified:
            raise OSError(errno.EIO, CHANGED)

    def __call__(self, manifest: Manifest, together: list[Command]) -> dict[str, Any]:
        file, description = self._file, self._description
        file.seek(0)
        digest, crc = self._chunks.send(
            manifest,
            lambda view: _fill(file, view),
            self._progress.sent,
            together,
            cold=self._cold,
        )
        if file.read(1) or _modified(file) not in (None, self._load.modified):
            raise OSError(errno.EIO, CHANGED)
        together += self._chunks.attach(manifest, description.attachments)
        attachments = {name: crc32(text) for name, text in description.attachments.items()}
        members = dict(description.members or {})
        if description.thumbnail:
            members["thumbnail"] = description.thumbnail
        return {
            "imageName": shown_path(self._load.path.rpartition("/")[2]),
            **_folders(self._load.path),
            "size": manifest.size,
            "blake3": digest,
            "version": manifest.version,
            "chunkSize": manifest.chunk_size,
            "tail": manifest.tail,
            "crc": crc,
            "chunks": manifest.chunk_keys(),
            **({"attachments": attachments} if attachments else {}),
            **members,
        }


def _folders(path: str) -> dict[str, list[str]]:
    """Return the folders that a file lies in, the outermost first, as a member of its document."""
    parts = shown_path(path).split("/")[:-1]
    found = ["/".join(parts[: count + 1]) for count in range(len(parts))]
    return {"folders": found} if found else {}


def _refuse_different_image(path: str, stored: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Raise if `stored` and `new`, members of documents, are of different images.

    DICOM instances differ by their SOP Instance UID. A slide has none: all other bytes are a
    different slide.
    """
    what = ""
    if "vendor" in stored and "vendor" in new:
        digest = stored.get("blake3")
        if stored.get("size") != new["size"] or new.get("blake3", digest) != digest:
            what = "slide"
    elif "vendor" in stored or "vendor" in new:
        what = "kind of image"
    else:
        uids = [members.get("sopInstanceUID") for members in (stored, new)]
        if all(uids) and uids[0] != uids[1]:
            what = "SOP Instance UID"
    if what:
        raise DifferentImageError(
            f"{shown_path(path)} is stored already, with a different {what}: load with "
            "under='a folder' to keep both, or with replace=True"
        )


def _modified(file: BinaryIO) -> int | None:
    """Return when a file was modified last, in ns; None for one in memory."""
    return None if isinstance(file, io.BytesIO) else os.fstat(file.fileno()).st_mtime_ns


def _fill(file: BinaryIO, view: memoryview) -> None:
    """Fill `view` from `file`; an unbuffered one may give less than is asked for."""
    filled = 0
    while filled < len(view):
        count = file.readinto(view[filled:])  # type: ignore[attr-defined]
        if not count:
            raise OSError(errno.EIO, CHANGED)
        filled += count


def _digest(file: BinaryIO) -> str:
    """Return the BLAKE3 of a file in hexadecimal."""
    digest = blake3()
    file.seek(0)
    while piece := file.read(DEFAULT_CHUNK_SIZE):
        digest.update(piece)
    return digest.hexdigest()


def walk(root: Path) -> Iterator[tuple[str, Path, str]]:
    """Yield (path relative to `root`, file, why it cannot be loaded) in a stable order."""
    folders = [("", root)]
    while folders:
        prefix, folder = folders.pop()
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: os.fsencode(entry.name))
        except OSError as error:
            yield prefix.rstrip("/") or folder.name, folder, error.strerror or str(error)
            continue
        inner = []
        for entry in entries:
            path = prefix + entry.name
            problem = ""
            try:
                if entry.is_dir(follow_symlinks=False):
                    inner.append((f"{path}/", Path(entry.path)))
                    continue
                if entry.is_dir():
                    problem = "a link to a folder; links to folders are not followed"
                elif not stat.S_ISREG(entry.stat().st_mode):
                    problem = "not a regular file"
            except OSError as error:
                problem = error.strerror or str(error)
            yield path, Path(entry.path), problem
        folders += reversed(inner)
