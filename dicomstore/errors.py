"""Every error of this project. Each is also the nearest built-in error, and says what to do.

DicomRedisError
├── ServerError              ConnectionError    the server cannot be used
│   ├── RefusedError                            it answered a command with an error
│   └── RedisServerError     RuntimeError       the embedded server cannot be installed or started
├── SearchError              RuntimeError       a search has no complete answer
│   └── SearchTimeoutError   TimeoutError       it took longer than it may
├── NotIndexedError          ValueError         the index has no such field
├── NotStoredError           FileNotFoundError  no file of this name is stored
├── AmbiguousNameError       ValueError         several stored files have this imageName
├── NotDicomError            ValueError         neither a DICOM file nor a slide
├── DifferentImageError      FileExistsError    the path holds a different image
├── MissingChunkError        LookupError        chunks of a stored file are gone
├── DamagedError             ValueError         a chunk or a document is not what was stored
├── NoThumbnailError         ValueError         the stored file has nothing to be compared by
├── FrameError               ValueError         a frame cannot be found or decoded
├── VolumeError              ValueError         instances do not form one volume
└── WorkerError              RuntimeError       no worker process can be started
"""

from __future__ import annotations

#: How a missing or damaged chunk is mended.
LOAD_AGAIN = "Load the file again with repair=True."


class DicomRedisError(Exception):
    """Base of all errors of this project."""


class ServerError(DicomRedisError, ConnectionError):
    """The server cannot be used: it is unreachable, out of memory, or lacks search or JSON."""


class RefusedError(ServerError):
    """The server answered a command with an error; `reply` is its text, without the command."""

    def __init__(self, message: str, reply: str = "") -> None:
        super().__init__(message)
        self.reply = reply


class RedisServerError(ServerError, RuntimeError):
    """The embedded server cannot be installed or started."""


class SearchError(DicomRedisError, RuntimeError):
    """A search has no complete answer: the index is missing or is still being built."""


class SearchTimeoutError(SearchError, TimeoutError):
    """The search engine ran out of time, so its answer would be incomplete."""


class NotIndexedError(DicomRedisError, ValueError):
    """The index has no such field."""


class NotStoredError(DicomRedisError, FileNotFoundError):
    """No file of this name is stored."""


class AmbiguousNameError(DicomRedisError, ValueError):
    """Several stored files have this imageName."""


class NotDicomError(DicomRedisError, ValueError):
    """The bytes are neither a DICOM file nor a slide."""


class DifferentImageError(DicomRedisError, FileExistsError):
    """The path already holds a different image."""


class MissingChunkError(DicomRedisError, LookupError):
    """Chunks of a stored file are gone; `keys` are theirs, where they are known."""

    def __init__(self, message: str, keys: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.keys = keys

    @classmethod
    def of(cls, keys: list[str]) -> MissingChunkError:
        """Return the error for missing chunks."""
        which = f"The chunk {keys[0]} is" if len(keys) == 1 else f"{len(keys)} chunks are"
        first = "" if len(keys) == 1 else f", the first is {keys[0]}"
        return cls(f"{which} missing{first}. {LOAD_AGAIN}", tuple(keys))


class DamagedError(DicomRedisError, ValueError):
    """A chunk or a document is not what was stored; `keys` are those of damaged chunks."""

    def __init__(self, message: str, keys: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.keys = keys

    @classmethod
    def of(cls, key: str) -> DamagedError:
        """Return the error for a damaged chunk."""
        text = f"The chunk {key} is damaged: its length or its CRC-32 is wrong. {LOAD_AGAIN}"
        return cls(text, (key,))


class NoThumbnailError(DicomRedisError, ValueError):
    """The stored file has no pixels, or none that could be decoded when it was loaded."""


class FrameError(DicomRedisError, ValueError):
    """A frame cannot be found or decoded."""


class VolumeError(DicomRedisError, ValueError):
    """Instances do not form one volume."""


class WorkerError(DicomRedisError, RuntimeError):
    """No worker process can be started."""
