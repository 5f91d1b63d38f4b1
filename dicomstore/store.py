"""The store: every public method, and the rooms that do its work."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import pandas as pd
import pydicom
from numpy.typing import NDArray

from dicomstore import restoring
from dicomstore.blobs.chunks import Chunks
from dicomstore.blobs.manifest import BATCH_BYTES, DEFAULT_CHUNK_SIZE, MANIFEST_MEMBERS, Manifest
from dicomstore.blobs.reader import CACHE_BYTES, ChunkReader
from dicomstore.blobs.sweeping import sweep
from dicomstore.blobs.versions import Versions
from dicomstore.catalogue.index import Catalogue
from dicomstore.errors import (
    DamagedError,
    NotDicomError,
    NoThumbnailError,
    NotStoredError,
    SearchError,
)
from dicomstore.imaging import describing, thumbnail
from dicomstore.imaging.frames import Frames
from dicomstore.keys import checked_path, path_of, shown_path
from dicomstore.loading import Load, Loader, walk
from dicomstore.naming import Naming
from dicomstore.prefetching import Around, Prefetch, Prefetcher
from dicomstore.reading import Reading
from dicomstore.server.connection import Client, Server
from dicomstore.tier import Mender, Tier
from dicomstore.viewing import Viewing

UNINDEXED = "stored, but no search finds it: a value does not fit the type of an indexed field"
REPORT_COLUMNS = ["path", "key", "size", "chunks", "status", "reason"]
SIMILAR_COLUMNS = ("imageName", "modality", "bodyPartExamined", "seriesDescription")


class DicomStore:
    """DICOM files and slides in one Redis.

    A store can be pickled and used in a different process, which gets connections of its own.

    Parameters
    ----------
    client : redis.Redis, or redis-py's client of a cluster
        Stays the caller's to close. A client that decodes responses is copied without that.
    chunk_size : int, optional
        Length of a chunk in bytes, 1 to 16 MiB.
    progress : bool, optional
        Whether long work shows a progress bar.
    thumbnails : bool, optional
        Whether loading decodes a frame of every image for :meth:`similar`; without, it is faster.
    ttl : float, optional
        The chunks that are loaded expire after so many seconds; the documents stay, so that
        everything can be found. Loaded again without `ttl`, a file's chunks stay for good.
    renew : bool, optional
        Whether a file that is read with less than half of `ttl` left gets the whole again.
    source : path or URL, optional
        Where the files were loaded from: a folder, or whatever fsspec opens, as
        ``"s3://bucket/folder"``. Chunks that have expired, were evicted or are damaged come from
        there again when they are read, and so do files whose document is gone.
    prefetch : {"series", "study"}, optional
        Whether a read that has to fetch from the source has the rest of the series or of the study
        fetched in the background.
    prefetch_mib_per_s : float, optional
        Fetching in the background takes no more than this (MiB/s).

    Raises
    ------
    ServerError
        If the client selects a database other than 0.
    ValueError
        If an option is out of its range.
    """

    def __init__(
        self,
        client: Client,
        *,
        chunk_size: int = DEFAULT_CHUNK_SIZE,
        progress: bool = True,
        thumbnails: bool = True,
        ttl: float | None = None,
        renew: bool = False,
        source: str | os.PathLike[str] | None = None,
        prefetch: str | None = None,
        prefetch_mib_per_s: float = 100.0,
    ) -> None:
        if not 1 <= chunk_size <= BATCH_BYTES:
            raise ValueError(f"chunk_size is {chunk_size}; it can be 1 to {BATCH_BYTES} bytes.")
        if ttl is not None and not 0.001 <= ttl < math.inf:
            raise ValueError(f"ttl is {ttl}; give seconds, or None for files that stay.")
        if renew and ttl is None:
            raise ValueError("renew=True needs a ttl: files without one do not expire.")
        if prefetch not in (None, "series", "study"):
            raise ValueError(f"prefetch is {prefetch!r}; it can be 'series' or 'study'.")
        if prefetch and source is None:
            raise ValueError("prefetch needs a source to fetch from.")
        ttl_ms = None if ttl is None else round(ttl * 1000)
        self.chunk_size = chunk_size
        self.progress = progress
        self._server = Server(client)
        self._catalogue = Catalogue(self._server)
        self._chunks = Chunks(self._server, ttl_ms)
        self._versions = Versions(self._server, self._chunks)
        self._loader = Loader(self._chunks, self._versions, chunk_size, thumbnails=thumbnails)
        self._tier = Tier(self._chunks, self._versions, self._loader, source, renew=renew)
        self._naming = Naming(self._server, self._versions, self._tier, self._catalogue)
        self._reading = Reading(
            self._server, self._chunks, self._versions, self._tier, self._naming
        )
        self._prefetcher = Prefetcher(
            self._chunks, self._versions, self._tier, prefetch_mib_per_s * 1024 * 1024
        )
        if prefetch:
            around = Around(self._naming, self._catalogue, self._prefetcher, prefetch)
            self._tier.on_miss = around.missed
        self._viewing = Viewing(self._chunks, self._versions, self._naming, self._reading)

    def __repr__(self) -> str:
        return f"DicomStore(chunk_size={self.chunk_size})"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End what the store has started; the client that it was given stays open."""
        self._prefetcher.close()
        describing.end_idle_workers()
        self._server.close()

    @property
    def client(self) -> Client:
        """The client that the store uses."""
        return self._server.client

    @property
    def hits(self) -> int:
        """How many reads of whole files found everything in Redis."""
        return self._tier.hits

    @property
    def misses(self) -> int:
        """How many reads of whole files needed the source."""
        return self._tier.misses

    def server(self) -> pd.Series[str]:
        """Return which server answers: its version, its engines' versions, and whose it is."""
        return pd.Series(
            {
                "Redis": self._server.hello()["version"].decode(),
                "search engine": self._server.engine_version("search"),
                "JSON engine": self._server.engine_version("ReJSON"),
                "whose": "embedded" if self._server.is_embedded else "yours",
            }
        )

    # --- files in ---

    def load(
        self,
        source: str | os.PathLike[str],
        *,
        under: str = "",
        replace: bool = False,
        repair: bool = False,
        pixels: bool = True,
    ) -> pd.DataFrame:
        """Load a DICOM file or a slide, or all of them below a folder.

        Linked files are loaded; linked folders are listed and not entered. A file that is stored
        already is sent again only if it differs. Chunks that Redis has lost are sent again. An
        interrupted load goes on where it stopped. While bytes are sent, other processes read
        headers and decode pixels, on all cores.

        Parameters
        ----------
        source : path
            A file, or a folder; a file's path in the store is relative to that folder.
        under : str, optional
            A folder in the store to put the files under, as ``"cd2"``.
        replace : bool, optional
            Whether a different image may take the place of a stored one: one with a different SOP
            Instance UID, or a different slide.
        repair : bool, optional
            Whether every chunk that is stored already is checked by its CRC-32, and sent again if
            it is damaged.
        pixels : bool, optional
            Whether the bytes are sent. Without, only documents are made: everything can be found,
            and a store with a `source` fetches the bytes when they are read.

        Returns
        -------
        pandas.DataFrame
            One row for every file: ``path``, ``key``, ``size`` (bytes), ``chunks``, ``status``
            (loaded, replaced, repaired, unchanged or skipped) and ``reason``.

        Raises
        ------
        FileNotFoundError
            If `source` does not exist.
        ServerError
            If the server cannot take the files; those loaded so far stay.
        WorkerError
            If no worker process can be started.
        """
        source = Path(source)
        if not source.exists():
            raise FileNotFoundError(f"There is no file or folder {source}.")
        prefix = _folder(under)
        if self._server.can_search():
            self._catalogue.ensure()
        found = [(source.name, source, "")] if source.is_file() else walk(source)
        loads = [Load(prefix + path, file, problem) for path, file, problem in found]
        self._loader.load(
            loads, replace=replace, repair=repair, cold=not pixels, shown=self.progress
        )
        rows = [load.row for load in loads]
        unindexed = self._unindexed([row["key"] for row in rows if row["key"]])
        for row in rows:
            if row["key"] in unindexed:
                row["reason"] = UNINDEXED
        return pd.DataFrame(rows, columns=REPORT_COLUMNS)

    def put(
        self,
        path: str,
        image: bytes | bytearray | memoryview | pydicom.Dataset,
        *,
        replace: bool = False,
    ) -> str:
        """Store one DICOM image from memory.

        Parameters
        ----------
        path : str
            Its path in the store.
        image : bytes-like or pydicom.Dataset
            A DICOM file's bytes, stored verbatim, or a data set, written as a DICOM file (PS3.10).
        replace : bool, optional
            As for :meth:`load`.

        Returns
        -------
        str
            The key of its document.

        Raises
        ------
        NotDicomError
            If the bytes are not DICOM, or the data set cannot be written. A slide is loaded from
            a file, since OpenSlide reads only files.
        DifferentImageError
            If the path holds a different image and `replace` is not set.
        SearchError
            If the image is stored, but the index does not take its document.
        """
        checked_path(path)
        if isinstance(image, pydicom.Dataset):
            image = _written(path, image)
        if self._server.can_search():
            self._catalogue.ensure()
        load = Load(path, bytes(image), strict=True)
        self._loader.load([load], replace=replace)
        if self._unindexed([load.key]):
            raise SearchError(f"{load.key} is {UNINDEXED}.")
        return load.key

    def _unindexed(self, keys: Sequence[str]) -> set[str]:
        return self._catalogue.unindexed(keys) if keys and self._server.can_search() else set()

    def delete(self, name: str) -> None:
        """Delete a stored file.

        Parameters
        ----------
        name : str
            Key, path or unambiguous imageName.

        Raises
        ------
        NotStoredError, AmbiguousNameError
            If the name is not that of one stored file.
        """
        key, _ = self._naming.members(name, ("version",))
        self._versions.delete(key)

    def sweep(self, *, under: str = "") -> pd.DataFrame:
        """Remove the chunks that no document names: what loaders leave when they are killed.

        It is safe while others load and read. Where a lease says that a load may be in progress,
        the sweep waits for as long as a lease lasts (5 s), and removes what is not renewed.

        Parameters
        ----------
        under : str, optional
            Only in this folder of the store.

        Returns
        -------
        pandas.DataFrame
            One row for every version removed: ``path``, ``version``, ``chunks`` and ``size``, the
            bytes that they held.
        """
        rows = sweep(self._server, _folder(under))
        report = pd.DataFrame(rows, columns=["path", "version", "chunks", "size"])
        return report.groupby(["path", "version"], as_index=False).sum()

    # --- files out ---

    def read(self, name: Any, *, into: Any = None) -> Any:
        """Return the bytes of a stored file, each chunk checked by its length and CRC-32.

        Parameters
        ----------
        name : str, pandas.Series or pandas.DataFrame
            Key, path or unambiguous imageName; a path wins over an imageName. Or a row of
            :meth:`find`, or its table if that has one row. A file of up to 16 MiB takes two round
            trips by key or path, one if it was read or found before.
        into : writable buffer, optional
            Filled in place, for large files; at least as long as the file.

        Returns
        -------
        bytes, or memoryview
            The file, or the part of `into` that it fills.

        Raises
        ------
        NotStoredError, AmbiguousNameError
            If the name is not that of one stored file.
        MissingChunkError, DamagedError
            If the file cannot be given back as it was stored; the chunk is named.
        """
        wanted = _name(name)
        return self._reading.read(wanted) if into is None else self._reading.read_into(wanted, into)

    def read_many(self, names: Any) -> dict[str, bytes]:
        """Return the bytes of many files: their documents in one request, their chunks together.

        Parameters
        ----------
        names : sequence of str, or pandas.DataFrame
            As for :meth:`read`, or a table of :meth:`find`.

        Returns
        -------
        dict of str to bytes
            By key, in the order of `names`.

        Raises
        ------
        NotStoredError, AmbiguousNameError, MissingChunkError, DamagedError
            As for :meth:`read`.
        """
        return dict(self.read_each(names))

    def read_each(self, names: Any) -> Iterator[tuple[str, bytes]]:
        """Yield key and bytes of many files, as :meth:`read_many`, some 2 MiB at a time."""
        return self._reading.read_each(_names(names))

    def open(self, name: Any, *, cache_bytes: int = CACHE_BYTES) -> ChunkReader:
        """Open a stored file for reading; only the chunks that are touched are fetched.

        Parameters
        ----------
        name : str or pandas.Series
            As for :meth:`read`.
        cache_bytes : int, optional
            How much of the file is kept at a time, in bytes.

        Returns
        -------
        ChunkReader
            A binary file of the version that is stored now, for pydicom, tifffile and others.
        """
        return self._reading.open(_name(name), cache_bytes)

    def header(self, name: Any) -> pydicom.Dataset:
        """Return the data set of a stored DICOM file up to its pixels, from its first chunks.

        Raises
        ------
        NotDicomError
            If the stored file is a slide.
        """
        return self._viewing.header(_name(name))

    def manifest(self, name: Any) -> Manifest:
        """Return how a stored file lies in chunks; `name` as for :meth:`read`."""
        return self._reading.manifest(_name(name))

    def blake3(self, name: Any) -> str:
        """Return the BLAKE3 that was stored with a file; `name` as for :meth:`read`."""
        return str(self._naming.members(_name(name), ("blake3",))[1].get("blake3"))

    def dicom_json(self, name: Any) -> bytes | None:
        """Return a data set as DICOM JSON (PS3.18 Annex F), compressed with zlib.

        Parameters
        ----------
        name : str or pandas.Series
            As for :meth:`read`.

        Returns
        -------
        bytes or None
            Bulk data is given by relative URIs. None if the file has none: it is a slide, or its
            data set cannot be read to its end.

        Raises
        ------
        MissingChunkError, DamagedError
            If it is gone or damaged, and cannot be made again.
        """
        return self._viewing.dicom_json(_name(name))

    def spans(self, manifest: Manifest, spans: Sequence[tuple[int, int]]) -> list[bytes]:
        """Return pieces of one version of a file.

        Parameters
        ----------
        manifest : Manifest
        spans : sequence of (int, int)
            Offset and length of each piece, in bytes.

        Raises
        ------
        MissingChunkError, DamagedError
            If a chunk is gone or damaged and has no source, or the file was replaced.
        """
        return self._reading.spans(manifest, spans)

    def frames_of(self, name: Any) -> Frames:
        """Return where the frames of an instance lie.

        Raises
        ------
        MissingChunkError, DamagedError
            If their table is gone or damaged, and cannot be made again.
        """
        return self._viewing.frames_of(_name(name))

    def frame_bytes(self, name: Any, k: Any) -> Any:
        """Return a frame as it is stored, fetching only the chunks that hold it.

        Parameters
        ----------
        name : str or pandas.Series
            As for :meth:`read`.
        k : int, or sequence of int
            The frame's number, from 0; or several.

        Returns
        -------
        bytes, or list of bytes
            As in the file, or the joined fragments of an encapsulated frame (PS3.5 A.4).

        Raises
        ------
        FrameError
            If there is no such frame, or the file does not say where its frames begin.
        """
        several = not isinstance(k, int)
        found = self._viewing.frame_bytes(_name(name), k if several else [k])
        return found if several else found[0]

    def frame(self, name: Any, k: Any) -> Any:
        """Return a frame decoded, fetching only the chunks that hold it.

        Parameters
        ----------
        name, k
            As for :meth:`frame_bytes`.

        Returns
        -------
        numpy.ndarray, or list of numpy.ndarray
            Of shape (rows, columns) or (rows, columns, 3), colours as RGB, no rescale applied.

        Raises
        ------
        FrameError
            As for :meth:`frame_bytes`, and if the frame cannot be decoded.
        """
        several = not isinstance(k, int)
        found = self._viewing.frames(_name(name), k if several else [k])
        return found if several else found[0]

    def volume(
        self, names: Any = None, *, split: bool = False, under: str = "", **conditions: Any
    ) -> Any:
        """Return a series as one array, its slices in the order in which they lie in the patient.

        Parameters
        ----------
        names : sequence of str, or pandas.DataFrame, optional
            The instances, as for :meth:`read_many`.
        split : bool, optional
            Whether instances that do not form one volume give several.
        under, **conditions
            As for :meth:`find`, in place of `names`: ``volume(seriesInstanceUID=uid)``.

        Returns
        -------
        Volume, or list of Volume
            ``array`` of shape (slices, rows, columns) with Rescale applied, ``affine`` (voxel to
            patient, LPS, mm), ``spacing`` (mm) and ``paths``; ordered by the projection of Image
            Position (Patient) on the slices' normal (PS3.3 C.7.6.2.1.1).

        Raises
        ------
        VolumeError
            If the instances do not form one volume; it says which files are in the way.
        NotStoredError
            If no instance is found.
        """
        if names is None:
            keys = self._catalogue.keys_of(**_below(under, conditions))
        else:
            keys = self._keys(names, under, self._reading.mender())
        if not keys:
            raise NotStoredError("No instance fits these conditions: there is nothing to show.")
        volumes = self._viewing.volumes(keys, split=split)
        return volumes if split else volumes[0]

    def restore(
        self,
        folder: str | os.PathLike[str],
        names: Any = None,
        *,
        under: str = "",
        overwrite: bool = False,
    ) -> pd.DataFrame:
        """Write stored files below `folder`, after checking each against its BLAKE3.

        A file appears whole or not at all. Nothing is written outside `folder`, and no link below
        it is followed.

        Parameters
        ----------
        folder : path
            Made if missing.
        names : sequence of str, or pandas.DataFrame, optional
            Only these files: names as for :meth:`read`, or a table of :meth:`find`.
        under : str, optional
            Only the files in this folder of the store.
        overwrite : bool, optional
            Whether a file that exists may be replaced.

        Returns
        -------
        pandas.DataFrame
            One row for every document: ``path``, ``key``, ``size`` (bytes), ``status`` (restored,
            skipped or damaged) and ``reason``.
        """
        keys = self._keys(names, under)
        return restoring.restore(
            self._reading, self._chunks, keys, Path(folder),
            overwrite=overwrite, shown=self.progress,
        )  # fmt: skip

    def verify(self, names: Any = None, *, under: str = "") -> pd.DataFrame:
        """Check stored files: their chunks' lengths and CRC-32, and their BLAKE3.

        Where a file's frames lie, and its data set as DICOM JSON, are stored beside the chunks and
        are checked by their CRC-32. Nothing is mended.

        Parameters
        ----------
        names, under
            As for :meth:`restore`.

        Returns
        -------
        pandas.DataFrame
            One row for every document: ``path``, ``key``, ``size`` (bytes), ``hot`` (the share of
            its bytes that Redis has, 0 to 1), ``status`` (ok, damaged, or, with a source, cold
            where chunks or what lies beside them are gone and nothing is damaged) and ``reason``,
            which names every key that is gone or damaged where the status is damaged.
        """
        keys = self._keys(names, under)
        return restoring.verify(
            self._reading, self._chunks, keys,
            has_source=self._tier.has_source, shown=self.progress,
        )  # fmt: skip

    def _keys(self, names: Any, under: str, mender: Mender | None = None) -> list[str]:
        """Return the keys of the named files, of all by default; only those in a folder.

        A named file whose document is gone comes from `mender`.
        """
        keys = self._versions.keys() if names is None else self._naming.keys(_names(names), mender)
        folder = _folder(under)
        return [key for key in keys if path_of(key).startswith(folder)]

    # --- a hot tier ---

    def prefetch(self, names: Any = None, **conditions: Any) -> Prefetch:
        """Fetch from the source in the background what Redis lacks of some files.

        Reads that need the source come first. The work ends with :meth:`close`.

        Parameters
        ----------
        names : sequence of str, or pandas.DataFrame, optional
            As for :meth:`read_many`.
        **conditions
            As for :meth:`find`, in place of `names`.

        Returns
        -------
        Prefetch
            How far it has come; ``wait()`` waits for its end.

        Raises
        ------
        ValueError
            If the store has no source, or neither names nor conditions are given.
        NotStoredError, AmbiguousNameError
            If a name is not that of one file, stored or at the source.
        """
        if not self._tier.has_source:
            raise ValueError("There is nothing to fetch from: give the store a source.")
        if (names is None) == (not conditions):
            raise ValueError("Give either names or conditions of the files to fetch.")
        if names is None:
            keys = self._catalogue.keys_of(**conditions)
        else:
            keys = list(dict.fromkeys(map(self._naming.key_to_fetch, _names(names))))
        prefetch = Prefetch(keys)
        self._prefetcher.start(prefetch, lambda: keys)
        return prefetch

    def prefetch_priors(self, patient: str, last: int = 3) -> Prefetch:
        """Fetch a patient's latest studies in the background, as before an appointment.

        Parameters
        ----------
        patient : str
            The Patient ID.
        last : int, optional
            How many studies, by their Study Date.

        Returns
        -------
        Prefetch
        """
        if last < 1:
            raise ValueError(f"last is {last}; give a number of studies, at least 1.")
        found = self._catalogue.find(
            patientID=patient, columns=("studyInstanceUID", "studyDate"), studyInstanceUID=...
        )[0]
        latest = found.groupby("studyInstanceUID")["studyDate"].max()
        studies = latest.sort_values(ascending=False, na_position="last").index[:last]
        return self.prefetch(found[found["studyInstanceUID"].isin(studies)])

    # --- searching ---

    def find(
        self,
        query: str = "",
        *,
        columns: str | Sequence[str] | None = None,
        order_by: str | None = None,
        limit: int | None = None,
        under: str = "",
        **conditions: Any,
    ) -> pd.DataFrame:
        """Find stored files by their indexed fields, in one round trip.

        Parameters
        ----------
        query : str, optional
            A query in RediSearch's own language (dialect 2), beside the conditions.
        columns : sequence of str, or "all", optional
            The indexed fields to show; by default those that a person reads.
        order_by : str, optional
            The field to sort by, descending with a minus before it; files without it come last,
            equal ones in order of their path.
        limit : int, optional
            Only so many files, the first ones in that order.
        under : str, optional
            Only files in this folder of the store.
        **conditions
            ``field=value``, of which all have to be met; the field by its name, as `modality`, or
            its DICOM keyword, as `Modality` (`Columns`, since `columns` is taken). A value is

            - a text or a number that the field equals, or one of the field's several values;
            - a date: ``20190131``, ``"2019-01-31"``, `datetime.date`; or all of a month or a year:
              ``"2019-01"``, ``"2019"``;
            - a tuple ``(low, high)``: a range, both ends included, None for an open side;
            - a list: one of several of these;
            - None if the field is absent, ``...`` if it is present;
            - ``words("contrast brain*")``: all these words, stemmed, or the beginnings of them;
            - ``containing("smi")``: this text anywhere in the value, in any case;
            - ``not_(value)``: none of what `value` matches, files without the field among them.

        Returns
        -------
        pandas.DataFrame
            One row for every file, in order of its path: ``path``, ``key`` and the columns, the
            same whatever was found.

        Raises
        ------
        NotIndexedError
            If a field is not indexed.
        ValueError
            If a value does not fit its field.
        SearchError, SearchTimeoutError
            If there is no complete answer.
        """
        table, carried = self._catalogue.find(
            query, columns=columns, order_by=order_by, limit=limit, carry=MANIFEST_MEMBERS,
            **_below(under, conditions),
        )  # fmt: skip
        self._reading.remember(carried)
        return table

    def count_by(
        self,
        name: str,
        across: str | None = None,
        *,
        query: str = "",
        missing: bool = False,
        by: str | None = None,
        under: str = "",
        **conditions: Any,
    ) -> Any:
        """Count the files by the values of one indexed field, or of two.

        A file whose attribute has several values counts once for each of them.

        Parameters
        ----------
        name, across : str
            The field; and a second one for a cross table.
        missing : bool, optional
            Whether files without the field are counted, as pandas' missing value.
        by : {"year", "month"}, optional
            What to count dates by.
        query, under, **conditions
            As for :meth:`find`.

        Returns
        -------
        pandas.Series or pandas.DataFrame
            Counts by value, largest first, with `by` in order of time. For two fields a table with
            a row for each value of `name` and a column for each of `across`, both sorted.

        Raises
        ------
        NotIndexedError, ValueError, SearchError, SearchTimeoutError
            As for :meth:`find`.
        """
        return self._catalogue.count_by(
            name, across, query=query, missing=missing, by=by, **_below(under, conditions)
        )

    def similar(
        self,
        image: str | NDArray[Any],
        k: int = 5,
        *,
        columns: Sequence[str] = SIMILAR_COLUMNS,
        query: str = "",
        under: str = "",
        **conditions: Any,
    ) -> pd.DataFrame:
        """Find the stored images that look most like one, by their thumbnails, in one search.

        Parameters
        ----------
        image : str or numpy.ndarray
            A stored file, as for :meth:`read`; or a picture of shape (rows, columns) or (rows,
            columns, 3).
        k : int, optional
            How many images; `image` itself is none of them.
        columns, query, under, **conditions
            As for :meth:`find`.

        Returns
        -------
        pandas.DataFrame
            At most `k` rows, nearest first: ``path``, ``key``, ``distance`` (the root mean square
            difference of the thumbnails in grey levels, 0 to 255) and the columns.

        Raises
        ------
        NoThumbnailError, DamagedError
            If the stored file has no pixels or none that could be decoded, or its document was
            edited.
        NotStoredError, AmbiguousNameError
            If the name is not that of one stored file.
        ValueError
            If the array is not a picture.
        NotIndexedError, SearchError, SearchTimeoutError
            As for :meth:`find`.
        """
        own_key = ""
        if isinstance(image, str):
            own_key, members = self._naming.members(image, ("thumbnail",))
            if "thumbnail" not in members:
                raise NoThumbnailError(
                    f"{shown_path(own_key)} cannot be compared: it has no pixels, or they could "
                    "not be decoded, or it was loaded with thumbnails=False (load it again "
                    "without that)."
                )
            wanted = members["thumbnail"]
            if not thumbnail.is_sound(wanted):
                raise DamagedError(
                    f"The thumbnail in {shown_path(own_key)} is damaged. Delete the file and load "
                    "it again."
                )
        else:
            wanted = thumbnail.of_array(image)
        return self._catalogue.similar(
            wanted,
            k,
            leave_out=own_key,
            columns=columns,
            query=query,
            **_below(under, conditions),
        )

    def index_also(self, *keywords: str) -> pd.Series[int]:
        """Add DICOM attributes to the index, over all that is stored, and wait until it is done.

        They are searched for by their keywords, as ``find(KVP=(100, 120))``. Nothing is read
        again: the documents have them in ``header``, except sequences and bulk data. Numbers are
        compared as numbers; everything else, dates included, is exact text.

        Parameters
        ----------
        *keywords : str
            From the DICOM dictionary (PS3.6), as ``"KVP"``.

        Returns
        -------
        pandas.Series
            How many stored files have each.

        Raises
        ------
        ValueError
            If a keyword is unknown, a sequence or bulk data; nothing is added then.
        ServerError
            If this Redis user may not make an index.
        """
        return self._catalogue.index_also(*keywords)

    def drop_index(self) -> None:
        """Drop the index; the documents stay, and the next search makes it again."""
        self._catalogue.drop_index()


def _folder(under: str) -> str:
    """Return a folder of the store as the beginning of paths; "" is the whole store."""
    return f"{checked_path(under.strip('/'))}/" if under else ""


def _below(under: str, conditions: Mapping[str, Any]) -> dict[str, Any]:
    """Return conditions with the one that files lie in a folder of the store."""
    return {**conditions, **({"folders": shown_path(_folder(under)[:-1])} if under else {})}


def _name(name: Any) -> str:
    """Return the name in what a method takes for a file."""
    if isinstance(name, str):
        return name
    if isinstance(name, pd.Series) and isinstance(name.get("key"), str):
        return str(name["key"])
    if isinstance(name, os.PathLike):
        return Path(name).as_posix()
    if isinstance(name, pd.DataFrame):
        names = _names(name)
        if len(names) != 1:
            raise ValueError(f"This table has {len(names)} files: give it to read_many().")
        return names[0]
    raise TypeError(f"{type(name).__name__} is not a file's name: give a text, or a row of find().")


def _names(names: Any) -> list[str]:
    """Return the names in what a method takes for files."""
    if isinstance(names, pd.DataFrame):
        if "key" not in names:
            raise TypeError("This table has no column 'key': give one of find() or load().")
        return [key for key in names["key"] if key]
    if isinstance(names, str | os.PathLike):
        return [_name(names)]
    return [_name(name) for name in names]


def _written(path: str, dataset: pydicom.Dataset) -> bytes:
    """Return a data set as a DICOM file."""
    buffer = io.BytesIO()
    try:
        pydicom.dcmwrite(buffer, dataset, enforce_file_format=True)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise NotDicomError(
            f"The data set for {path} cannot be written as a DICOM file "
            f"({type(error).__name__}): it needs a SOPClassUID, a SOPInstanceUID and a "
            "TransferSyntaxUID."
        ) from None
    return buffer.getvalue()
