"""What is stored, searched: each search in one round trip, its answer complete or an error."""

from __future__ import annotations

import functools
import itertools
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from dicomstore.catalogue import answers
from dicomstore.catalogue.alias import Alias
from dicomstore.catalogue.answers import Hit
from dicomstore.catalogue.engine import Engine, hits_of, load_stage
from dicomstore.catalogue.query import Query, build_query
from dicomstore.catalogue.schema import DATE_FIELDS, THUMBNAIL, Index, header_field
from dicomstore.imaging import header, thumbnail
from dicomstore.server.connection import KEYS_PER_COMMAND, Server

#: What `find` shows unless told otherwise.
FIND_COLUMNS = (
    "modality",
    "studyDate",
    "patientID",
    "protocolName",
    "seriesDescription",
    "rows",
    "columns",
    "numberOfFrames",
)
SIMILAR_COLUMNS = ("imageName", "modality", "bodyPartExamined", "seriesDescription")
#: For more rows than this, to carry members costs more than it may save.
CARRIED = 1000
#: Members of a document that are text; the others that can be carried are numbers or lists.
TEXT_MEMBERS = frozenset(["imageName", "version", "blake3"])


class Catalogue:
    """Searches the documents of one server.

    Parameters
    ----------
    server : Server
        Where the documents lie.
    """

    def __init__(self, server: Server) -> None:
        self._server = server
        self._alias = Alias(server)
        self._engine = Engine(server, self._alias)

    # --- the index ---

    def ensure(self) -> None:
        """Make the index if there is none, and wait until it is complete.

        Raises
        ------
        ServerError
            If there is none and this user may not make it, or the server has no search engine.
        """
        self._alias.ensure()

    def index_also(self, *keywords: str) -> pd.Series[int]:
        """Add DICOM attributes to the index, over all that is stored, and wait until it is done.

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
        own = {indexed.keyword for indexed in header.FIELDS.values()}
        self._alias.extend({each: header_field(each) for each in keywords if each not in own})
        stages = ["GROUPBY", "0", "REDUCE", "COUNT", "0", "AS", "n"]

        def count(keyword: str, index: Index) -> int:
            search = build_query("", {keyword: ...}, index)
            return sum(int(group[b"n"]) for group in self._engine.groups(index, search, *stages))

        counts = [self._engine.ask(functools.partial(count, keyword))[1] for keyword in keywords]
        return pd.Series(counts, index=list(keywords), name="files", dtype="int64")

    def drop_index(self) -> None:
        """Drop the index; the documents stay, and the next search makes it again.

        Raises
        ------
        ServerError
            If this Redis user may not drop it.
        """
        self._alias.drop()

    # --- searching ---

    def find(
        self,
        query: str = "",
        *,
        columns: Sequence[str] | None = None,
        order_by: str | None = None,
        limit: int | None = None,
        carry: Sequence[str] = (),
        **conditions: Any,
    ) -> tuple[pd.DataFrame, list[tuple[str, dict[str, Any]]]]:
        """Find documents by their indexed fields, in one round trip.

        Parameters
        ----------
        query : str, optional
            A query in RediSearch's own language (dialect 2), beside the conditions.
        columns : sequence of str or "all", optional
            The indexed fields to show, ``FIND_COLUMNS`` by default.
        order_by : str, optional
            The field to sort by, descending with a minus before it.
        limit : int, optional
            Only so many files, the first ones in that order.
        carry : sequence of str, optional
            Members of the documents that come beside the table.
        **conditions
            ``field=value``, of which all have to be met.

        Returns
        -------
        table : pandas.DataFrame
            One row for every file, in order of its path: ``path``, ``key`` and the columns.
        carried : list of (str, dict)
            For each of the first ``CARRIED`` rows its key, and those members of `carry` that the
            document has.

        Raises
        ------
        NotIndexedError
            If a field is not indexed.
        ValueError
            If a value does not fit its field.
        SearchError, SearchTimeoutError
            If there is no complete answer.
        """
        if limit is not None and (not isinstance(limit, int) or limit < 1):
            raise ValueError(f"limit is {limit!r}; give a number of files, at least 1.")
        members = [f"$.{name}" for name in carry]

        def ask(index: Index) -> tuple[list[Hit], dict[str, str], str | None]:
            search = build_query(query, conditions, index)
            fields = _shown(index, FIND_COLUMNS if columns is None else columns)
            order = None if order_by is None else index.field(order_by.removeprefix("-"))
            loaded = [*dict.fromkeys([*fields.values(), *([order] if order else [])]), *members]
            if limit is None:
                return self._engine.hits(index, search, loaded), fields, order
            by = [f"@{order}", "DESC" if descending else "ASC"] if order else []
            by += ["@__key", "ASC"]
            first = ["LOAD", "1", "@__key", "SORTBY", str(len(by)), *by, "MAX", str(limit)]
            groups = self._engine.groups(index, search, *first, *load_stage(loaded))
            return [(os.fsdecode(group[b"__key"]), group) for group in groups], fields, order

        descending = order_by is not None and order_by.startswith("-")
        index, (found, fields, order) = self._engine.ask(ask)
        found.sort(key=lambda hit: hit[0])
        if order:
            found = answers.ordered(found, order, index.fields[order], descending=descending)
        with_members = found[:CARRIED] if carry else []
        carried = [(key, _members(carry, values)) for key, values in with_members]
        return answers.table(found, fields, index.fields), carried

    def keys_of(self, query: str = "", **conditions: Any) -> list[str]:
        """Return the keys of the documents that `find` finds, in its order."""

        def ask(index: Index) -> list[Hit]:
            return self._engine.hits(index, build_query(query, conditions, index), [])

        return sorted(key for key, _ in self._engine.ask(ask)[1])

    def count_by(
        self,
        name: str,
        across: str | None = None,
        *,
        query: str = "",
        missing: bool = False,
        by: str | None = None,
        **conditions: Any,
    ) -> Any:
        """Count the documents by the values of one indexed field, or of two.

        A file whose attribute has several values counts once for each of them.

        Parameters
        ----------
        name, across : str
            The field; and a second one for a cross table.
        missing : bool, optional
            Whether files without the field are counted, as pandas' missing value.
        by : {"year", "month"}, optional
            What to count dates by.
        query, **conditions
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
        names = [name] if across is None else [name, across]

        def ask(index: Index) -> tuple[list[dict[bytes, bytes]], list[str]]:
            fields = [index.field(each) for each in names]
            if by is not None and (by not in ("year", "month") or DATE_FIELDS.isdisjoint(fields)):
                raise ValueError(f"by={by!r}: count {', '.join(DATE_FIELDS)} by 'year' or 'month'.")
            search = build_query(query, conditions, index)
            if not missing:
                present = " ".join(f"-(ismissing(@{field}))" for field in fields)
                search = search._replace(text=f"{search.text} {present}".removeprefix("* "))
            group = ["GROUPBY", str(len(fields)), *(f"@{field}" for field in fields)]
            stages = [*group, "REDUCE", "COUNT", "0", "AS", "__count"]
            return self._engine.groups(index, search, *stages), fields

        index, (rows, fields) = self._engine.ask(ask)
        kinds = {field: index.fields[field] for field in fields}
        counts: Counter[tuple[Any, ...]] = Counter()
        for row in rows:
            values = [answers.group_values(f, kinds[f], row.get(f.encode()), by) for f in fields]
            for combination in itertools.product(*values):
                counts[combination] += int(row[b"__count"])
        if across is None:
            return answers.ranking(name, counts, in_order=by is not None)
        return answers.cross_table(names, counts)

    def similar(
        self,
        vector: Sequence[int],
        k: int,
        *,
        leave_out: str = "",
        columns: Sequence[str] = SIMILAR_COLUMNS,
        query: str = "",
        **conditions: Any,
    ) -> pd.DataFrame:
        """Find the images whose thumbnails are nearest to one.

        Parameters
        ----------
        vector : sequence of int
            The thumbnail's grey levels, row by row.
        k : int
            How many images.
        leave_out : str, optional
            The key of a document that is not among them.
        columns, query, **conditions
            As for :meth:`find`.

        Returns
        -------
        pandas.DataFrame
            At most `k` rows, nearest first: ``path``, ``key``, ``distance`` (the root mean square
            difference of the thumbnails in grey levels, 0 to 255) and the columns.

        Raises
        ------
        NotIndexedError, ValueError, SearchError, SearchTimeoutError
            As for :meth:`find`.
        """
        if not isinstance(k, int) or k < 1:
            raise ValueError(f"k is {k!r}; give a number of images, at least 1.")
        given: list[str | bytes] = [
            "vector",
            np.array(vector, dtype="<f4").tobytes(),
            "k",
            str(k + 1),
        ]

        def ask(index: Index) -> tuple[list[Hit], dict[str, str]]:
            search = build_query(query, conditions, index)
            parameters = [*search.parameters[2:], *given]
            search = search._replace(
                text=f"({search.text})=>[KNN $k @{THUMBNAIL} $vector AS __distance]",
                parameters=["PARAMS", str(len(parameters)), *parameters],
            )
            fields = _shown(index, columns)
            reply = self._engine.search(
                index, "FT.SEARCH", search, "SORTBY", "__distance", "LIMIT", "0", str(k + 1),
                "RETURN", str(len(fields) + 1), "__distance", *fields.values(),
            )  # fmt: skip
            return hits_of(reply), fields

        index, (found, fields) = self._engine.ask(ask)
        found = [hit for hit in found if hit[0] != leave_out][:k]
        table = answers.table(found, fields, index.fields)
        distances = [thumbnail.distance(float(values[b"__distance"])) for _, values in found]
        table.insert(2, "distance", np.array(distances, dtype=np.float64))
        return table

    def unindexed(self, keys: Iterable[str]) -> set[str]:
        """Return those of the documents at `keys` that no search finds."""
        if not self._server.can_search():
            return set()
        wanted = sorted(set(keys))
        missing = set(wanted)
        for first in range(0, len(wanted), KEYS_PER_COMMAND):
            group = wanted[first : first + KEYS_PER_COMMAND]
            missing.difference_update(
                self._engine.ask(functools.partial(self._found_among, group))[1]
            )
        # Not those that were deleted, or have expired or been evicted since.
        left = sorted(missing)
        there = self._server.commands([("EXISTS", key) for key in left])
        return {key for key, exists in zip(left, there, strict=True) if exists}

    def _found_among(self, keys: Sequence[str], index: Index) -> list[str]:
        only = ["INKEYS", str(len(keys)), *keys, "NOCONTENT", "LIMIT", "0", str(len(keys))]
        reply = self._engine.search(index, "FT.SEARCH", Query(), *only)
        return [key for key, _ in hits_of(reply)]


def _shown(index: Index, columns: Sequence[str]) -> dict[str, str]:
    """Return the field behind every column that is to be shown."""
    names = index.names if columns == "all" else columns
    return {name: index.field(name) for name in names}


def _members(names: Sequence[str], values: Mapping[bytes, bytes]) -> dict[str, Any]:
    found = {name: values.get(f"$.{name}".encode()) for name in names}
    return {name: _member(name, text) for name, text in found.items() if text is not None}


def _member(name: str, text: bytes) -> Any:
    if name in TEXT_MEMBERS:
        return text.decode()
    return int(text) if text.isdigit() else json.loads(text)
