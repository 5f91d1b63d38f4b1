"""The place that stored files came from: read by ranges, never written to."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
from fsspec.implementations.local import LocalFileSystem

from dicomstore.keys import file_below, parts_below


class Source:
    """A folder, or whatever fsspec opens, by the keys of the documents.

    Parameters
    ----------
    place : path or URL
        Credentials are fsspec's: its configuration, or the environment.

    Raises
    ------
    ValueError
        If fsspec does not know such a place, or lacks a package for it.
    """

    def __init__(self, place: str | os.PathLike[str]) -> None:
        try:
            self._files, self._root = fsspec.url_to_fs(os.fspath(place))
        except (ImportError, ValueError) as error:
            raise ValueError(f"The source cannot be used: {error}.") from error
        self._is_local = isinstance(self._files, LocalFileSystem)
        if self._is_local:
            self._root = os.fspath(Path(self._root).resolve())

    def __repr__(self) -> str:
        return f"Source({type(self._files).__name__})"  # a URL may hold a password

    def has(self, key: str) -> bool:
        """Whether the file of a document is there."""
        try:
            place = self._place(key)
            with self._translated():
                return self._is_local or bool(self._files.exists(place))
        except OSError:
            return False

    def ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Return pieces of a file, given where each begins and its length, in bytes.

        Pieces of a file that ends before them are shorter.

        Raises
        ------
        OSError
            If the file is not there, or cannot be read.
        """
        place = self._place(key)
        with self._translated():
            if self._is_local:
                with open(place, "rb", buffering=0) as file:
                    return [_piece(file, start, length) for start, length in ranges]
            starts, ends = zip(*((start, start + length) for start, length in ranges), strict=True)
            places = [place] * len(ranges)
            try:
                pieces = self._files.cat_ranges(places, list(starts), list(ends), on_error="raise")
            except Exception:
                size = self._files.size(place)
                if size is None or size >= max(ends):
                    raise
                return [b""] * len(ranges)  # S3 refuses a range beyond the end: it has changed
            return [bytes(piece) for piece in pieces]

    @contextlib.contextmanager
    def file(self, key: str) -> Iterator[Path]:
        """Give a whole file as a local one for the ``with`` block.

        Raises
        ------
        OSError
            If the file is not there, or cannot be read.
        """
        if self._is_local:
            yield Path(self._place(key))
            return
        with tempfile.TemporaryDirectory(prefix="dicom-redis-") as folder:
            copy, place = Path(folder, parts_below(key)[-1]), self._place(key)
            with self._translated():
                self._files.get_file(place, os.fspath(copy))
            yield copy

    def _place(self, key: str) -> str:
        """Return where the file of a document lies; nothing from Redis is trusted as a path."""
        if not self._is_local:
            return "/".join([self._root.rstrip("/"), *parts_below(key)])
        file = file_below(Path(self._root), key)
        if not file.resolve().is_relative_to(self._root) or not file.is_file():
            raise FileNotFoundError(0, "it has no such file")
        return os.fspath(file)

    @contextlib.contextmanager
    def _translated(self) -> Iterator[Any]:
        """Turn what a file system of fsspec raises into an OSError; its text may hold a secret."""
        try:
            yield
        except FileNotFoundError:
            raise FileNotFoundError(0, "it has no such file") from None
        except OSError as error:
            if self._is_local:
                raise
            raise OSError(error.errno or 0, type(error).__name__) from None
        except Exception as error:
            raise OSError(0, type(error).__name__) from None


def _piece(file: BinaryIO, start: int, length: int) -> bytes:
    file.seek(start)
    return file.read(length)
