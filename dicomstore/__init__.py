"""DICOM files in Redis: one JSON document a file, its bytes as string chunks, one search index.

>>> from dicomstore import DicomStore, connect
>>> store = DicomStore(connect())
>>> report = store.load("data/dicom")
>>> image = store.read("CT_small.dcm")
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dicomstore.catalogue.query import containing, not_, words
    from dicomstore.server.connection import connect
    from dicomstore.store import DicomStore

#: The public names and the rooms that they live in. A room is entered at the first use of its name:
#: the installer of the embedded server and the worker processes need none of the others.
_ROOMS = {
    "DicomStore": "dicomstore.store",
    "connect": "dicomstore.server.connection",
    "containing": "dicomstore.catalogue.query",
    "not_": "dicomstore.catalogue.query",
    "words": "dicomstore.catalogue.query",
}
__all__ = ["DicomStore", "connect", "containing", "not_", "words"]


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_ROOMS[name]), name)
