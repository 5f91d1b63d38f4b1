"""The index asked: each answer complete, and remembered for as long as nothing has changed."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import redis

from dicomstore.catalogue.engine import PAGE, SEARCH_TIMEOUT_MS
from dicomstore.catalogue.query import build_query
from dicomstore.catalogue.schema import INDEX, Index, named
from dicomstore.errors import SearchError, SearchTimeoutError
from dicomstore.web.fetching import Command, Fetching

#: So many answers of the index are remembered for as long as it does not change.
REMEMBERED = 64
#: An answer of more rows is not.
REMEMBERED_ROWS = 20_000
OPTIONS = ("TIMEOUT", str(SEARCH_TIMEOUT_MS), "DIALECT", "2")

Row = dict[bytes, Any]


class Asking:
    """Asks the index, and remembers what it answered while nothing in it changes.

    Parameters
    ----------
    fetching : Fetching
    """

    def __init__(self, fetching: Fetching) -> None:
        self._fetching = fetching
        self._remembered: OrderedDict[Command, list[Row]] = OrderedDict()
        self._state: Any = None
        self._latest: Index | None = None

    async def index(self) -> Index:
        """Return the index that answers now; forget its answers if anything in it has changed."""
        (info,) = await self._fetching.replies([("FT.INFO", INDEX)])
        if isinstance(info, redis.ResponseError):
            raise SearchError("There is no index: load a file, or search once, to have it made.")
        if isinstance(info, Exception):
            raise info
        # Every document that is added or changed takes a new number.
        by_name = named(info)
        state = [by_name[name] for name in (b"index_name", b"max_doc_id", b"num_docs")]
        if state != self._state:
            self._remembered.clear()
            self._state = state
        self._latest = Index.of(info)
        return self._latest

    async def values(self, index: Index, field: str) -> list[str]:
        """Return the values of a field, those of deleted documents perhaps among them."""
        (reply,) = await self._fetching.replies([("FT.TAGVALS", index.name, field)])
        if isinstance(reply, redis.ResponseError):
            raise SearchError(
                "The values of a field cannot be listed: allow the user FT.TAGVALS, as in "
                "docs/security.md."
            ) from reply
        if isinstance(reply, Exception):
            raise reply
        return [value.decode() for value in reply]

    async def count(self, index: Index, conditions: dict[str, Any]) -> int:
        """Return how many instances meet the conditions, those without UIDs among them."""
        asked = {name: wanted for name, wanted in conditions.items() if wanted is not ...}
        query = build_query("", asked, index)
        (reply,) = await self._fetching.replies(
            [("FT.SEARCH", index.name, query.text, "LIMIT", "0", "0", *query.parameters, *OPTIONS)]
        )
        return int(whole(reply)[b"total_results"])

    async def rows(
        self, index: Index, conditions: dict[str, Any], stages: Sequence[str]
    ) -> list[Row]:
        """Return all rows of an aggregation over what meets the conditions, remembered ones too."""
        words = _words(index, conditions, stages)
        if (known := self._remembered.get(words)) is not None:
            return known
        state = self._state
        rows = await self._all(words)
        if state == self._state and len(rows) <= REMEMBERED_ROWS:
            self._remembered[words] = rows
            if len(self._remembered) > REMEMBERED:
                self._remembered.popitem(last=False)
        return rows

    async def rows_at_once(self, conditions: dict[str, Any], stages: Sequence[str]) -> list[Row]:
        """Return the rows as they are now, from the index that answered last if it still does.

        FT.INFO takes as long as a search that finds one instance.
        """
        index = self._latest or await self.index()
        try:
            return await self._all(_words(index, conditions, stages))
        except SearchError:
            answering = await self.index()
            if answering == index:
                raise
            return await self._all(_words(answering, conditions, stages))

    async def _all(self, words: Command) -> list[Row]:
        rows: list[Row] = []
        index = words[1]
        while words:
            reply, cursor = _complete(*await self._fetching.replies([words]))
            rows += [result[b"extra_attributes"] for result in reply[b"results"]]
            words = ("FT.CURSOR", "READ", index, cursor) if cursor else ()
        return rows


def _words(index: Index, conditions: dict[str, Any], stages: Sequence[str]) -> Command:
    query = build_query("", conditions, index)
    cursor_options = ("WITHCURSOR", "COUNT", str(PAGE))
    return ("FT.AGGREGATE", index.name, query.text, *stages, *cursor_options,
            *query.parameters, *OPTIONS)  # fmt: skip


def _complete(reply: Any) -> tuple[Any, Any]:
    """Return a reply and its cursor, if the answer is complete."""
    found, cursor = (reply, 0) if isinstance(reply, Exception) else reply
    return whole(found), cursor


def whole(reply: Any) -> Any:
    """Return a reply, if the answer is complete."""
    if isinstance(reply, redis.ResponseError):
        if "timeout" in str(reply).lower():
            raise SearchTimeoutError("The search engine did not finish in time: ask for less.")
        raise SearchError("The search engine refused the query.") from reply
    if isinstance(reply, Exception):
        raise reply
    if reply.get(b"warning"):
        raise SearchError("The search engine warns that its answer is not complete.")
    return reply
