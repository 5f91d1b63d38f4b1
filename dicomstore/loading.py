"""What a load works on: the files below a folder, each with its row of the report; no Redis."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
import stat
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from tqdm import tqdm

from dicomstore.blobs.manifest import BATCH_BYTES, DEFAULT_CHUNK_SIZE
from dicomstore.errors import DamagedError, NotDicomError, ServerError
from dicomstore.keys import document_key, shown_path

CHANGED = "changed while it was read; load it again"


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
        Whether errors are raised, not reported.
    """

    def __init__(
        self, path: str, content: Path | bytes, problem: str = "", *, strict: bool = False
    ) -> None:
        self._excused = () if strict else (OSError, NotDicomError, DamagedError)
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
            self.modified = modified(file)
            if content is None:
                yield file
            else:
                self.row["size"] = len(content)
                yield io.BytesIO(content)

    @contextlib.contextmanager
    def reporting(self) -> Iterator[None]:
        """Take an error for the reason why the file is skipped, unless the server made it."""
        try:
            yield
        except ServerError:
            raise
        except self._excused as error:
            self.row["reason"] = getattr(error, "strerror", None) or str(error)


class Progress:
    """A bar that shows how many files and bytes of a load are done."""

    def __init__(self, loads: Sequence[Load], *, shown: bool) -> None:
        self._sizes = {load.key: load.size() if shown else 0 for load in loads}
        self._files = self._bytes = 0
        self._bar = tqdm(
            total=sum(self._sizes.values()), desc="Loading", unit="B", unit_scale=True,
            unit_divisor=1024, disable=not shown, file=sys.stdout,
        )  # fmt: skip

    def sent(self, count: int) -> None:
        """Count bytes of a file that is under way."""
        self._bar.update(count)

    def finished(self, load: Load) -> None:
        """Count a file, and of its bytes those that were not sent, or not for the first time."""
        self._files += 1
        self._bytes += self._sizes[load.key]
        self._bar.set_postfix_str(f"{self._files} of {len(self._sizes)} files", refresh=False)
        self._bar.update(self._bytes - self._bar.n)

    def close(self) -> None:
        self._bar.close()


def modified(file: BinaryIO) -> int | None:
    """Return when a file was modified last, in ns; None for one in memory."""
    return None if isinstance(file, io.BytesIO) else os.fstat(file.fileno()).st_mtime_ns


def read_whole(file: BinaryIO, view: memoryview) -> None:
    """Fill `view` from `file`; an unbuffered one may give less than is asked for."""
    filled = 0
    while filled < len(view):
        count = file.readinto(view[filled:])  # type: ignore[attr-defined]
        if not count:
            raise OSError(errno.EIO, CHANGED)
        filled += count


def sha256_of(file: BinaryIO) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    # Not hashlib.file_digest: it hands a BytesIO over whole, and reads 256 KiB at a time otherwise.
    sha256 = hashlib.sha256()
    file.seek(0)
    while piece := file.read(DEFAULT_CHUNK_SIZE):
        sha256.update(piece)
    return sha256.hexdigest()


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
