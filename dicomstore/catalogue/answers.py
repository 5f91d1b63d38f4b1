"""The engine's replies as tables; without a server."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from pandas.api.internals import create_dataframe_from_blocks  # type: ignore[import-not-found]

from dicomstore.catalogue.schema import DATE_FIELDS, INDEX_FIELDS
from dicomstore.keys import DOCUMENT_PREFIX, path_of, shown_path

#: The key of a document, and what was loaded of it.
Hit = tuple[str, Mapping[bytes, bytes]]

#: From here on a double is no exact integer.
EXACT = 2**53

_TEXT = pd.StringDtype("python", na_value=np.nan)


def values_of(name: str, kind: str, reply: bytes) -> list[Any]:
    """Return the values in a cell of an answer: several if `reply` is the text of a JSON array."""
    # A text of our own is never one of several, though it may look like an array.
    if reply[:1] == b"[" and (kind == "NUMERIC" or name not in INDEX_FIELDS):
        wanted = str if kind == "TAG" else int | float
        with contextlib.suppress(ValueError):
            found = json.loads(reply)
            if found and all(isinstance(one, wanted) for one in found):
                return list(found)
    if kind == "TAG":
        return [reply.decode()]
    number = float(reply)
    return [int(number) if number.is_integer() and abs(number) < EXACT else number]


def column(name: str, kind: str, replies: Sequence[bytes | None]) -> Any:
    """Return the cells of an answer as an array for a DataFrame, of the type that they need.

    Numbers are Int64, or Float64 if any has a fraction; several values of one attribute are text
    with backslashes between them, as DICOM writes them (PS3.5 6.4).
    """
    if kind == "TAG" and name in INDEX_FIELDS:
        return text_column([np.nan if reply is None else reply.decode() for reply in replies])
    absent = np.array([reply is None for reply in replies], dtype=bool)
    if kind == "NUMERIC" and (whole := _whole_numbers(replies)) is not None:
        return pd.arrays.IntegerArray(whole, absent)
    values = [None if reply is None else values_of(name, kind, reply) for reply in replies]
    if kind == "TAG" or any(several is not None and len(several) > 1 for several in values):
        return text_column([np.nan if v is None else "\\".join(map(str, v)) for v in values])
    numbers = [0 if one is None else one[0] for one in values]
    if any(isinstance(number, float) for number in numbers):
        return pd.arrays.FloatingArray(np.array(numbers, dtype=np.float64), absent)
    return pd.arrays.IntegerArray(np.array(numbers, dtype=np.int64), absent)


def _whole_numbers(replies: Sequence[bytes | None]) -> Any:
    """Return the replies as integers, None if any needs a closer look; nearly always none does."""
    try:
        numbers = [0 if reply is None else int(reply) for reply in replies]
    except ValueError:
        return None
    small = not numbers or (max(numbers) < EXACT and min(numbers) > -EXACT)
    return np.array(numbers, dtype=np.int64) if small else None


def text_column(texts: Sequence[Any]) -> Any:
    """Return texts, NaN where there is none, as the array that pandas would infer, but quicker."""
    make: Any = pd.arrays.StringArray  # pandas-stubs do not know its `dtype`
    return make(np.array(texts, dtype=object), dtype=_TEXT)


def ordered(
    hits: list[tuple[str, Mapping[bytes, bytes]]], name: str, kind: str, *, descending: bool
) -> list[tuple[str, Mapping[bytes, bytes]]]:
    """Return `hits` in order of a field, those without it last, equal ones in their order."""
    field = name.encode()
    present = [hit for hit in hits if hit[1].get(field) is not None]
    absent = [hit for hit in hits if hit[1].get(field) is None]
    if kind == "TAG":
        present.sort(key=lambda hit: hit[1][field], reverse=descending)
    else:
        present.sort(key=lambda hit: values_of(name, kind, hit[1][field]), reverse=descending)
    return present + absent


def period_of(value: int, by: str) -> int | str:
    """Return the year, 2019, or the month, ``"2019-05"``, of a date yyyymmdd."""
    return value // 10_000 if by == "year" else f"{value // 10_000}-{value // 100 % 100:02}"


def table(
    found: Sequence[Hit], fields: Mapping[str, str], kinds: Mapping[str, str]
) -> pd.DataFrame:
    """Return a row for every hit: path, key, and a column for each of `fields`.

    Parameters
    ----------
    found : sequence of (str, mapping)
        The hits.
    fields : mapping of str to str
        The field that a column shows, by the column's name.
    kinds : mapping of str to str
        The fields' types.
    """
    arrays = [text_column([_path(key) for key, _ in found]), text_column([k for k, _ in found])]
    for field in fields.values():
        replies = [values.get(field.encode()) for _, values in found]
        arrays.append(column(field, kinds[field], replies))
    blocks = [(array, np.array([place])) for place, array in enumerate(arrays)]
    # pandas' constructor would look at every column again; it takes twice as long for one row.
    labels = _labels(("path", "key", *fields)).view()
    frame: pd.DataFrame = create_dataframe_from_blocks(blocks, pd.RangeIndex(len(found)), labels)
    return frame


@functools.lru_cache(maxsize=64)
def _labels(names: tuple[str, ...]) -> pd.Index[str]:
    """Return column names as pandas has them; it takes a quarter of a small table to make them."""
    return pd.Index(names)


def _path(key: str) -> str:
    return shown_path(path_of(key)) if "%" in key else key.removeprefix(DOCUMENT_PREFIX)


def counts(
    rows: Sequence[Mapping[bytes, bytes]],
    fields: Sequence[str],
    kinds: Mapping[str, str],
    by: str | None,
) -> Counter[tuple[Any, ...]]:
    """Return how often each combination of the fields' values is counted in an aggregation.

    A file whose attribute has several values counts once for each of them.
    """
    found: Counter[tuple[Any, ...]] = Counter()
    for row in rows:
        values = [
            _group_values(field, kinds[field], row.get(field.encode()), by) for field in fields
        ]
        for combination in itertools.product(*values):
            found[combination] += int(row[b"__count"])
    return found


def _group_values(name: str, kind: str, reply: bytes | None, by: str | None) -> set[Any]:
    if reply is None:
        return {None}
    values = values_of(name, kind, reply)
    return {period_of(value, by) if by and name in DATE_FIELDS else value for value in values}


def ranking(name: str, counts: Mapping[tuple[Any, ...], int], *, in_order: bool) -> pd.Series[int]:
    """Return counts by value, largest first, or in order of the values."""
    ranked = sorted(
        counts.items(),
        key=lambda item: (item[0][0] is None, 0 if in_order else -item[1], item[0][0]),
    )
    values = [value for (value,), _ in ranked]
    if any(isinstance(value, str) for value in values):
        texts = text_column([np.nan if value is None else value for value in values])
        index = pd.Index(texts, name=name, copy=False)
    else:
        integers = all(isinstance(value, int) or value is None for value in values)
        nullable = "Int64" if integers and None in values else None
        index = pd.Index(values, name=name, dtype=nullable)
    totals = np.array([total for _, total in ranked], dtype=np.int64)
    return pd.Series(totals, index=index, name="count", copy=False)


def cross_table(names: Sequence[str], counts: Mapping[tuple[Any, ...], int]) -> pd.DataFrame:
    """Return counts with a row for each value of one field, and a column for each of the other."""
    series = pd.Series(counts, dtype="int64")
    series.index = pd.MultiIndex.from_tuples(counts, names=list(names))
    return series.unstack(fill_value=0).sort_index().sort_index(axis="columns")
