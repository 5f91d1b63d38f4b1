"""Frames out: only the chunks that hold them are fetched."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray

from dicomstore.blobs.manifest import MANIFEST_MEMBERS, Manifest, parse_manifest
from dicomstore.errors import DamagedError, FrameError, MissingChunkError
from dicomstore.imaging.frames import OPTIONS, Frames
from dicomstore.keys import shown_path
from dicomstore.reading import Reading
from dicomstore.server.connection import Server

#: What has to be known of an instance before a frame of it can be fetched and decoded.
FRAME_MEMBERS = (
    *MANIFEST_MEMBERS,
    "frames",
    "transferSyntaxUID",
    *(f"header.{keyword}" for keyword in OPTIONS),
)
#: So many instances are remembered, with where their frames lie.
REMEMBERED = 256
#: How often a frame is read again when its instance is replaced meanwhile.
ATTEMPTS = 20


class Viewing:
    """Fetches frames.

    Parameters
    ----------
    server : Server
    reading : Reading
    """

    def __init__(self, server: Server, reading: Reading) -> None:
        self._server = server
        self._reading = reading
        self._known: OrderedDict[str, tuple[Manifest, Frames]] = OrderedDict()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_known": OrderedDict(), "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def frame_bytes(self, name: str, numbers: Sequence[int]) -> list[bytes]:
        """Return frames as they are stored."""
        return self._fetched(name, numbers)[1]

    def frames(self, name: str, numbers: Sequence[int]) -> list[NDArray[Any]]:
        """Return frames decoded."""
        frames, stored = self._fetched(name, numbers)
        return [frames.decode(k, one) for k, one in zip(numbers, stored, strict=True)]

    def _fetched(self, name: str, numbers: Sequence[int]) -> tuple[Frames, list[bytes]]:
        for _ in range(ATTEMPTS):
            with self._lock:
                known = self._known.pop(name, None)
            manifest, frames = known or self._located(name)
            spans = [frames.span(k) for k in numbers]
            try:
                fetched = self._reading.spans(manifest, spans)
            except (MissingChunkError, DamagedError):
                # A remembered version may have been replaced: one that was looked up just now not.
                if known is None and self._reading.is_current(manifest):
                    raise
                continue
            with self._lock:
                self._known[name] = manifest, frames
                if len(self._known) > REMEMBERED:
                    self._known.popitem(last=False)
            return frames, [frames.stored(k, one) for k, one in zip(numbers, fetched, strict=True)]
        raise MissingChunkError(f"{shown_path(name)} is replaced faster than it can be read.")

    def _located(self, name: str) -> tuple[Manifest, Frames]:
        """Return where the frames of an instance lie."""
        key, members = self._reading.members(name, FRAME_MEMBERS)
        manifest = parse_manifest(key, members)
        attributes = {
            keyword: members[f"header.{keyword}"]
            for keyword in OPTIONS
            if f"header.{keyword}" in members
        }
        where, table = members.get("frames"), None
        if Frames.needs_table(where):
            table = self._server.command("GET", manifest.attachment_key("frames"))
            if table is None:
                raise FrameError(
                    f"Where the frames of {shown_path(key)} lie is gone. Delete the file and load "
                    "it again."
                )
        syntax = members.get("transferSyntaxUID")
        return manifest, Frames(shown_path(key), where, attributes, syntax, table)
