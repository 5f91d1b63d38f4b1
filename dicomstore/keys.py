"""How paths and keys are written; every room may use it."""

from __future__ import annotations

import os
import re
from urllib.parse import unquote_to_bytes

DOCUMENT_PREFIX = "file:"
CHUNK_PREFIX = "chunk:"


def document_key(path: str) -> str:
    """Return the key of the document of the file at `path`."""
    return DOCUMENT_PREFIX + quote_path(path)


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
