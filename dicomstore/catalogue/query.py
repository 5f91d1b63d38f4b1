"""Conditions as a query in the engine's language; without a server."""

from __future__ import annotations

import calendar
import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from numbers import Real
from types import EllipsisType
from typing import Any, NamedTuple

from dicomstore.catalogue.schema import (
    ANY_CASE,
    DATE_FIELDS,
    PART_FIELDS,
    WORD_FIELDS,
    WORDS,
    Index,
)

#: Servers expand a prefix of two letters at least, unless told otherwise.
SHORTEST_PREFIX = 2
#: So many spellings of a text that has letters beyond ASCII are searched for at most.
MOST_SPELLINGS = 64
#: A TEXT field is cut into words at white space and at this; control characters and backslashes
#: are left out of a word.
_SEPARATORS = re.compile(r"[\s!\"#$%&'()*+,\-./:;<=>?@\[\]^`{|}~]+")


@dataclass(frozen=True)
class words:
    """A condition: all these words, in any order, as ``"contrast brain*"``.

    A word also finds its other forms (contrasts, contrasted), except within :class:`not_`; with
    ``*`` it is the beginning of a word. For `protocolName`, `studyDescription`, `seriesDescription`
    and `bodyPartExamined`.
    """

    text: str


@dataclass(frozen=True)
class containing:
    """A condition: this text anywhere in the field, in any case, as ``"smi"`` for SMITH^JOHN.

    For the fields of ``PART_FIELDS``; at least two letters.
    """

    text: str


@dataclass(frozen=True)
class not_:
    """A condition: whatever `condition` does not match, files without the field among it.

    Words are taken as they are written: ``not_(words("contrast"))`` leaves out what has the word
    contrast, and keeps what has only contrasts or contrasted.
    """

    condition: Any


class Query(NamedTuple):
    """A query's text and PARAMS, and what may expand in it: words, and values of TAG fields."""

    text: str = "*"
    parameters: Sequence[str | bytes] = ()
    expands_words: bool = False
    expands_values: bool = False


def build_query(query: str, conditions: Mapping[str, Any], index: Index) -> Query:
    """Return the query for `conditions`; their values travel only in its PARAMS."""
    builder = _Builder(index)
    clauses = [f"({query})"] if query.strip() else []
    clauses += [builder.clause(index.field(name), wanted) for name, wanted in conditions.items()]
    flat = [text for item in builder.parameters.items() for text in item]
    raw = query.strip() != "*" and bool(re.search("[*%]", query))
    return Query(
        " ".join(clauses) or "*",
        ["PARAMS", str(len(flat)), *flat] if flat else [],
        builder.expands or builder.expands_values or raw,
        builder.expands_values or raw,
    )


class _Builder:
    def __init__(self, index: Index) -> None:
        self._index = index
        self.parameters: dict[str, str] = {}
        self.expands = False
        self.expands_values = False

    def _parameter(self, value: str) -> str:
        name = f"p{len(self.parameters)}"
        self.parameters[name] = value
        return f"${name}"

    def clause(self, name: str, wanted: Any) -> str:
        if isinstance(wanted, not_):
            return f"-({self.clause(name, wanted.condition)})"
        if isinstance(wanted, words):
            return self._words(name, wanted.text)
        if isinstance(wanted, containing):
            return self._part(name, wanted.text)
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
        wanted = []
        for piece in text.split():
            parts = [_word(part) for part in _SEPARATORS.split(piece)]
            parts = [part for part in parts if part]
            wanted += [self._word(name, part, prefix=False) for part in parts[:-1]]
            wanted += [self._word(name, part, prefix=piece.endswith("*")) for part in parts[-1:]]
        if not wanted:
            raise ValueError(f"{name}: {text!r} has no word in it.")
        return f"@{name}{WORDS}:({' '.join(wanted)})"

    def _part(self, name: str, text: str) -> str:
        if name not in PART_FIELDS:
            raise ValueError(f"{name} cannot be searched by parts; {', '.join(PART_FIELDS)} can.")
        part = _tag(name, text)
        if len(part) < SHORTEST_PREFIX:
            raise ValueError(f"{name}: give at least {SHORTEST_PREFIX} letters of it.")
        self.expands_values = True
        # The engine folds the case of ASCII letters only.
        cases = [[c] if c.isascii() else sorted({c, *_other_case(c)}) for c in part]
        if math.prod(map(len, cases)) > MOST_SPELLINGS:
            raise ValueError(f"{name}: {text!r} has too many letters with accents; give fewer.")
        spellings = ["".join(letters) for letters in itertools.product(*cases)]
        return f"@{name}{ANY_CASE}:{{{'|'.join(f'*{self._parameter(s)}*' for s in spellings)}}}"

    def _word(self, name: str, word: str, *, prefix: bool) -> str:
        if prefix and len(word.encode()) < SHORTEST_PREFIX:
            raise ValueError(f"{word}*: give at least {SHORTEST_PREFIX} letters before the star.")
        # The engine folds the case of ASCII letters only, and in a prefix that of all letters.
        spellings = {word, word.lower(), word.upper(), word.capitalize()}
        if word.isascii():
            spellings = {word}
        elif prefix and len(spellings) > 1:
            raise ValueError(
                f"{word}*: as a beginning the engine finds this only in small letters; give the "
                "whole word, or plain letters before the star."
            )
        self.expands |= prefix
        star = "*" if prefix else ""
        return f"({'|'.join(self._parameter(spelling) + star for spelling in sorted(spellings))})"


def _word(text: str) -> str:
    return "".join(letter for letter in text if letter > "\x1f" and letter not in "\x7f\\")


def _other_case(letter: str) -> set[str]:
    return {other for other in (letter.lower(), letter.upper()) if len(other) == 1}


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
