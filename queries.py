"""What can be searched for: the indexed fields, and conditions as a query with its parameters."""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Iterable, Mapping
from datetime import date
from numbers import Real
from typing import Any

import documents
import slides
from errors import SearchTimeoutError

#: On Redis 7.4 an index name counts as a key for ACLs, hence the prefix of the documents.
INDEX = "file:idx"
#: A search answers within this time or with an error.
SEARCH_TIMEOUT_MS = 10_000

#: The indexed fields and their types; all but the UIDs and names can be sorted and grouped by
#: without reading the documents.
INDEX_FIELDS = {
    "imageName": "TAG",
    "size": "NUMERIC",
    **{name: indexed.type for name, indexed in documents.FIELDS.items()},
    **slides.FIELDS,
}
UNSORTED_FIELDS = {
    "imageName",
    "studyInstanceUID",
    "seriesInstanceUID",
    "sopInstanceUID",
    "dimensions",
}
MULTI_VALUED_FIELDS = {"dimensions"}
DATE_FIELDS = {"studyDate"}
TIMED_OUT = (
    f"The search engine did not finish within {SEARCH_TIMEOUT_MS} ms. Narrow the query, or give "
    "the server a longer TIMEOUT."
)


def refuse_partial(reply: Mapping[bytes, Any]) -> None:
    if reply.get(b"warning"):
        raise SearchTimeoutError(TIMED_OUT)


def check_field(name: str) -> None:
    if name not in INDEX_FIELDS:
        near = difflib.get_close_matches(name, INDEX_FIELDS, n=1)
        hint = f" Did you mean {near[0]}?" if near else f" Indexed are {', '.join(INDEX_FIELDS)}."
        raise ValueError(f"{name!r} is not an indexed field.{hint}")


def build_query(query: str, conditions: Mapping[str, Any]) -> tuple[str, list[str]]:
    """Return the query text and its PARAMS; values travel in the latter alone."""
    clauses = [f"({query})"] if query.strip() else []
    parameters: dict[str, str] = {}

    def parameter(value: str) -> str:
        parameters[f"p{len(parameters)}"] = value
        return f"$p{len(parameters) - 1}"

    for name, wanted in conditions.items():
        check_field(name)
        values = wanted if isinstance(wanted, list | set | frozenset) else [wanted]
        if not values:
            raise ValueError(f"{name}: an empty list matches nothing; give at least one value.")
        if INDEX_FIELDS[name] == "TAG":
            tags = "|".join(parameter(_tag(name, value)) for value in values)
            clauses.append(f"@{name}:{{{tags}}}")
            continue
        if isinstance(wanted, tuple):
            if len(wanted) != 2:
                raise ValueError(f"{name}: a range is (low, high), with None for an open side.")
            ranges = [wanted]
        else:
            ranges = [(value, value) for value in values]
        clauses.append(
            "|".join(
                f"@{name}:[{parameter(_bound(name, low, '-inf'))} "
                f"{parameter(_bound(name, high, '+inf'))}]"
                for low, high in ranges
            ).join("()")
        )
    flat = [text for item in parameters.items() for text in item]
    return " ".join(clauses) or "*", ["PARAMS", str(len(flat)), *flat] if flat else []


def _tag(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} is text; {value!r} is not.")
    if "\0" in value:
        raise ValueError(f"{name}: no stored value holds a NUL character.")
    return value.replace("\\", "\\\\")


def _bound(name: str, value: Any, open_side: str) -> str:
    if value is None:
        return open_side
    if name in DATE_FIELDS:
        if isinstance(value, date):
            return f"{value:%Y%m%d}"
        digits = re.fullmatch(r"(\d{4})-?(\d\d)-?(\d\d)", str(value))
        if digits is None:
            raise ValueError(f"{name}: write a date as 20190131 or 2019-01-31, not {value!r}.")
        return "".join(digits.groups())
    if isinstance(value, bool) or not isinstance(value, Real) or math.isnan(value):
        raise ValueError(f"{name} is a number; {value!r} is not.")
    return str(value)


def cell(name: str, value: bytes) -> str | int | float:
    """Return a value of a search result in the field's own type."""
    text = value.decode()
    if INDEX_FIELDS[name] == "TAG":
        return text
    number = json.loads(text)
    if not isinstance(number, int | float):
        return text  # several numbers
    # Beyond 2^53 a double is no exact integer, beyond 2^63 it fits no integer column.
    return int(number) if abs(number) < 2**53 and number == int(number) else number


def has_fractions(column: Iterable[Any]) -> bool:
    return any(isinstance(value, float) for value in column)
