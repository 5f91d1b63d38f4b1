"""The errors of this project: one base, each child also the nearest built-in error."""

from __future__ import annotations


class DicomRedisError(Exception):
    """Base of all errors of this module; the message says what to do."""


class ServerError(DicomRedisError, ConnectionError):
    """The server cannot be used: unreachable, out of memory, or without search or JSON."""


class SearchError(DicomRedisError, RuntimeError):
    """A search has no complete answer: the index is missing or still being built."""


class SearchTimeoutError(SearchError, TimeoutError):
    """The search engine ran out of time, so that its answer would be partial."""


class NotIndexedError(DicomRedisError, ValueError):
    """The index has no such field."""


class NoDescriptorError(DicomRedisError, ValueError):
    """The stored file has no pixels, or none that could be decoded when it was loaded."""


class NotStoredError(DicomRedisError, FileNotFoundError):
    """No file of that name is stored."""


class AmbiguousNameError(DicomRedisError, ValueError):
    """Several stored files have that imageName."""


class NotDicomError(DicomRedisError, ValueError):
    """The bytes are not a DICOM file."""


class AnotherImageError(DicomRedisError, FileExistsError):
    """The path already holds another image."""


class MissingChunkError(DicomRedisError, LookupError):
    """Chunks of a stored file are gone."""


class DamagedError(DicomRedisError, ValueError):
    """A chunk or a document is not what was stored."""


class WorkerError(DicomRedisError, RuntimeError):
    """No process can be started to decode pixels in."""


class RedisServerError(DicomRedisError, RuntimeError):
    """The embedded server cannot be installed or started; the message says what to do."""
