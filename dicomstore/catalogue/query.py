"""What can be searched for: the index's fields, conditions as a query, and answers as columns."""

from __future__ import annotations

import calendar
import contextlib
import difflib
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from numbers import Real
from types import EllipsisType
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from pydicom import datadict

from dicomstore.errors import NotIndexedError, SearchError, SearchTimeoutError
from dicomstore.imaging import header, slide, thumbnail

#: On Redis 7.4 an index name counts as a key for ACLs, hence the prefix of the documents.
INDEX = "file:idx"
#: A search answers within this time or with an error.
SEARCH_TIMEOUT_MS = 10_000
TIMED_OUT = (
    f"The search engine did not finish within {SEARCH_TIMEOUT_MS} ms. Narrow the query, or give "
    "the server a longer TIMEOUT."
)

#: The indexed fields and their types; all but the UIDs and names can be sorted and grouped by
#: without reading the documents.
INDEX_FIELDS = {
    "imageName": "TAG",
    "size": "NUMERIC",
    **{name: indexed.type for name, indexed in header.FIELDS.items()},
    **slide.FIELDS,
}
UNSORTED_FIELDS = {
    "imageName",
    "studyInstanceUID",
    "seriesInstanceUID",
    "sopInstanceUID",
    "dimensions",
}
DATE_FIELDS = {"studyDate"}
#: Fields whose words can be searched; their TEXT twins in the index have this ending.
WORD_FIELDS = ("protocolName", "studyDescription", "seriesDescription", "bodyPartExamined")
WORDS = "Words"
DESCRIPTOR = "descriptor"
#: What a server does unless told otherwise: a prefix stands for its first 200 words, of two
#: letters at least, and an index that was made without STOPWORDS leaves these out.
DEFAULT_EXPANSIONS = 200
SHORTEST_PREFIX = 2
STOP_WORDS = frozenset({
    "a", "an", "and", "are", "as", "at", "be", "but", "by", "for", "if", "in", "into", "is",
    "it", "no", "not", "of", "on", "or", "such", "that", "the", "their", "then", "there",
    "these", "they", "this", "to", "was", "will", "with",
})  # fmt: skip
#: A TEXT field is cut into words at white space and at this; control characters and backslashes
#: are left out of a word.
_SEPARATORS = re.compile(r"[\s!\"#$%&'()*+,\-./:;<=>?@\[\]^`{|}~]+")


def _schema() -> dict[str, list[str]]:
    schema = {
        name: _field(f"$.{name}", name, kind, name not in UNSORTED_FIELDS)
        for name, kind in INDEX_FIELDS.items()
    }
    for name in WORD_FIELDS:
        schema[name + WORDS] = [f"$.{name}", "AS", name + WORDS, "TEXT"]
    vector = ["TYPE", "FLOAT32", "DIM", str(thumbnail.DIMENSIONS), "DISTANCE_METRIC", "L2"]
    schema[DESCRIPTOR] = [f"$.{DESCRIPTOR}", "AS", DESCRIPTOR, "VECTOR", "FLAT", "6", *vector]
    return schema


def _field(path: str, name: str, kind: str, sortable: bool) -> list[str]:
    # Not through redis-py's TagField: it sends a SEPARATOR, which splits values at commas.
    exact, empty = (["CASESENSITIVE"], ["INDEXEMPTY"]) if kind == "TAG" else ([], [])
    sort = ["SORTABLE"] if sortable else []
    return [path, "AS", name, kind, *exact, "INDEXMISSING", *empty, *sort]


#: The index's fields by name, each as FT.CREATE and FT.ALTER take it.
SCHEMA = _schema()


def header_field(keyword: str) -> list[str]:
    """Return the field over the attribute `keyword` of ``header``, as FT.ALTER takes it.

    Its type follows the VR: numbers are NUMERIC, everything else TAG, dates included, since
    ``header`` has them as text. None is SORTABLE: that would keep only the first of many values.

    Raises
    ------
    ValueError
        If `keyword` is none of the DICOM dictionary (PS3.6), or a sequence, or bulk data.
    """
    tag = datadict.tag_for_keyword(keyword)
    if tag is None:
        near = difflib.get_close_matches(keyword, datadict.keyword_dict, n=1, cutoff=0.5)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ValueError(f"{keyword!r} is no keyword of the DICOM dictionary.{hint}")
    vrs = datadict.dictionary_VR(tag).split(" or ")
    if "SQ" in vrs:
        raise ValueError(f"{keyword} is a sequence; only plain attributes can be indexed.")
    if not header.BULK_VRS.isdisjoint(vrs):
        raise ValueError(f"{keyword} is bulk data, which stays in the chunks and out of the index.")
    kind = "TAG" if header.NUMBER_VRS.isdisjoint(vrs) else "NUMERIC"
    return _field(f"$.header.{keyword}", keyword, kind, sortable=False)


def refuse_partial(reply: Mapping[bytes, Any]) -> None:
    if reply.get(b"warning"):
        raise SearchTimeoutError(TIMED_OUT)


def refuse_unexpanded(search: Query, info: Mapping[bytes, Any], config: Any) -> None:
    """Raise if the server may have left out words that a prefix stands for.

    It does so in silence; `config` is its reply to FT.CONFIG GET MAXEXPANSIONS, or an error.
    """
    found = {} if isinstance(config, Exception) else dict(config)
    expansions = int(found.get(b"MAXEXPANSIONS", DEFAULT_EXPANSIONS))
    most = int(info[b"num_terms"]) if search.expands_words else 0
    if search.expands_values:
        most = max(most, int(info[b"num_docs"]))
    if most > expansions:
        raise SearchError(
            f"This server takes a prefix for at most {expansions} words or values, and the index "
            f"has up to {most}: give whole words, or start it with a larger MAXEXPANSIONS."
        )


class IndexInfo(NamedTuple):
    """What FT.INFO says: the fields' types by name, and the words that are not indexed."""

    fields: Mapping[str, str]
    stop_words: frozenset[str]

    @classmethod
    def of(cls, info: Mapping[bytes, Any]) -> IndexInfo:
        fields = {
            attribute[b"attribute"].decode(): attribute[b"type"].decode()
            for attribute in info[b"attributes"]
        }
        return cls(fields, frozenset() if b"stopwords_list" in info else STOP_WORDS)

    @property
    def names(self) -> list[str]:
        """The fields that conditions and columns can name."""
        return [name for name, kind in self.fields.items() if kind in ("TAG", "NUMERIC")]

    def field(self, name: str) -> str:
        """Return the indexed field that `name` means: its own name, or its DICOM keyword."""
        if self.fields.get(name) in ("TAG", "NUMERIC"):
            return name
        for own, indexed in header.FIELDS.items():
            if name == indexed.keyword and own in self.fields:
                return own
        if datadict.tag_for_keyword(name) is not None:
            hint = f"store.index_also({name!r}) makes it one."
        elif near := difflib.get_close_matches(name, self.names, n=1):
            hint = f"Did you mean {near[0]}?"
        else:
            hint = f"Indexed are {', '.join(self.names)}."
        raise NotIndexedError(f"{name!r} is not an indexed field. {hint}")


# --- conditions ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class words:
    """A condition: all these words, in any order, as ``"contrast brain*"``.

    A word also finds its other forms (contrasts, contrasted); with ``*`` it is the beginning of
    one. For `protocolName`, `studyDescription`, `seriesDescription` and `bodyPartExamined`.
    """

    text: str


@dataclass(frozen=True)
class not_:
    """A condition: whatever `condition` does not match, files without the field among it."""

    condition: Any


class Query(NamedTuple):
    """A query's text and PARAMS, and what may expand in it: words, and values of TAG fields."""

    text: str = "*"
    parameters: Sequence[str | bytes] = ()
    expands_words: bool = False
    expands_values: bool = False


def build_query(
    query: str,
    conditions: Mapping[str, Any],
    index: IndexInfo,
    other_forms: Callable[[str, str], list[str]],
) -> Query:
    """Return the query for `conditions`; their values travel in its PARAMS alone.

    `other_forms` says which other terms the engine searches for with a word of a field: it does not
    add them by itself within a negation.
    """
    builder = _Builder(index, other_forms)
    clauses = [f"({query})"] if query.strip() else []
    clauses += [builder.clause(index.field(name), wanted) for name, wanted in conditions.items()]
    flat = [text for item in builder.parameters.items() for text in item]
    raw = query.strip() != "*" and bool(re.search("[*%]", query))
    return Query(
        " ".join(clauses) or "*",
        ["PARAMS", str(len(flat)), *flat] if flat else [],
        builder.expands or raw,
        raw,
    )


class _Builder:
    def __init__(self, index: IndexInfo, other_forms: Callable[[str, str], list[str]]) -> None:
        self._index = index
        self._other_forms = other_forms
        self._negated = False
        self.parameters: dict[str, str] = {}
        self.expands = False

    def _parameter(self, value: str) -> str:
        name = f"p{len(self.parameters)}"
        self.parameters[name] = value
        return f"${name}"

    def clause(self, name: str, wanted: Any) -> str:
        if isinstance(wanted, not_):
            outside, self._negated = self._negated, True
            inner = self.clause(name, wanted.condition)
            self._negated = outside
            return f"-({inner})"
        if isinstance(wanted, words):
            return self._words(name, wanted.text)
        if wanted is None:
            return f"ismissing(@{name})"
        if isinstance(wanted, EllipsisType):
            return f"-(ismissing(@{name}))"
        if isinstance(wanted, list | set | frozenset):
            if not wanted:
                raise ValueError(f"{name}: an empty list matches nothing; give at least one value.")
            if self._index.fields[name] == "NUMERIC" or not all(
                isinstance(value, str) for value in wanted
            ):
                return f"({'|'.join(self.clause(name, value) for value in wanted)})"
            return self._tags(name, wanted)
        if self._index.fields[name] == "TAG":
            return self._tags(name, [wanted])
        return self._range(name, wanted)

    def _tags(self, name: str, values: Iterable[Any]) -> str:
        return f"@{name}:{{{'|'.join(self._parameter(_tag(name, value)) for value in values)}}}"

    def _range(self, name: str, wanted: Any) -> str:
        if isinstance(wanted, tuple):
            if len(wanted) != 2:
                raise ValueError(f"{name}: a range is (low, high), with None for an open side.")
            low, high = wanted
        else:
            low = high = wanted
        bounds = _period if name in DATE_FIELDS else _number
        least = -math.inf if low is None else bounds(name, low)[0]
        most = math.inf if high is None else bounds(name, high)[1]
        if least > most:
            raise ValueError(f"{name}: the range ({low!r}, {high!r}) ends before it begins.")
        return f"@{name}:[{self._parameter(str(least))} {self._parameter(str(most))}]"

    def _words(self, name: str, text: str) -> str:
        if name not in WORD_FIELDS:
            raise ValueError(f"{name} has no words to search; {', '.join(WORD_FIELDS)} have.")
        if name + WORDS not in self._index.fields:
            raise NotIndexedError(
                f"The words of {name} are not indexed yet: let the owner of this Redis search once."
            )
        wanted = []
        for piece in text.split():
            parts = [_word(part) for part in _SEPARATORS.split(piece)]
            parts = [part for part in parts if part]
            wanted += [self._word(name, part, prefix=False) for part in parts[:-1]]
            wanted += [self._word(name, part, prefix=piece.endswith("*")) for part in parts[-1:]]
        if not wanted:
            raise ValueError(f"{name}: {text!r} has no word in it.")
        return f"@{name}{WORDS}:({' '.join(wanted)})"

    def _word(self, name: str, word: str, *, prefix: bool) -> str:
        if prefix and len(word.encode()) < SHORTEST_PREFIX:
            raise ValueError(f"{word}*: give at least {SHORTEST_PREFIX} letters before the star.")
        if not prefix and word.lower() in self._index.stop_words:
            raise ValueError(
                f"This index was made without small words like {word!r}: leave it out, or make the "
                "index anew with drop_index()."
            )
        # The engine folds the case of ASCII letters alone, and of a prefix that of all letters.
        spellings = {word, word.lower(), word.upper(), word.capitalize()}
        if word.isascii():
            spellings = {word}
        elif prefix and len(spellings) > 1:
            raise ValueError(
                f"{word}*: as a beginning the engine finds this only in small letters; give the "
                "whole word, or plain letters before the star."
            )
        if self._negated and not prefix:
            forms = [self._other_forms(name + WORDS, spelling) for spelling in spellings]
            spellings = spellings.union(*forms)
        self.expands |= prefix
        star = "*" if prefix else ""
        return f"({'|'.join(self._parameter(spelling) + star for spelling in sorted(spellings))})"


def _word(text: str) -> str:
    return "".join(letter for letter in text if letter > "\x1f" and letter not in "\x7f\\")


def _tag(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} is text; {value!r} is not.")
    if "\0" in value:
        raise ValueError(f"{name}: no stored value holds a NUL character.")
    return value.replace("\\", "\\\\")


def _number(name: str, value: Any) -> tuple[Any, Any]:
    if isinstance(value, bool) or not isinstance(value, Real) or math.isnan(value):
        raise ValueError(f"{name} is a number; {value!r} is not.")
    return value, value


def _period(name: str, value: Any) -> tuple[int, int]:
    """Return the first and the last day of a date, a month or a year, as yyyymmdd."""
    text = f"{value:%Y%m%d}" if isinstance(value, date) else str(value)
    parts = re.fullmatch(r"(\d{4})(?:-?(\d\d)(?:-?(\d\d))?)?", text)
    try:
        if parts is None:
            raise ValueError
        year, month, day = (int(part or 0) for part in parts.groups())
        last_month = month or 12
        last_day = day or calendar.monthrange(year, last_month)[1]
        date(year, last_month, last_day)
    except ValueError:
        raise ValueError(
            f"{name}: write a date as 20190131 or 2019-01-31, a month as 2019-01 or a year as "
            f"2019, not {value!r}."
        ) from None
    first = year * 10_000 + (month or 1) * 100 + (day or 1)
    return first, year * 10_000 + last_month * 100 + last_day


# --- answers -------------------------------------------------------------------------------------


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
    # Beyond 2^53 a double is no exact integer.
    return [int(number) if number.is_integer() and abs(number) < 2**53 else number]


def column(name: str, kind: str, replies: Sequence[bytes | None]) -> Any:
    """Return the cells of an answer as an array for a DataFrame, of the type that they need.

    Numbers are Int64, or Float64 if any has a fraction; several values of one attribute are text
    with backslashes between them, as DICOM writes them (PS3.5 6.4).
    """
    if kind == "TAG" and name in INDEX_FIELDS:
        return text_column([np.nan if reply is None else reply.decode() for reply in replies])
    values = [None if reply is None else values_of(name, kind, reply) for reply in replies]
    if kind == "TAG" or any(several is not None and len(several) > 1 for several in values):
        return text_column([np.nan if v is None else "\\".join(map(str, v)) for v in values])
    absent = np.array([one is None for one in values], dtype=bool)
    numbers = [0 if one is None else one[0] for one in values]
    if any(isinstance(number, float) for number in numbers):
        return pd.arrays.FloatingArray(np.array(numbers, dtype=np.float64), absent)
    return pd.arrays.IntegerArray(np.array(numbers, dtype=np.int64), absent)


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
