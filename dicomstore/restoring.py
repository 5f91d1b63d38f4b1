"""Files out again: written below a folder, or only checked; a row of a report each."""

from __future__ import annotations

import errno
import os
import secrets
import sys
import tempfile
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm import tqdm

from dicomstore.blobs.chunks import Chunks
from dicomstore.blobs.manifest import Document
from dicomstore.errors import LOAD_AGAIN, DamagedError, MissingChunkError, NotStoredError
from dicomstore.keys import file_below, path_of, shown_path
from dicomstore.reading import Reading

COLUMNS = ["path", "key", "size", "status", "reason"]


def restore(
    reading: Reading,
    chunks: Chunks,
    keys: Sequence[str],
    folder: Path,
    *,
    overwrite: bool,
    shown: bool,
) -> pd.DataFrame:
    """Write the files of `keys` below `folder`; see `DicomStore.restore`."""
    folder.mkdir(parents=True, exist_ok=True)
    root = folder.resolve()
    folds = folds_case(root)
    written: dict[str, str] = {}

    def write(document: Document) -> str:
        target, path = file_below(root, document.key), path_of(document.key)
        name = unicodedata.normalize("NFD", path.casefold()) if folds else path
        if name in written:
            raise FileExistsError(
                errno.EEXIST,
                f"on this file system it has the same name as {shown_path(written[name])}",
            )
        if not overwrite and os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, "exists; overwrite=True replaces it")
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = target.with_name(f".restore-{secrets.token_hex(6)}")
        try:
            with scratch.open("xb") as file:
                chunks.copy(document, file.write)
            scratch.replace(target)
        finally:
            scratch.unlink(missing_ok=True)
        written[name] = path
        return "restored"

    return _report(reading, keys, write, "Restoring", shown=shown)


def folds_case(folder: Path) -> bool:
    """Whether a folder's file system takes upper and lower case for the same."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".restore-a") as file:
        return Path(folder, Path(file.name).name.swapcase()).exists()


def verify(
    reading: Reading, chunks: Chunks, keys: Sequence[str], *, has_source: bool, shown: bool
) -> pd.DataFrame:
    """Check the files of `keys`; see `DicomStore.verify`."""
    hot: dict[str, float] = {}

    def check(document: Document) -> str:
        manifest, faults = document.manifest, {}
        hot[document.key] = 1.0
        try:
            chunks.copy(document, len)
        except (MissingChunkError, DamagedError):
            lost = chunks.faults(document)
            if not lost:
                raise
            hot[document.key] = 1 - sum(map(manifest.length, lost)) / manifest.size
            faults = {manifest.chunk_key(number): what for number, what in lost.items()}
        beside = chunks.attachment_faults(document)
        faults |= {manifest.attachment_key(name): what for name, what in beside.items()}
        if not faults:
            return "ok"
        if has_source and set(faults.values()) == {"gone"}:
            return "cold"
        named = ", ".join(f"the chunk {key} is {what}" for key, what in faults.items())
        kind = MissingChunkError if "gone" in faults.values() else DamagedError
        raise kind(f"{named}. {LOAD_AGAIN}")

    report = _report(reading, keys, check, "Verifying", shown=shown)
    report.insert(3, "hot", [hot.get(key, 0.0) for key in report["key"]])
    return report


def _report(
    reading: Reading,
    keys: Sequence[str],
    action: Callable[[Document], str],
    label: str,
    *,
    shown: bool,
) -> pd.DataFrame:
    """Return a row for every key: the status that `action` gives, or why it could not."""
    rows = []
    for key in tqdm(keys, desc=label, unit="file", disable=not shown, file=sys.stdout):
        row: dict[str, Any] = {
            "path": shown_path(path_of(key)), "key": shown_path(key), "size": 0,
        }  # fmt: skip

        def act(document: Document, row: dict[str, Any] = row) -> str:
            row["size"] = document.manifest.size
            return action(document)

        try:
            row |= {"status": reading.consistently(key, act), "reason": ""}
        except (MissingChunkError, DamagedError) as error:
            row |= {"status": "damaged", "reason": str(error)}
        except NotStoredError:
            continue  # deleted meanwhile
        except OSError as error:
            row |= {"status": "skipped", "reason": error.strerror or str(error)}
        rows.append(row)
    return pd.DataFrame(rows, columns=COLUMNS)
