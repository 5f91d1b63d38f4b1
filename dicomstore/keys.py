"""How paths and keys are written; every room may use it."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path
from urllib.parse import unquote_to_bytes

DOCUMENT_PREFIX = "file:"
CHUNK_PREFIX = "chunk:"


def document_key(path: str) -> str:
    """Return the key of the document of the file at `path`."""
    return DOCUMENT_PREFIX + quote_path(path)


def likely_key(name: str) -> str:
    """Return the key of the document that a name likely means: itself, or that of a path."""
    return name if name.startswith(DOCUMENT_PREFIX) else document_key(name)


def path_of(key: str) -> str:
    """Return the path whose document has the key `key`."""
    return unquote_path(key.removeprefix(DOCUMENT_PREFIX))


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


def parts_below(key: str, *, windows: bool = os.name == "nt") -> list[str]:
    """Return the parts of the path in a document's key; nothing from Redis is trusted as a path.

    Parameters
    ----------
    key : str
        Of a document.
    windows : bool, optional
        Whether names are refused that mean something else on Windows.

    Raises
    ------
    PermissionError
        If they could lead out of the folder that they are appended to.
    """
    path = path_of(key)
    parts = path.split("/")
    sound = (
        document_key(path) == key
        and "\0" not in path
        and all(part not in ("", ".", "..") for part in parts)
        and not (windows and any(map(_is_unsafe_on_windows, parts)))
    )
    if not sound:
        raise PermissionError(
            errno.EPERM, f"{shown_path(path)!r} does not name a file below the folder; refused"
        )
    return parts


def file_below(root: Path, key: str) -> Path:
    """Return the file of a document's key below the folder `root`.

    Raises
    ------
    PermissionError
        As `parts_below`, and if the path leads through a link.
    """
    target = root.joinpath(*parts_below(key))
    if any(parent.is_symlink() for parent in target.parents if parent.is_relative_to(root)):
        raise PermissionError(
            errno.EPERM, f"{shown_path(path_of(key))!r} leads through a link; refused"
        )
    return target


def _is_unsafe_on_windows(part: str) -> bool:
    """Whether Windows reads a part of a path as a drive, a stream, a device or a second folder."""
    device = part.partition(".")[0].rstrip().upper()
    reserved = {"CON", "PRN", "AUX", "NUL", "CONIN$", "CONOUT$"}
    numbered = re.fullmatch("(COM|LPT)[0-9¹²³]", device)
    return (
        device in reserved
        or numbered is not None
        or part.endswith((".", " "))
        or bool(re.search(r'[<>:"\\|?*\x00-\x1f]', part))
    )
